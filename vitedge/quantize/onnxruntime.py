"""ONNX Runtime: dynamic int8, static int8 written as QuantizeLinear/DequantizeLinear pairs, and int8 or int4 weights alone.

What differs from the library's plain calls, each measured on DeiT-Ti (results/LOG.md):
GELU is reordered so that the runtime fuses it, the patch embedding becomes a MatMul so that it shrinks and
speeds up with the others, and in the static scheme only products with a constant weight are quantized and
their outputs stay float. By default `quantize_static` also takes Add, Softmax, LayerNormalization ..., which
leaves hundreds of Q/DQ nodes that nothing fuses.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import Field

from vitedge.artifact import Artifact, hash_files, writing
from vitedge.errors import InputError, VitedgeError
from vitedge.graph import strip_metadata
from vitedge.graph._index import constants_to_initializers
from vitedge.graph._run import run_passes
from vitedge.host import tool_versions
from vitedge.model_file import input_spec, write_contract
from vitedge.quantize import Job
from vitedge.quantize._calibrate import activation_ranges, as_library
from vitedge.quantize._fragile import Operation, fragile_products
from vitedge.quantize._onnxruntime_weights import Int4Weights, Int8Weights, store_weights, takes
from vitedge.quantize._ranges import Ranges, describe
from vitedge.quantize._source import batches, calibration_images, example_input, matching
from vitedge.recipe import Scheme

HEAVY = "onnxruntime"
EXTRA = None
NEEDS_CALIBRATION = TAKES_RANGES = ("int8_static",)

OpType = Literal["MatMul", "Gemm", "Conv"]
_PASSES = ("strip_metadata", "fold_weights", "reorder_gelu", "patch_embed_matmul")
_STATIC_PASSES = ("broadcast_bias",)
# The key by which the library is told that a model has been prepared; without it, it logs advice.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")


class Int8Dynamic(Scheme):
    """Weights in int8; activations are quantized by the runtime, with the range each batch has."""

    per_channel: bool | None = Field(None, description="a scale per output channel of a weight; null: as the device wants")
    exclude: tuple[str, ...] = Field((), description="patterns of node names that stay in float")
    op_types: tuple[OpType, ...] = Field(("MatMul", "Gemm"), min_length=1, description="Conv becomes ConvInteger, which is slow")


class Int8Static(Int8Dynamic):
    """Weights and activations in int8, ranges read off calibration images."""

    method: Literal["minmax", "percentile", "entropy"] = Field("percentile", description="how a range is chosen from what was seen")
    percentile: float = Field(99.999, gt=50, le=100, description="share of an activation's values that `percentile` keeps, in percent")
    activation_type: Literal["uint8", "int8"] | None = Field(None, description="null: as the device wants")
    attention: bool = Field(False, description="also quantize products of two activations: scores, and scores with values")


SCHEMES: dict[str, type[Scheme]] = {
    "int8_dynamic": Int8Dynamic,
    "int8_static": Int8Static,
    "int8_weights": Int8Weights,
    "int4_weights": Int4Weights,
}
WEIGHT_BITS = {"int8_dynamic": 8, "int8_static": 8, "int8_weights": 8, "int4_weights": 4}


@dataclass(frozen=True)
class _Prepared:
    """A model ready to be quantized.

    Attributes:
        model: After the graph passes; every node has a name.
        chosen: Names of the nodes to quantize.
        others: Names of the nodes of the same types that stay in float.
        passes: Pass name to the number of things it changed.
    """

    model: onnx.ModelProto
    chosen: list[str]
    others: list[str]
    passes: dict[str, int]


def quantize(job: Job) -> Artifact:
    """Write `model.<scheme>.onnx` into the job's folder.

    Raises:
        UsageError: The scheme needs calibration images and there are none, or an exclude pattern matches nothing.
        InputError: Nothing in the model can be quantized, or calibration images or ranges are unusable, or stored
            ranges are another model's.
        GateError: A graph pass changed the model's answers.
        VitedgeError: ONNX Runtime's quantizer failed.
        OutputError: The file cannot be written.
    """
    is_static = job.scheme in NEEDS_CALIBRATION
    if is_static and job.ranges is None:
        calibration_images(job)  # refused before any work
    config: Int8Dynamic | Int8Weights = job.config
    prepared = _prepare(job, config)
    settings = config.model_dump(mode="json")
    if isinstance(config, Int8Dynamic):
        per_channel = job.rules.per_channel if config.per_channel is None else config.per_channel
        settings |= {"per_channel": per_channel, "reduce_range": bool(job.rules.reduce_range)}
    notes: dict[str, Any] = {"settings": settings}
    try:
        if isinstance(config, Int8Weights):
            notes["bytes"] = store_weights(prepared.model, prepared.chosen, config)
            quantized = prepared.model
        elif is_static:
            settings["activation_type"] = settings["activation_type"] or job.rules.activation_type
            if job.ranges is not None:
                ranges = job.ranges.match(prepared.model, prepared.chosen, str(job.source.path))
            else:
                ranges = _measure(prepared, settings, calibration_images(job), job)
            notes["ranges"] = describe(prepared.model, prepared.chosen, ranges)
            quantized = _static(prepared, settings, ranges)
        else:
            quantized = _dynamic(prepared, settings)
    except VitedgeError:
        raise
    except Exception as error:  # the library raises what it pleases: ValueError, RuntimeError, the engine's own
        raise VitedgeError(
            str(job.source.path),
            expected=f"a model ONNX Runtime can quantize ({job.scheme})",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="exclude the node it names, or export the model again",
        ) from error
    _drop_metadata(quantized, _PREPARED[0], "onnx.infer")
    strip_metadata.apply(quantized)
    contract = job.source.contract()
    if contract is not None:  # the source's own, or the one that was given for a file without
        write_contract(quantized, contract, job.source.labels)
    return _write(job, quantized, notes, prepared)


def _prepare(job: Job, config: Int8Dynamic | Int8Weights) -> _Prepared:
    model = onnx.load(job.source.path)
    constants_to_initializers(model.graph)  # the library looks for weights there only
    for position, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{position}"
    excluded = set(matching([node.name for node in model.graph.node], config.exclude))
    keep_conv = any(node.op_type == "Conv" and node.name in excluded for node in model.graph.node)
    names = [name for name in _PASSES if not (keep_conv and name == "patch_embed_matmul")]
    names += _STATIC_PASSES if job.scheme == "int8_static" else ()
    results = run_passes(model, names, {input_spec(job.source).name: example_input(job)})
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    candidates = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    attention = isinstance(config, Int8Static) and config.attention
    fragile = fragile_products(_operations(model.graph)) if attention else []
    chosen = [
        node.name
        for node in candidates
        if node.op_type in config.op_types
        and node.name not in excluded
        and node.name not in fragile
        and (takes(node, constants) if isinstance(config, Int8Weights) else attention or node.input[1] in constants)
    ]
    if not chosen:
        raise InputError(
            str(job.source.path),
            expected=f"at least one {' or '.join(config.op_types)} with a constant float weight",
            found="none left to quantize",
            fix="check op_types and exclude; a file that is int8 already is not quantized again",
        )
    others = [node.name for node in candidates if node.name not in chosen]
    return _Prepared(model, chosen, others, {name: result.changed for name, result in zip(names, results, strict=True)})


def _operations(graph: onnx.GraphProto) -> dict[str, Operation]:
    """The graph without what is constant; every node has a name, and nodes are sorted."""
    made_by: dict[str, str] = {}
    found: dict[str, Operation] = {}
    given = {value.name for value in graph.input}
    for node in graph.node:
        inputs = tuple(made_by[name] for name in node.input if name in made_by)
        if inputs or given & {*node.input}:
            found[node.name] = Operation(node.op_type, inputs)
            made_by |= dict.fromkeys(node.output, node.name)
    return found


def _dynamic(prepared: _Prepared, settings: dict[str, Any]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    key, value = _PREPARED
    prepared.model.metadata_props.add(key=key, value=value)
    with tempfile.TemporaryDirectory(prefix="vitedge-quantize-") as temporary:
        output = Path(temporary) / "quantized.onnx"
        quantize_dynamic(
            prepared.model,
            output,
            op_types_to_quantize=list(settings["op_types"]) + (["MatMul"] if "Gemm" in settings["op_types"] else []),
            per_channel=settings["per_channel"],
            reduce_range=settings["reduce_range"],
            weight_type=QuantType.QInt8,
            # The library first rewrites Gemm as MatMul + Add under this name.
            nodes_to_exclude=prepared.others + [f"{name}_MatMul" for name in prepared.others],
        )
        return onnx.load(output)


def _measure(prepared: _Prepared, settings: dict[str, Any], images: np.ndarray, job: Job) -> Ranges:
    """Ranges of the activations that the chosen nodes read, over calibration images."""
    chosen = [node for node in prepared.model.graph.node if node.name in set(prepared.chosen)]
    constants = {tensor.name for tensor in prepared.model.graph.initializer}
    watched = {name for node in chosen for name in node.input[:2] if name not in constants}
    # A Conv fuses to integer arithmetic only when its output is quantized too.
    watched |= {node.output[0] for node in chosen if node.op_type == "Conv"}
    items = batches(images, job.batch_size, fixed=input_spec(job.source).batch_size)
    with tempfile.TemporaryDirectory(prefix="vitedge-quantize-") as temporary:
        path = Path(temporary) / "float.onnx"
        onnx.save(prepared.model, path)
        return activation_ranges(path, watched, items, settings["method"], settings["percentile"], job.progress)


def _static(prepared: _Prepared, settings: dict[str, Any], ranges: Ranges) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.shape_inference.infer_shapes(prepared.model)
    quantizer = QDQQuantizer(
        model,
        settings["per_channel"],
        settings["reduce_range"],
        QuantType.QInt8,
        QuantType.QUInt8 if settings["activation_type"] == "uint8" else QuantType.QInt8,
        as_library(ranges),
        prepared.chosen,
        [],
        list(settings["op_types"]),
        {
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            # ARM's S8S8 kernels want a zero point of zero.
            "ActivationSymmetric": settings["activation_type"] == "int8",
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


def _drop_metadata(model: onnx.ModelProto, *keys: str) -> None:
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key not in keys]
    del model.metadata_props[:]
    for key, value in kept:
        model.metadata_props.add(key=key, value=value)


def _write(job: Job, model: onnx.ModelProto, notes: dict[str, Any], prepared: _Prepared) -> Artifact:
    """Write the file under its final name once ONNX Runtime has opened and run it."""
    from vitedge.runtimes import Target
    from vitedge.runtimes import onnxruntime as engine

    path = job.folder / f"model.{job.scheme}.onnx"
    batch_size = input_spec(job.source).batch_size or 1
    with writing(path) as temporary:
        onnx.save(model, temporary)
        artifact = Artifact(
            name=path.name,
            format="onnx",
            scheme=job.scheme,
            files=(temporary,),
            sha256=hash_files([temporary]),
            size_bytes=temporary.stat().st_size,
            parent=job.source.sha256,
            recipe=job.source.recipe,
            preprocessing=job.source.preprocessing,
            labels=job.source.labels,
            tools=tool_versions(["onnxruntime", "onnx"]),
        )
        facts = engine.load(artifact, Target(engine.CPU, threads=1, batch_size=batch_size)).facts
    notes = {
        "library": "onnxruntime",
        **notes,
        "passes": prepared.passes,
        "nodes_chosen": len(prepared.chosen),
        "node_counts": facts.node_counts,
        "size_ratio": job.source.size_bytes / artifact.size_bytes,
    }
    return replace(artifact, files=(path,), notes=notes)
