"""Intermediate values of an ONNX file: a copy of it in memory has the tensors that are asked for as further outputs."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vitedge.artifact import Artifact
from vitedge.inspect.onnx_layers import Layers, find_layers, name_nodes
from vitedge.inspect.sources import Read, Source
from vitedge.model_file import input_spec
from vitedge.model_file.onnx_wire import batch_symbol
from vitedge.runtimes import not_runnable

_ERROR_LEVEL = 3


def open_onnx(artifact: Artifact, threads: int) -> tuple[Source, Layers]:
    """A file's intermediate values in ONNX Runtime on the CPU, and its layers.

    Args:
        artifact: The file, float or quantized.
        threads: Intra-operator threads.
    """
    model = onnx.load(artifact.path)
    name_nodes(model)
    layers = find_layers(model)
    spec = input_spec(artifact)
    operators = {node.op_type for node in model.graph.node}
    no_norms = "no LayerNormalization nodes in the file (written out, or another kind of model)"
    hidden = "Attention" in operators or "MultiHeadAttention" in operators
    no_maps = "no Softmax nodes before a matrix product in the file" + (" (one Attention node does it all)" if hidden else "")
    source = Source(
        artifact,
        spec.batch_size,
        model.graph.output[0].name,
        functools.partial(_open, model, spec.name, artifact, threads),
        layers.norms,
        layers.attentions,
        "" if layers.norms else no_norms,
        "" if layers.attentions else no_maps,
    )
    return source, layers


def _open(model: onnx.ModelProto, input_name: str, artifact: Artifact, threads: int, tensors: Sequence[str]) -> Read:
    import onnxruntime

    names = list(dict.fromkeys(tensors))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    there = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in there)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _ERROR_LEVEL
    session = _trying(artifact, lambda: onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"]))

    def read(x_BCHW: np.ndarray) -> dict[str, np.ndarray]:
        values = _trying(artifact, lambda: session.run(names, {input_name: x_BCHW}))
        return dict(zip(names, values, strict=True))

    return read


def optimized(artifact: Artifact, threads: int) -> onnx.ModelProto:
    """The graph ONNX Runtime really runs on this CPU, after all of its fusions, at batch 1 where the file leaves it free.

    Raises:
        InputError: ONNX Runtime cannot open the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERROR_LEVEL
    symbol = batch_symbol(artifact.path)
    if symbol:
        options.add_free_dimension_override_by_name(symbol, 1)
    with tempfile.TemporaryDirectory(prefix="vitedge-inspect-") as temporary:
        path = Path(temporary) / "optimized.onnx"
        options.optimized_model_filepath = os.fspath(path)
        _trying(artifact, lambda: onnxruntime.InferenceSession(os.fspath(artifact.path), options, providers=["CPUExecutionProvider"]))
        return onnx.load(path)


def _trying(artifact: Artifact, work: Any) -> Any:
    try:
        return work()
    except Exception as error:  # the engine's errors share no class
        raise not_runnable(artifact, "ONNX Runtime", error) from error
