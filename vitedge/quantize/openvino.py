"""OpenVINO IR in int8 by NNCF's post-training quantization, calibrated and bias-corrected; or int8 or int4 weights alone.

NNCF: https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
SmoothQuant: Xiao et al. 2023, equation 4; it moves the scale of activation outliers into the weights. NNCF's
default alpha of 0.95 costs a Swin-B 1.6 points and helps others, so it is a recipe's field.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from vitedge.artifact import Artifact, hash_files, writing
from vitedge.errors import VitedgeError, extra_missing
from vitedge.host import tool_versions
from vitedge.model_file import input_spec
from vitedge.model_file.ir_header import LABELS_INFO, PREPROCESSING_INFO
from vitedge.quantize import Job
from vitedge.quantize._fragile import Operation, fragile_products
from vitedge.quantize._openvino_weights import Int4Weights, Int8Weights, compress
from vitedge.quantize._source import batches, calibration_images, matching
from vitedge.recipe import Scheme
from vitedge.runtimes._openvino_import import import_quietly

HEAVY = "nncf"
EXTRA = "openvino"
NEEDS_CALIBRATION = ("int8_static",)
TAKES_RANGES: tuple[str, ...] = ()  # SmoothQuant and bias correction need the activations themselves, not only how far they reach


class Int8Static(Scheme):
    """Weights and activations in int8, residual sums and norms in float (NNCF's transformer scheme)."""

    smooth_quant_alpha: float | None = Field(0.95, ge=0, le=1, description="share of outliers moved into the weights; null: none")
    preset: Literal["performance", "mixed"] = Field("performance", description="performance: symmetric activations; mixed: asymmetric")
    exclude: tuple[str, ...] = Field((), description="patterns of node names that stay in float")
    bias_correction: Literal["fast", "full", "off"] = Field("fast", description="shift biases by the mean error that rounding makes")


SCHEMES: dict[str, type[Scheme]] = {"int8_static": Int8Static, "int8_weights": Int8Weights, "int4_weights": Int4Weights}
WEIGHT_BITS = {"int8_static": 8, "int8_weights": 8, "int4_weights": 4}


def quantize(job: Job) -> Artifact:
    """Write `openvino.<scheme>/model.xml` and `.bin` into the job's folder.

    Raises:
        UnavailableError: OpenVINO or NNCF is not installed.
        UsageError: The scheme needs calibration images and there are none, or an exclude pattern matches nothing.
        InputError: Calibration images are unusable.
        GateError: A graph pass changed the model's answers.
        VitedgeError: OpenVINO cannot read the model, or NNCF failed.
        OutputError: The files cannot be written.
    """
    images = calibration_images(job) if job.scheme in NEEDS_CALIBRATION else None
    try:
        openvino, nncf = import_quietly("openvino"), import_quietly("nncf")
    except ImportError as error:
        raise extra_missing(f"scheme openvino.{job.scheme}", "openvino") from error
    settings = job.config.model_dump(mode="json")
    with _library_errors(job), _quietly(nncf):
        if images is None:
            quantized, excluded, found = compress(openvino, nncf, job)
            notes = {"settings": settings, "bytes": found}
        else:
            model = openvino.convert_model(str(job.source.path))
            quantized, excluded = _quantize(nncf, model, images, job)
            notes = {"settings": {**settings, "reduce_range": bool(job.rules.reduce_range)}}
        _describe(quantized, job)
    return _write(job, openvino, quantized, {**notes, "excluded": excluded})


def _quantize(nncf: Any, model: Any, images: np.ndarray, job: Job) -> tuple[Any, list[str]]:
    config: Int8Static = job.config
    excluded = matching([op.get_friendly_name() for op in model.get_ordered_ops()], config.exclude)
    excluded += [name for name in fragile_products(_operations(model)) if name not in excluded]
    alpha = -1.0 if config.smooth_quant_alpha is None else config.smooth_quant_alpha
    advanced = nncf.AdvancedQuantizationParameters(
        # On processors whose 8-bit products saturate, weights keep to 7 bits.
        overflow_fix=nncf.OverflowFix.ENABLE if job.rules.reduce_range else nncf.OverflowFix.DISABLE,
        disable_bias_correction=config.bias_correction == "off",
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha),
    )
    # Statistics are per image: NNCF averages over items, so an item is one image where the model allows it.
    items = batches(images, 1, fixed=input_spec(job.source).batch_size)
    passes = 1 if config.smooth_quant_alpha is None else 2
    quantized = nncf.quantize(
        model,
        nncf.Dataset(_Watched(items, passes, job)),
        preset=nncf.QuantizationPreset(config.preset),
        subset_size=len(items),
        fast_bias_correction=config.bias_correction != "full",
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=excluded) if excluded else None,
        advanced_parameters=advanced,
    )
    return quantized, excluded


