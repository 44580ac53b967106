"""Weight-only OpenVINO IR by NNCF's weight compression: matrices in int8 or int4, activations left alone; no images.

NNCF: https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/weight-compression.html
Left alone, OpenVINO's CPU plugin rounds the activations that meet packed weights to int8 by groups of 32, in a session
that asks for fp32 too: on noise it took 2 dB off the logits of a DeiT-Ti in int8 weights, on photographs next to nothing. The
file itself can say no, and does unless it is asked for.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx
from pydantic import Field

from vitedge.graph._index import constants_to_initializers
from vitedge.graph._run import run_passes
from vitedge.model_file import input_spec
from vitedge.quantize import Job
from vitedge.quantize._source import example_input, matching
from vitedge.recipe import Scheme

# A matrix that the float file stores once and reads in two ways is stored for each of them: one row of scales cannot serve both.
# NNCF leaves convolutions in 8 bits, whichever are asked for: as a MatMul the patch embedding shrinks like the rest.
_PASSES = ("fold_weights", "patch_embed_matmul")
# Where a plugin looks for settings that a file brings along.
_ROUNDING_INFO = ("runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
_ROUNDING_GROUP = {"float": "0", "int8": "32"}
_SMALLEST_GROUP = 16
_PACKED, _SCALES, _FLOAT = ("i4", "u4", "i8", "u8"), ("f16",), ("f32",)
_LISTED = 8


class Int8Weights(Scheme):
    """Matrices in int8 with a scale per output channel; all arithmetic in float."""

    bits: ClassVar[int] = 8

    symmetric: bool = Field(False, description="false: a zero point beside every scale, for weights that lie to one side of zero")
    arithmetic: Literal["float", "int8"] = Field(
        "float", description="int8: OpenVINO may round activations to 8 bits by groups as it multiplies, as it does if not told"
    )
    exclude: tuple[str, ...] = Field((), description="patterns of node names that stay in float")


class Int4Weights(Int8Weights):
    """Matrices in int4 with a scale per group, the last product in int8; all arithmetic in float."""

    bits: ClassVar[int] = 4

    group_size: Literal[-1, 16, 32, 64, 128] = Field(
        32, description="weights of an output channel that share a scale, fewer where it does not divide the input channels; -1: all"
    )
    ratio: float = Field(1.0, gt=0, le=1, description="share of the weights in int4, those that lose least by it; the rest in int8")
    all_layers: bool = Field(False, description="the last product too; it answers the classes, and is int8 otherwise")


def compress(openvino: Any, nncf: Any, job: Job) -> tuple[Any, list[str], dict[str, Any]]:
    """The model with packed weights.

    Returns:
        The model, the names excluded, and what became of the bytes: `packed_bytes` with zero points, `scale_bytes`,
        `float_bytes`, the largest tensors that stayed in float, how many products have which group, and how many weights were
        `written_out`: those that the source makes of another one's values as it runs.

    Raises:
        UsageError: An exclude pattern matches nothing.
        GateError: A graph pass changed the model's answers.
    """
    config: Int8Weights = job.config
    model, written_out = _as_openvino(openvino, job)
    excluded = matching([op.get_friendly_name() for op in model.get_ordered_ops()], config.exclude)
    kind = f"INT{config.bits}_{'SYM' if config.symmetric else 'ASYM'}"
    settings: dict[str, Any] = {}
    if isinstance(config, Int4Weights):
        settings = {
            "group_size": config.group_size,
            "ratio": config.ratio,
            "all_layers": config.all_layers,
            # A product whose input channels no group of 16 divides gets 8 bits: NNCF's default would fail for all.
            "advanced_parameters": nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=_SMALLEST_GROUP
            ),
        }
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode[kind],
        ignored_scope=nncf.IgnoredScope(names=excluded) if excluded else None,
        **settings,
    )
    compressed.set_rt_info(_ROUNDING_GROUP[config.arithmetic], list(_ROUNDING_INFO))
    return compressed, excluded, {**_bytes(compressed), "written_out": written_out}


def _as_openvino(openvino: Any, job: Job) -> tuple[Any, int]:
    """The source as OpenVINO's model, its patch embedding a MatMul; and how many shared weights it holds once more."""
    source = onnx.load(job.source.path)
    constants_to_initializers(source.graph)
    folded, _ = run_passes(source, _PASSES, {input_spec(job.source).name: example_input(job)})
    with tempfile.TemporaryDirectory(prefix="vitedge-quantize-") as temporary:
        path = Path(temporary) / "float.onnx"
        onnx.save(source, path)
        return openvino.convert_model(str(path)), folded.changed


def _name(constant: Any) -> str:
    """A constant's own name, or whose input it is: OpenVINO names what has none after a counter of the whole process."""
    name = str(constant.get_friendly_name())
    readers = [port.get_node().get_friendly_name() for port in constant.output(0).get_target_inputs()]
    return f"input of {sorted(readers)[0]}" if readers and re.fullmatch(r"Constant_\d+", name) else name


def _bytes(model: Any) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    floats: dict[str, int] = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant":
            continue
        kind, shape = op.get_element_type().get_type_name(), list(op.get_output_shape(0))
        sizes[kind] += op.get_byte_size()
        if kind in _FLOAT:
            floats[_name(op)] = floats.get(_name(op), 0) + op.get_byte_size()
        elif kind in _PACKED and shape[-1] > 1:  # a zero point stands alone along the channels it is for
            groups[f"{kind} by {shape[-1]}" if len(shape) == 3 else f"{kind} by channel"] += 1
    largest = sorted(floats, key=lambda name: (-floats[name], name))[:_LISTED]
    return {
        "packed_bytes": sum(sizes[kind] for kind in _PACKED),
        "scale_bytes": sum(sizes[kind] for kind in _SCALES),
        "float_bytes": sum(sizes[kind] for kind in _FLOAT),
        "largest_in_float": [{"tensor": name, "bytes": floats[name]} for name in largest],
        "products": dict(sorted(groups.items())),
    }
