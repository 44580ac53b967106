"""A recipe small enough to train, export and quantize within seconds."""

from __future__ import annotations

from pathlib import Path

import yaml


def write_recipe(folder: Path, data: Path, validation: float = 0.2, **changes: object) -> Path:
    """`small.yaml`: a two-head, one-block ViT of 64 dimensions at 16 px, trained for 30 steps; an export's time goes by its blocks."""
    content: dict[str, object] = {
        "model": {"arch": "test_vit", "img_size": 16, "patch_size": 8, "weights": "none", "options": {"depth": 1}},
        "data": {"name": str(data), "validation": validation},
        "steps": [{"train": {"steps": 30, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "shift": 1, "checkpoint_every": 5}}],
        "export": {"parity_images": 8},
        "quantize": {
            "calibration": {"images": 24},
            "schemes": ["onnxruntime.int8_dynamic", "onnxruntime.int8_static", "openvino.int8_static"],
        },
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path
