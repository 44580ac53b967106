"""ONNX Runtime: CPU, CUDA and TensorRT execution providers.

Which kernels run is taken from ONNX Runtime's own profile of one inference, in a process of its own: so
the count is of what ran, after every fusion, and neither time nor memory of the measured session change.
Profile: https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from vitedge.artifact import Artifact, saying_where
from vitedge.errors import InputError, UnavailableError, WorkerError
from vitedge.host import gpus, tool_versions
from vitedge.model_file.onnx_wire import batch_symbol
from vitedge.runtimes import Availability, Facts, Session, Target, brief, check_request, not_runnable, refused, wrong_input

FORMATS = ("onnx",)
HEAVY = "onnxruntime"
EXTRA = None
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

_GPU_FIX = "run: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
_HEAVY_WORDS = ("MatMul", "Gemm", "Conv", "Attention")
_INT8 = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "QGemm", "QAttention"}
# Products whose weights alone are integers: unpacked as they are multiplied, in float unless the file lets it be int8.
_PACKED = {"MatMulNBits", "MatMulBnb4"}
_INT8_ARITHMETIC = 4  # MatMulNBits' `accuracy_level`; it says what is allowed, and no profile says what a kernel took
_FLOATS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_ERROR_LEVEL = 3  # ONNX Runtime's warnings are about its own internals; its errors come as exceptions
_UNKNOWN_SIDE = 224  # pixels, for a model that leaves them free and carries no contract


def available() -> Availability:
    """Version and providers; a GPU provider counts only where there is a GPU."""
    try:
        import onnxruntime
    except ImportError as error:
        return Availability(None, reason=brief(error), fix="run: pip install onnxruntime")
    built = onnxruntime.get_available_providers()
    absent = {}
    for provider in (CUDA, TENSORRT):
        if not gpus():
            absent[provider] = "no NVIDIA GPU with a driver on this host"
        elif provider not in built:
            absent[provider] = f"the installed onnxruntime has no such provider; {_GPU_FIX}"
    providers = tuple(provider for provider in (CPU, CUDA, TENSORRT) if provider in built and provider not in absent)
    return Availability(onnxruntime.__version__, providers, absent=absent)


def refusal(provider: str, precision: str, isa: tuple[str, ...]) -> str:
    """Why a provider cannot run at a float precision; empty where it can."""
    if provider == CPU and precision != "fp32":
        return "ONNX Runtime's CPU provider, which runs float files in fp32 on any processor"
    return ""


def load(artifact: Artifact, target: Target) -> Session:
    """A session on one provider.

    Raises:
        InputError: Not an ONNX model, one that cannot run, or one with another batch than asked.
        UnavailableError: No such provider here, it cannot run at that precision, or it left matrix products to another.
    """
    check_request("onnxruntime", FORMATS, available(), artifact, target)
    why = refusal(target.provider, target.precision, ())
    if why:
        raise refused("onnxruntime", target, why)
    symbol = batch_symbol(artifact.path) if target.batch_size is not None else ""
    session = _open(artifact, target, _options(target, symbol))
    if session.get_providers()[0] != target.provider:
        raise UnavailableError(
            f"runtime onnxruntime ({target.provider})",
            expected=f"a session on {target.provider}",
            found=f"ONNX Runtime fell back to {session.get_providers()[0]}",
            fix="check that CUDA, cuDNN and TensorRT are of the versions this onnxruntime wants, and can be found",
        )
    if target.provider != CPU:
        _check_assignment(session, target)
    _check_ends(artifact, session)
    value = session.get_inputs()[0]
    shape = tuple(side if isinstance(side, int) else None for side in value.shape)
    _check_batch(artifact, target, shape)
    name, outputs = value.name, [session.get_outputs()[0].name]

    def run(x_BCHW: np.ndarray) -> np.ndarray:
        try:
            logits_BC: np.ndarray = session.run(outputs, {name: x_BCHW})[0]
        except _engine_errors() as error:
            raise wrong_input(artifact, shape, x_BCHW, error) from error
        return logits_BC

    return Session(functools.partial(_describe, artifact, target, symbol, shape), shape, run)


@functools.cache
def _engine_errors() -> tuple[type[Exception], ...]:
    """Every exception type of ONNX Runtime; they share no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*kinds, RuntimeError, ValueError, TypeError)


