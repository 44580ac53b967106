"""vitedge takes a Vision Transformer from PyTorch to an edge device."""

import os

# ONNX Runtime's official builds report to a server, from inside the process that is timed, before any call of theirs could stop it
# (onnxruntime/Privacy.md). OpenVINO's and NNCF's reports are stopped in runtimes/_openvino_import.py.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
