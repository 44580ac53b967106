"""A tiny classifier with one layer that int8 ruins, and images that it is right about.

One input channel of `/mlp/fc1` reaches 300 times as far as the others, and its weights are as much smaller: in float
the model answers as it would without that, to rounding. In int8 one step is larger than the other channels' values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from tests import tiny
from vitedge import plugins
from vitedge.data.records import Split
from vitedge.device import QuantizationRules
from vitedge.guard import GuardJob
from vitedge.model_file import open_artifact
from vitedge.quantize import Job
from vitedge.recipe import GuardConfig

HOSTILE, OUTLIER, CHANNEL = "/mlp/fc1/MatMul", 300.0, 3
LAYERS = ("/patch_embed/Conv", HOSTILE, "/mlp/fc2/MatMul", "/head/Gemm")
# The MLP must decide the answer, which the tiny model's sines, of rank two, do not let it.
LOUDER = 4.0
MEAN_LOGITS = (-3.6, -0.7, 2.9, 3.8)  # taken off, so that every class occurs


def write_hostile(path: Path, outlier: float = OUTLIER) -> Path:
    """The model; an outlier of 1 leaves it friendly."""
    model, generator = tiny.tiny_model(), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("norm_weight", "norm_bias"):
            value[CHANNEL] *= outlier
        elif tensor.name in ("fc1_weight", "fc2_weight"):
            value = (generator.normal(size=value.shape) * LOUDER / np.sqrt(len(value))).astype(np.float32)
            if tensor.name == "fc1_weight":
                value[CHANNEL] /= outlier
        elif tensor.name == "head_bias":
            value -= np.array(MEAN_LOGITS, np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def pictures(path: Path, count: int, seed: int) -> Split:
    """Images, uint8 8 x 8, labelled with what the fp32 model answers."""
    import onnxruntime

    generator = np.random.default_rng(seed)
    images = [generator.integers(0, 256, size=(8, 8, 3), dtype=np.uint8) for _ in range(count)]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return Split(images, session.run(None, {"pixels": tiny.CONTRACT(images)})[0].argmax(axis=1).astype(np.int64))


def write_folder(root: Path, split: Split) -> Path:
    """The images as a labelled folder with a train split alone."""
    for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        folder = root / "train" / tiny.LABELS[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:04}.png")
    return root


def guard_job(folder: Path, library: str, scheme: str, limit: dict[str, Any], outlier: float = OUTLIER, **settings: Any) -> GuardJob:
    """A guarded job on the model, 32 calibration images and 200 others to judge on."""
    source = write_hostile(folder / "source.onnx", outlier)
    if (library, scheme) == ("openvino", "int8_static"):
        settings = {"smooth_quant_alpha": None, **settings}  # it would cure the layer
    quantizer = plugins.load("quantize", library)
    job = Job(
        open_artifact(source),
        scheme,
        quantizer.SCHEMES[scheme](**settings),
        QuantizationRules(reduce_range=False),
        tiny.CONTRACT(list(pictures(source, 32, seed=1).images)),
        8,
        folder / "out",
    )
    return GuardJob(job, library, GuardConfig(**limit), pictures(source, 200, seed=2), threads=1)
