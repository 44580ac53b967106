"""Jobs on the tiny model, and one-product models whose int8 answer has a closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests import tiny
from vitedge import plugins
from vitedge.artifact import Artifact
from vitedge.device import QuantizationRules
from vitedge.model_file import open_artifact
from vitedge.quantize import Job

SCHEMES = [(library, scheme) for library in plugins.names("quantize") for scheme in plugins.load("quantize", library).SCHEMES]


def job(folder: Path, library: str, scheme: str, images: np.ndarray | None = None, batch: int | str = "batch", **settings: Any) -> Job:
    """A job on the tiny model; rules such as `reduce_range` are taken out of the settings."""
    rules = {key: settings.pop(key) for key in list(settings) if key == "reduce_range"}
    quantizer = plugins.load("quantize", library)
    source = folder / "source.onnx"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tiny.write_tiny_onnx(source, batch=batch)
    x_BCHW = tiny.images(16) if images is None else images
    return Job(
        open_artifact(source),
        scheme,
        quantizer.SCHEMES[scheme](**settings),
        QuantizationRules(**{"reduce_range": False, **rules}),
        x_BCHW if scheme in quantizer.NEEDS_CALIBRATION or images is not None else None,
        4,
        folder / "out",
    )


def quantize(job: Job, library: str) -> Artifact:
    """Run a job."""
    artifact: Artifact = plugins.load("quantize", library).quantize(job)
    return artifact


def initializers(path: Path) -> dict[str, np.ndarray]:
    """Weights of an ONNX file by name."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
