"""Intermediate values of an OpenVINO IR, and the graph that its CPU plugin runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitedge.artifact import Artifact
from vitedge.errors import InputError, extra_missing
from vitedge.inspect.sources import Read, Source
from vitedge.runtimes import brief
from vitedge.runtimes._openvino_import import import_quietly

_ASK = "OpenVINO's files have neither as one node; name the float ONNX file with --against to read them there"


def open_ir(artifact: Artifact, threads: int) -> tuple[Source, frozenset[str]]:
    """An IR's intermediate values on the CPU, in fp32 where it is float, and the names of its nodes.

    Raises:
        UnavailableError: OpenVINO is not installed.
        InputError: Not a model OpenVINO reads.
    """
    model = read_ir(artifact)
    names = frozenset(
        node.get_friendly_name() for node in model.get_ops() if node.get_type_name() not in ("Constant", "Result", "Parameter")
    )
    side = model.inputs[0].partial_shape[0]
    source = Source(
        artifact,
        side.get_length() if side.is_static else None,
        "",
        functools.partial(_open, artifact, threads),
        missing_norms=_ASK,
        missing_attentions=_ASK,
    )
    return source, names


def read_ir(artifact: Artifact) -> Any:
    """The model of an IR.

    Raises:
        UnavailableError: OpenVINO is not installed.
        InputError: Not a model OpenVINO reads.
    """
    return _trying(artifact, _core().read_model, str(artifact.path))


def compile_ir(artifact: Artifact, model: Any, threads: int) -> Any:
    """A model compiled for the CPU, in fp32 where it is float: bf16 would add noise of its own."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    return _trying(artifact, _core().compile_model, model, "CPU", settings)


def _open(artifact: Artifact, threads: int, names: Sequence[str]) -> Read:
    """`names` are nodes; an empty one is the model's answer."""
    model = read_ir(artifact)
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    places = {"": 0}
    for name in dict.fromkeys(name for name in names if name):
        model.add_outputs([nodes[name].output(0)])
        places[name] = len(model.outputs) - 1
    request = compile_ir(artifact, model, threads).create_infer_request()

    def read(x_BCHW: np.ndarray) -> dict[str, np.ndarray]:
        _trying(artifact, request.infer, x_BCHW)
        # The request overwrites its outputs in the next call.
        return {name: np.array(request.get_output_tensor(places[name]).data) for name in dict.fromkeys(names)}

    return read


@functools.cache
def _core() -> Any:
    try:
        return import_quietly("openvino").Core()
    except ImportError as error:
        raise extra_missing("inspecting an OpenVINO model", "openvino") from error


def _trying(artifact: Artifact, work: Any, *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except RuntimeError as error:
        raise InputError(
            str(artifact.path), expected="a model OpenVINO can run", found=brief(error), fix="check the file, or export it again"
        ) from error
