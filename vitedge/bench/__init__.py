"""Measuring honestly: every measurement in its own process, in interleaved rounds, with its conditions.

    rows -> [worker processes, round by round] -> samples -> Measurement -> verdict against fp32

`rows` says what is measured, `worker` is the measuring process and `isolation` starts it, `timing`
is the loop inside it, `session` runs the rounds, `quality` adds top-1, `verdict` compares.
"""
