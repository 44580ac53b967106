"""A tiny teacher on disk, tiny students, batches of made pixels, and the context of a run on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitedge.compress import Batch, Context
from vitedge.models.build import CheckpointMeta, create, save_checkpoint
from vitedge.preprocess import Preprocessing
from vitedge.train.resize import normalize_batch

LABELS = ("ant", "bee", "cat", "dog")
CONTRACT = Preprocessing(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
TEACHER_CONTRACT = Preprocessing(size=8, mean=(0.4, 0.45, 0.5), std=(0.2, 0.25, 0.3))
IMAGES = 48
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def student(token: bool = True, seed: int = 0) -> Any:
    """A two-block ViT of 16 dimensions for 8 px, with or without a distillation token, whose heads differ."""
    torch.manual_seed(seed)
    model: Any = create("deit_tiny_distilled_patch16_224" if token else "deit_tiny_patch16_224", 8, 4, len(LABELS), options=VIT)
    for name, tensor in model.named_parameters():
        if name.startswith("head"):
            nn.init.normal_(tensor, std=0.3)
    return model


def teacher_model(size: int = 8, seed: int = 1, arch: str = "resnet18") -> nn.Module:
    """A ResNet with a small stem (or a ViT), in eval mode, that tells images apart."""
    torch.manual_seed(seed)
    if arch != "resnet18":
        return create(arch, size, 4, len(LABELS), options=VIT).eval()
    model: Any = create(arch, size, None, len(LABELS), stem="small", options=RESNET)
    nn.init.normal_(model.fc.weight, std=1.0)
    return model.eval()


def write_teacher(
    path: Path, size: int = 8, labels: tuple[str, ...] = LABELS, arch: str = "resnet18", seed: int = 1, contract: str | None = None
) -> Path:
    """Write the teacher as a checkpoint of vitedge and return its path."""
    small = arch == "resnet18"
    meta = CheckpointMeta(
        arch,
        size,
        None if small else 4,
        len(LABELS),
        contract or replace(TEACHER_CONTRACT, size=size).to_json(),
        labels,
        "small" if small else "own",
        RESNET if small else VIT,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, teacher_model(size, seed, arch), meta)
    return path


def context(builds: Path, **changes: Any) -> Context:
    """The context of a run on `IMAGES` images in four classes."""
    made = Context(
        num_classes=len(LABELS),
        labels=LABELS,
        contract=CONTRACT,
        train_images=IMAGES,
        data_digest="made",
        seed=0,
        torch_device="cpu",
        precision="fp32",
        augmentation={"shift": 1},
        views=2,
        builds=builds,
        untouched=student,
        sample=sample,
    )
    return replace(made, **changes)


def sample(count: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Model inputs and classes of the first images, unchanged."""
    taken = batch(range(min(count, IMAGES)), size=size)
    return taken.x_BCHW.numpy(), taken.target.numpy()


def pixels(indices: np.ndarray, view: int, size: int = 8) -> torch.Tensor:
    """Pixels 0..255, float32 BCHW: for each view of each image the same every time."""
    made = [np.random.default_rng((view, int(i))).integers(0, 256, (3, size, size)) for i in indices]
    return torch.from_numpy(np.stack(made)).float()


def batch(indices: Any = range(6), view: int = 0, size: int = 8) -> Batch:
    """A batch of those images."""
    positions = np.asarray(indices, dtype=np.int64)
    pixels_BCHW = pixels(positions, view, size)
    target = torch.from_numpy(positions % len(LABELS))
    return Batch(normalize_batch(pixels_BCHW, CONTRACT), pixels_BCHW, target, positions, view)