def _options(target: Target, symbol: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERROR_LEVEL
    if target.provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if target.batch_size is not None and symbol:
        options.add_free_dimension_override_by_name(symbol, target.batch_size)
    return options


def providers(target: Target, scheme: str) -> list[tuple[str, dict[str, str]]]:
    """The provider asked for, and what may take the nodes it does not know: shapes, never matrix products."""
    if target.provider == CPU:
        return [(CPU, {})]
    # TF32 keeps 10 bits of mantissa and is on by default: not what a baseline called fp32 may run in.
    cuda = (CUDA, {"use_tf32": "0"})
    if target.provider == CUDA:
        return [cuda, (CPU, {})]
    allowed = {f"trt_{target.precision}_enable": "1"} if target.precision != "fp32" else {}
    if scheme.startswith("int8"):
        allowed["trt_int8_enable"] = "1"
    return [(TENSORRT, allowed), cuda, (CPU, {})]


def _open(artifact: Artifact, target: Target, options: Any) -> Any:
    import onnxruntime

    if target.provider != CPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        return onnxruntime.InferenceSession(os.fspath(artifact.path), options, providers=providers(target, artifact.scheme))
    except _engine_errors() as error:
        raise not_runnable(artifact, "ONNX Runtime", error) from error


def _check_ends(artifact: Artifact, session: Any) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4:
        raise InputError(
            str(artifact.path),
            expected="one image input of rank 4 and one output",
            found=f"inputs {', '.join(f'{value.name} {value.shape}' for value in inputs)}; {len(outputs)} outputs",
            fix="export the model so that it takes a batch of images and answers logits",
        )


def _check_batch(artifact: Artifact, target: Target, shape: tuple[int | None, ...]) -> None:
    if target.batch_size is not None and shape[0] not in (target.batch_size, None):
        raise InputError(
            str(artifact.path),
            expected=f"a model that runs at batch {target.batch_size}",
            found=f"a batch fixed at {shape[0]} when it was exported",
            fix="use the dynamic-batch file, or ask for the batch it has",
        )


def _check_assignment(session: Any, target: Target) -> None:
    """Refuse a session whose matrix products another provider took: that is a fallback, whatever its name says."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # ONNX Runtime before 1.24; `_describe` finds the same in the profile
    nodes = [(node.op_type, group.ep_name) for group in session.get_provider_graph_assignment_info() for node in group.get_nodes()]
    _refuse_elsewhere(nodes, target)


def _refuse_elsewhere(nodes: list[tuple[str, str]], target: Target) -> None:
    elsewhere = Counter(f"{name} on {provider}" for name, provider in nodes if provider != target.provider and _is_heavy(name))
    if elsewhere:
        raise UnavailableError(
            f"runtime onnxruntime ({target.provider})",
            expected=f"every matrix product on {target.provider}",
            found=", ".join(f"{count} {what}" for what, count in elsewhere.most_common(3)),
            fix="run a file whose types this provider has kernels for, such as the fp32 one",
        )


def _is_heavy(operator: str) -> bool:
    return any(word in operator for word in _HEAVY_WORDS)


def _describe(artifact: Artifact, target: Target, symbol: str, shape: tuple[int | None, ...]) -> Facts:
    """What really ran, from a profile of one inference."""
    nodes = _executed(artifact, target, symbol, shape)
    if target.provider != CPU:
        _refuse_elsewhere([(node["op_name"], node["provider"]) for node in nodes], target)
    packed = any(node["op_name"] in _PACKED for node in nodes)
    counts, precision, float_precision = _summarize(nodes, packed_products(artifact.path) if packed else {})
    if target.provider == TENSORRT:  # its engines do not say what is inside: what they were allowed, and the file's own types
        float_precision = target.precision
        precision = "int8" if artifact.scheme.startswith("int8") else target.precision
    elif target.precision != float_precision and counts["float"]:
        raise UnavailableError(
            str(artifact.path),
            expected=f"{target.precision} on {target.provider}",
            found=f"a file whose own type is {float_precision}",
            fix=f"ask for {float_precision}: here the file decides the type",
        )
    if target.provider != CPU:
        counts["elsewhere"] = sum(node["provider"] != target.provider for node in nodes)
    version = tool_versions(["onnxruntime"])["onnxruntime"]
    return Facts("onnxruntime", version, target.provider, precision, float_precision, target.threads, counts)


def _summarize(nodes: list[dict[str, Any]], packed: dict[str, tuple[int, bool]]) -> tuple[dict[str, int], str, str]:
    """Node counts, precision and float precision of a profile's kernel events; `packed` as `packed_products` gives it."""
    names = [node["op_name"] for node in nodes]
    counts = {
        "int8": sum(_is_int8(name) for name in names),
        "float": sum(_is_heavy(name) and not _is_int8(name) and name not in _PACKED for name in names),
        "quantize_left": sum(name in ("QuantizeLinear", "DequantizeLinear") for name in names),
    }
    stored = [packed.get(node["node_name"], packed[""]) for node in nodes if node["op_name"] in _PACKED]
    for bits in sorted({bits for bits, _ in stored}):
        counts[f"int{bits}_weights"] = sum(own == bits for own, _ in stored)
    floats: Counter[str] = Counter()
    for node in nodes:
        if _is_heavy(node["op_name"]):
            kinds = {kind for value in (*node["input_type_shape"], *node["output_type_shape"]) for kind in value}
            floats.update(_FLOATS[kind] for kind in kinds if kind in _FLOATS)
    float_precision = floats.most_common(1)[0][0] if floats else "fp32"
    multiplies_int8 = any(_is_heavy(name) and _is_int8(name) for name in names) or any(allowed for _, allowed in stored)
    return counts, "int8" if multiplies_int8 else float_precision, float_precision


def _is_int8(operator: str) -> bool:
    return operator in _INT8 or operator.startswith("QLinear")


def packed_products(path: Path) -> dict[str, tuple[int, bool]]:
    """Bits of each packed product's weights by node name, and whether it may multiply in int8.

    The entry without a name is for those that ONNX Runtime makes itself of a DequantizeLinear by blocks and a MatMul; they
    get its `session.qdq_matmulnbits_accuracy_level`, which is 4 where nobody sets it.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found: dict[str, tuple[int, bool]] = {}
    for node in graph.node:
        if node.op_type in _PACKED:
            values = {attribute.name: attribute.i for attribute in node.attribute}
            found[node.name] = (values.get("bits", 4), values.get("accuracy_level", 0) == _INT8_ARITHMETIC)
    nibbles = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    made_of_blocks = (4 if any(tensor.data_type in nibbles for tensor in graph.initializer) else 8, True)
    # A product that a fusion renamed is like those of the file, where they are all alike.
    return {"": next(iter(found.values())) if len(set(found.values())) == 1 else made_of_blocks, **found}


def _executed(artifact: Artifact, target: Target, symbol: str, shape: tuple[int | None, ...]) -> list[dict[str, Any]]:
    """The kernels of one inference, as ONNX Runtime's profiler saw them in another process."""
    contract = artifact.contract()
    side = contract.size if contract else _UNKNOWN_SIDE
    free = (target.batch_size or 1, 3, side, side)
    request = {
        "artifact": os.fspath(artifact.path.resolve()),
        "target": [target.provider, target.precision, target.threads, target.batch_size],
        "scheme": artifact.scheme,
        "symbol": symbol,
        "shape": [has or wanted for has, wanted in zip(shape, free, strict=True)],
    }
    folder = Path(tempfile.gettempdir())
    with saying_where(folder), tempfile.TemporaryDirectory(prefix="vitedge-profile-") as temporary:
        failure = _profile_elsewhere(json.dumps(request), temporary)
        found = sorted(Path(temporary).glob("*.json"))
        if failure or not found:
            raise WorkerError(
                str(artifact.path),
                expected="a profile of one inference",
                found=failure or "none",
                fix="check that the file is still there and that memory is free",
            )
        events = json.loads(found[0].read_text(encoding="utf-8"))
    end = "_kernel_time"
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(end)]
    return [{**event["args"], "node_name": event["name"].removesuffix(end)} for event in kernels]


def _profile_elsewhere(request: str, folder: str) -> str:
    """`profile` in a process of its own, so that this one's memory stays what is measured; why it failed, empty where it did not."""
    code = "import sys; from vitedge.runtimes.onnxruntime import profile; profile(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, request, folder],
        cwd=folder,  # `-c` puts it on the path, and a file called numpy.py in the user's folder must not be imported instead of numpy
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return f"exit code {done.returncode}: {last[:200]}" if done.returncode else ""


def profile(request: str, folder: str) -> None:
    """Run one inference under ONNX Runtime's profiler and leave its JSON in `folder`."""
    import onnxruntime

    asked = json.loads(request)
    target = Target(*asked["target"])
    options = _options(target, asked["symbol"])
    options.enable_profiling = True
    options.profile_file_prefix = os.path.join(folder, "profile")
    session = onnxruntime.InferenceSession(asked["artifact"], options, providers=providers(target, asked["scheme"]))
    session.run(None, {session.get_inputs()[0].name: np.zeros(asked["shape"], np.float32)})
    session.end_profiling()
