"""vitedge takes a Vision Transformer from PyTorch to an edge device."""

__version__ = "0.1.0"
