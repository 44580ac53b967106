"""ONNX Runtime's own calibrators, fed a batch at a time so that memory does not grow with the images.

Handed all images at once, the histogram methods keep every activation of every image
(https://github.com/microsoft/onnxruntime/issues/10503); called once per batch they merge ranges and histograms.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vitedge.errors import InputError
from vitedge.progress import Progress
from vitedge.quantize._ranges import Ranges

METHODS = ("minmax", "percentile", "entropy")


def activation_ranges(
    model_path: Path,
    tensors: Iterable[str],
    items: list[np.ndarray],
    method: str,
    percentile: float,
    progress: Progress,
) -> Ranges:
    """Lowest and highest value of activations, by tensor name; float32 exactly.

    Args:
        model_path: The float model; an augmented copy is written beside it.
        tensors: Names of the activations.
        items: Batches of calibration images.
        method: One of `METHODS`.
        percentile: Share of an activation's values kept by `percentile`, in percent.
        progress: Told of batches.

    Raises:
        InputError: A range is not finite, or no tensor of that name was seen.
    """
    calibrator = _calibrator(model_path, set(tensors), method, percentile)
    input_name = onnx.load(model_path, load_external_data=False).graph.input[0].name
    # The library prints what it does.
    with contextlib.redirect_stdout(io.StringIO()):
        for done, batch in enumerate(items):
            calibrator.collect_data(_reader({input_name: batch}))
            progress(done + 1, len(items), "of the calibration images")
        measured = calibrator.compute_data()
    ranges: Ranges = {}
    for name, data in measured.items():
        low, high = (float(np.asarray(side, np.float32).item()) for side in data.range_value)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(
                f"activation '{name}'",
                expected="a finite range over the calibration images",
                found=f"[{low}, {high}]",
                fix="check the model in float: it overflows",
            )
        ranges[name] = (low, high)
    return ranges


def as_library(ranges: Ranges) -> Any:
    """Ranges as ONNX Runtime's quantizer takes them (`TensorsData`), however they were found."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    return TensorsData(
        CalibrationMethod.MinMax,  # what reads them is told nothing but the two ends
        {name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32)) for name, (low, high) in ranges.items()},
    )


def _reader(feeds: dict[str, np.ndarray]) -> Any:
    """A calibration data reader of one batch."""
    from onnxruntime.quantization import CalibrationDataReader

    class OneBatch(CalibrationDataReader):  # type: ignore[misc]  # the library carries no types
        def __init__(self) -> None:
            self._feeds = iter([feeds])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    return OneBatch()


def _calibrator(model_path: Path, tensors: set[str], method: str, percentile: float) -> Any:
    """One of the library's calibrators, watching these tensors only, ready to collect."""
    from onnxruntime.quantization.calibrate import EntropyCalibrater, MinMaxCalibrater, PercentileCalibrater

    kind = {"minmax": MinMaxCalibrater, "percentile": PercentileCalibrater, "entropy": EntropyCalibrater}[method]

    class Chosen(kind):  # type: ignore[misc, valid-type]
        def select_tensors_to_calibrate(self, model: onnx.ModelProto) -> tuple[set[str], dict[str, Any]]:
            _, infos = super().select_tensors_to_calibrate(model)
            return tensors & set(infos), infos

    settings = {"percentile": percentile} if method == "percentile" else {}
    calibrator = Chosen(model_path, augmented_model_path=str(model_path.with_name("augmented.onnx")), **settings)
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator
