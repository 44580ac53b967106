"""OpenVINO: CPU, GPU, NPU and AUTO devices; opens its own IR and ONNX files.

Left alone it picks the float precision itself (bf16 on a processor with AMX), so the one asked for is
set and read back. Types of what really runs are taken from the compiled graph.
Properties: https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import Any

import numpy as np

from vitedge.artifact import Artifact
from vitedge.errors import InputError, UnavailableError
from vitedge.host import isa_flags, tool_versions
from vitedge.runtimes import Availability, Facts, Session, Target, brief, check_request, refused, wrong_input
from vitedge.runtimes._openvino_import import import_quietly

FORMATS = ("openvino", "onnx")
HEAVY = "openvino"
EXTRA = "openvino"

_DEVICES = ("CPU", "GPU", "NPU")
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
_INT8 = ("i8", "u8")
_BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4}
_HEAVY_LAYERS = {"FullyConnected", "MatMul", "Convolution", "GroupConvolution", "MHA", "ScaledDotProductAttention", "QKVProjection"}
_MOVES = {"Convert", "Multiply", "Subtract", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "VariadicSplit"}
_BF16_ISA = {"avx512_bf16", "amx_bf16"}


def available() -> Availability:
    """Version and devices; AUTO is there wherever a device is."""
    version = tool_versions(["openvino"]).get("openvino")
    if version is None:
        return Availability(None, reason="the package openvino is not installed", fix="run: pip install 'vitedge[openvino]'")
    try:
        devices = list(_core().available_devices)
    except (ImportError, RuntimeError) as error:
        return Availability(None, reason=brief(error), fix="reinstall it: pip install --force-reinstall openvino")
    if "GPU" not in devices and any(device.startswith("GPU.") for device in devices):
        devices.append("GPU")  # OpenVINO's alias of GPU.0 where there are several
    absent = {device: f"OpenVINO finds no {device} device on this host" for device in _DEVICES if device not in devices}
    return Availability(version, (*devices, "AUTO"), absent=absent)


def refusal(provider: str, precision: str, isa: tuple[str, ...]) -> str:
    """Why a device cannot run at a float precision; empty where it can.

    OpenVINO claims bf16 also under `ONEDNN_MAX_CPU_ISA=AVX2`, and then fails to compile.
    """
    if provider == "AUTO":
        return ""
    offered = _core().get_property(provider, "OPTIMIZATION_CAPABILITIES")
    if precision.upper() not in offered:
        return f"OpenVINO says this {provider} offers {', '.join(offered)}"
    if provider == "CPU" and precision == "bf16":
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
        if not _BF16_ISA & set(isa):
            return f"a processor without {' or '.join(sorted(_BF16_ISA))}"
        if limit and not any(word in limit.upper() for word in ("BF16", "AMX", "FP16", "ALL", "DEFAULT")):
            return f"ONEDNN_MAX_CPU_ISA={limit} in the environment"
    return ""


def load(artifact: Artifact, target: Target) -> Session:
    """A session on one device.

    Raises:
        InputError: Not a model OpenVINO reads or compiles, or one with another batch than asked.
        UnavailableError: No such device here, or it does not run at that precision.
    """
    check_request("openvino", FORMATS, available(), artifact, target)
    why = refusal(target.provider, target.precision, isa_flags())
    if why:
        raise refused("openvino", target, why)
    compiled = _compile(artifact, target)
    properties = _read_back(compiled, target)
    got = properties["precision"]
    if got != target.precision:
        raise refused("openvino", target, f"OpenVINO chose {got}")
    port = compiled.inputs[0]
    shape = tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
    request = compiled.create_infer_request()

    def run(x_BCHW: np.ndarray) -> np.ndarray:
        if x_BCHW.dtype != np.float32:  # OpenVINO would convert it, and the time for that would be counted
            raise wrong_input(artifact, shape, x_BCHW, TypeError("another type"))
        try:
            # The request owns its output and overwrites it in the next call: the caller gets a copy.
            return np.array(request.infer(x_BCHW, share_inputs=True, share_outputs=True)[0])
        except RuntimeError as error:
            raise wrong_input(artifact, shape, x_BCHW, error) from error

    return Session(functools.partial(_describe, compiled, artifact, properties), shape, run)


@functools.cache
def _core() -> Any:
    return import_quietly("openvino").Core()


def _settings(target: Target) -> dict[str, Any]:
    """One stream, latency, and the precision and threads asked for."""
    common = {"PERFORMANCE_HINT": "LATENCY"}
    precision = {"INFERENCE_PRECISION_HINT": _HINTS[target.precision]}
    if target.provider == "AUTO":
        cpu = {**precision, "INFERENCE_NUM_THREADS": target.threads, "NUM_STREAMS": 1}
        # Without start-up fallback the first inferences run on the device chosen, not on the CPU meanwhile.
        inner = {device: cpu if device == "CPU" else precision for device in _core().available_devices}
        return {**common, "ENABLE_STARTUP_FALLBACK": False, "DEVICE_PROPERTIES": inner}
    if target.provider == "CPU":
        return {**common, **precision, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": target.threads}
    return {**common, **precision}


def _compile(artifact: Artifact, target: Target) -> Any:
    path = str(artifact.path)
    try:
        model = _core().read_model(path)
    except RuntimeError as error:
        raise InputError(path, expected="a model OpenVINO reads", found=brief(error), fix="check the file, or export it again") from error
    ends = f"{len(model.inputs)} inputs and {len(model.outputs)} outputs"
    if len(model.inputs) != 1 or len(model.outputs) != 1 or model.inputs[0].partial_shape.rank.get_length() != 4:
        raise InputError(
            path,
            expected="one image input of rank 4 and one output",
            found=ends,
            fix="export the model so that it takes a batch of images and answers logits",
        )
    try:
        _fix_batch(model, artifact, target)
        return _core().compile_model(model, target.provider, _settings(target))
    except RuntimeError as error:
        raise InputError(
            path,
            expected=f"a model OpenVINO compiles for {target.provider}",
            found=brief(error),
            fix="use another file, or another runtime",
        ) from error


def _fix_batch(model: Any, artifact: Artifact, target: Target) -> None:
    if target.batch_size is None:
        return
    shape = model.inputs[0].partial_shape
    if shape[0].is_static:
        if shape[0].get_length() != target.batch_size:
            raise InputError(
                str(artifact.path),
                expected=f"a model that runs at batch {target.batch_size}",
                found=f"a batch fixed at {shape[0].get_length()} when it was exported",
                fix="use the dynamic-batch file, or ask for the batch it has",
            )
        return
    shape[0] = target.batch_size
    model.reshape(shape)


def _read_back(compiled: Any, target: Target) -> dict[str, Any]:
    """Provider, precision and threads that the compiled model says it has.

    Raises:
        UnavailableError: It runs on another device than the one asked for.
    """
    device = str(compiled.get_property("EXECUTION_DEVICES")[0]).strip("()")
    if target.provider == "AUTO":
        properties = compiled.get_property("DEVICE_PROPERTIES")[device]
        read = properties.get
    else:
        if device.partition(".")[0] != target.provider.partition(".")[0]:
            raise UnavailableError(
                f"runtime openvino ({target.provider})",
                expected=f"a model on {target.provider}",
                found=f"one on {device}",
                fix="name that device in the profile",
            )
        read = compiled.get_property
    hint = read("INFERENCE_PRECISION_HINT").get_type_name()
    return {
        "provider": f"AUTO:{device}" if target.provider == "AUTO" else target.provider,
        "precision": _TYPES.get(hint, hint),
        "threads": int(read("INFERENCE_NUM_THREADS")) if device == "CPU" else 0,  # only a CPU has them
        # Activations that meet packed weights in fp32 are rounded to int8 by groups of so many; 32 unless the file says 0.
        "rounds_activations": device == "CPU" and hint == "f32" and int(read("DYNAMIC_QUANTIZATION_GROUP_SIZE") or 0) > 0,
    }


def _describe(compiled: Any, artifact: Artifact, properties: dict[str, Any]) -> Facts:
    """What really runs, from the graph the device executes.

    OpenVINO fuses attention, or a small MLP, into one `Subgraph` layer and tells one type for all of it: there a
    product counts as int8 where the file quantizes both of its inputs, and as float where it does not.
    """
    from_file = _core().read_model(str(artifact.path))
    types = {node.get_friendly_name(): node.get_type_name() for node in from_file.get_ops()}
    int8_products = {node.get_friendly_name() for node in from_file.get_ops() if _has_quantized_inputs(node)}
    hint = _HINTS.get(properties["precision"], "f32")
    kinds: list[str] = []
    quantizers = 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        layer, kind = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        if layer in _HEAVY_LAYERS:
            kinds.append(_packed_weights(node) or kind)
        elif layer == "FakeQuantize":
            quantizers += 1
        elif layer == "Subgraph":
            names = info["originalLayersNames"].astype(str).split(",")
            products = [name for name in names if types.get(name) == "MatMul"]
            kinds += ["i8" if name in int8_products else kind if kind in _TYPES else hint for name in products]
    counts = {
        "int8": sum(kind in _INT8 for kind in kinds),
        "float": sum(kind in _TYPES for kind in kinds),
        "quantize_left": quantizers,
    }
    counts |= {kind: count for kind, count in sorted(Counter(kinds).items()) if kind.endswith("_weights")}
    floats = Counter(_TYPES[kind] for kind in kinds if kind in _TYPES)
    float_precision = floats.most_common(1)[0][0] if floats else str(properties["precision"])
    rounds = properties["rounds_activations"] and any(kind.endswith("_weights") for kind in kinds)
    version = tool_versions(["openvino"])["openvino"]
    precision = "int8" if counts["int8"] or rounds else float_precision
    return Facts("openvino", version, properties["provider"], precision, float_precision, properties["threads"], counts)


def _packed_weights(node: Any) -> str:
    """What a layer that unpacks its weights as it multiplies counts as, empty for any other.

    It reads activations in float beside weights that are integers; the type it tells of itself is that of the weights.
    """
    inputs = [value.get_element_type().get_type_name() for value in node.input_values()[:2]]
    packed = len(inputs) == 2 and inputs[0] in _TYPES and inputs[1] in _BITS
    return f"int{_BITS[inputs[1]]}_weights" if packed else ""


def _has_quantized_inputs(node: Any) -> bool:
    return node.get_type_name() == "MatMul" and all(_is_quantized(value.get_node()) for value in node.input_values())


def _is_quantized(node: Any) -> bool:
    """Whether a value is quantized: a FakeQuantize or 8-bit weights, seen through what only moves or scales them."""
    while True:
        kind = node.get_type_name()
        if kind == "Constant":
            return node.get_element_type().get_type_name() in _INT8
        if kind == "FakeQuantize" or kind not in _MOVES:
            return bool(kind == "FakeQuantize")
        node = node.input_value(0).get_node()
