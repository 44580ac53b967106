"""What `vitedge inspect` computes and draws about one model: one file per thing that is computed.

`ranges` of LayerNorm inputs per channel, `attention` values against 4-bit grids, `sqnr` of each product of a quantized file
against its float parent, `placement` of Q/DQ in the file and in the graph the runtime really runs; `pictures` draws them. What is
computed is numpy and knows no engine: the values come from a `Source` (`sources.py`), of which there is one per format.
Shapes: B batch, N tokens, D channels, H heads, C classes.
"""