def _operations(model: Any) -> dict[str, Operation]:
    """The graph without what is constant."""
    found: dict[str, Operation] = {}
    for op in model.get_ordered_ops():
        sources = [value.get_node().get_friendly_name() for value in op.input_values()]
        inputs = tuple(name for name in sources if name in found)
        if inputs or op.get_type_name() == "Parameter":
            found[op.get_friendly_name()] = Operation(op.get_type_name(), inputs)
    return found


class _Watched:
    """Calibration items that report each time one is taken; NNCF goes over them once per algorithm."""

    def __init__(self, items: list[np.ndarray], passes: int, job: Job) -> None:
        self._items, self._total, self._taken, self._progress = items, passes * len(items), 0, job.progress

    def __iter__(self) -> Iterator[np.ndarray]:
        for item in self._items:
            self._taken += 1
            self._progress(min(self._taken, self._total), self._total, "of the calibration images")
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _describe(model: Any, job: Job) -> None:
    """Store the contract and the labels where `model_file` looks for them, and number unnamed nodes by position.

    OpenVINO names nodes that have no name after a counter of the whole process: the same job would not
    give the same bytes.
    """
    for position, op in enumerate(model.get_ordered_ops()):
        kind, *rest = op.get_friendly_name().split("/")
        if re.fullmatch(r"[A-Z][A-Za-z]*_\d+", kind):
            op.set_friendly_name("/".join([f"{op.get_type_name()}_{position}", *rest]))
    if job.source.preprocessing is not None:
        model.set_rt_info(job.source.preprocessing, list(PREPROCESSING_INFO))
    if job.source.labels:
        model.set_rt_info(json.dumps(list(job.source.labels)), list(LABELS_INFO))


def _write(job: Job, openvino: Any, model: Any, notes: dict[str, Any]) -> Artifact:
    """Write both files under their final name once OpenVINO has compiled and read them."""
    from vitedge.runtimes import Target
    from vitedge.runtimes import openvino as engine

    name = f"openvino.{job.scheme}"
    folder = job.folder / name
    batch_size = input_spec(job.source).batch_size or 1
    with writing(folder) as temporary:
        temporary.mkdir()
        # What stays in float stays fp32: as fp16 it changes neither the .bin of a quantized graph nor its speed.
        openvino.save_model(model, temporary / "model.xml", compress_to_fp16=False)
        _minify(temporary / "model.xml")
        files = (temporary / "model.xml", temporary / "model.bin")
        artifact = Artifact(
            name=name,
            format="openvino",
            scheme=job.scheme,
            files=files,
            sha256=hash_files(files),
            size_bytes=sum(file.stat().st_size for file in files),
            parent=job.source.sha256,
            recipe=job.source.recipe,
            preprocessing=job.source.preprocessing,
            labels=job.source.labels,
            tools=tool_versions(["openvino", "nncf"]),
        )
        facts = engine.load(artifact, Target("CPU", threads=1, batch_size=batch_size)).facts
    notes = {
        "library": "openvino",
        **notes,
        "node_counts": facts.node_counts,
        "size_ratio": job.source.size_bytes / artifact.size_bytes,
    }
    return replace(artifact, files=tuple(folder / file.name for file in files), notes=notes)


def _minify(path: Path) -> None:
    """Drop the indentation of an IR's .xml: 0.1 MB of a DeiT-Ti, and no text in it but between tags."""
    path.write_text(re.sub(r">\s+<", "><", path.read_text(encoding="utf-8")), encoding="utf-8")


@contextlib.contextmanager
def _library_errors(job: Job) -> Iterator[None]:
    """Turn what OpenVINO and NNCF raise into one line."""
    try:
        yield
    except VitedgeError:
        raise
    except Exception as error:  # nncf has its own tree, openvino raises RuntimeError, both let others through
        raise VitedgeError(
            str(job.source.path),
            expected="a model NNCF can quantize",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            fix="exclude the node it names, or export the model with a dynamic batch",
        ) from error


@contextlib.contextmanager
def _quietly(nncf: Any) -> Iterator[None]:
    """NNCF logs, draws bars of its own on stdout, and loads torch, which logs about CUDA; progress is the command line's to draw."""
    nncf.set_log_level(logging.ERROR)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
