"""Made points of a search."""

from __future__ import annotations

from typing import Any

from vitedge.study.point import Point


def make_point(trial: int | None = 0, speed: float = 1.0, size: float = 1.0, top1: float = 90.0, **changes: Any) -> Point:
    """A point that misses nothing, of a baseline of 90 % and 2 MiB."""
    made: dict[str, Any] = {
        "trial": trial,
        "settings": f"settings {trial}",
        "artifact": "model.int8_dynamic.onnx",
        "sha256": f"file {trial}",
        "runtime": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "asked": "fp32",
        "precision": "int8",
        "float_precision": "fp32",
        "size_mib": 2 * size,
        "size_ratio": size,
        "images_per_s": 100 * speed,
        "speed_ratio": speed,
        "speed_low": 0.9 * speed,
        "speed_high": 1.1 * speed,
        "p50_ms": 10 / speed,
        "peak_rss_mib": 80.0,
        "top1": top1,
        "top1_low": top1 - 1,
        "top1_high": top1 + 1,
        "top1_drop": 90.0 - top1,
        "drop_low": 89.0 - top1,
        "drop_high": 91.0 - top1,
        "images": "100 validation images of a data set",
        "unstable": "",
        "emulated": False,
        "misses": {},
    }
    return Point(**{**made, **changes})
