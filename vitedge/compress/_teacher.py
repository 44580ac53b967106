"""A teacher: any checkpoint of vitedge, shown the student's own pixels, without gradient.

Its logits are always rounded to float16, kept on disk or not, so that a run that finds them there is equal
to one that computes them. On a CPU a kernel's sums depend on the batch it is given (0.1 % of a
ResNet's rounded logits differ between batches of 128 and of 13), so there the teacher runs in parts of
one size. Shapes: B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

import copy
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.artifact import digest_of, hash_files
from vitedge.compress import Batch, Context
from vitedge.compress._teacher_cache import open_cache
from vitedge.errors import InputError
from vitedge.models.build import CheckpointMeta, load_checkpoint
from vitedge.preprocess import Preprocessing
from vitedge.train.draws import AUGMENTATION_VERSION
from vitedge.train.resize import normalize_batch
from vitedge.train.validation import AUTOCAST

_CPU_PART = 32  # images; as fast as larger parts, or faster, for convolutions and ViTs at 32 px on a CPU


class Teacher:
    """A trained model that answers for batches of the student's pixels.

    Args:
        model: Any classifier; frozen here.
        contract: Its own preprocessing contract.
        arch: timm's name, for the notes.
        sha256: Of its checkpoint.
        torch_device: `cpu` or `cuda`.
        precision: Autocast type: `fp32` | `bf16` | `fp16`.
    """

    def __init__(self, model: Any, contract: Preprocessing, arch: str, sha256: str, torch_device: str, precision: str) -> None:
        self.contract, self.arch, self.sha256, self.precision = contract, arch, sha256, precision
        self.torch_device = torch.device(torch_device)
        self.model = model.eval().requires_grad_(False).to(self.torch_device, memory_format=torch.channels_last)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits float32 (B, C)."""
        return self.logits(batch.pixels_BCHW).float()

    def logits(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Logits float16 (B, C) of the student's pixels 0..255: the same crop, at the teacher's size and by its mean and std."""
        x_BCHW = pixels_BCHW
        if x_BCHW.shape[-1] != self.contract.size:
            size = (self.contract.size, self.contract.size)
            # Bicubic overshoots at edges; the teacher learned on pixels that end at 0 and 255.
            x_BCHW = F.interpolate(x_BCHW, size=size, mode="bicubic", antialias=True).clamp(0, 255)
        x_BCHW = normalize_batch(x_BCHW, self.contract)
        part = _CPU_PART if self.torch_device.type == "cpu" else len(x_BCHW)
        padding = -len(x_BCHW) % part
        padded_BCHW = torch.cat([x_BCHW, x_BCHW[-1:].expand(padding, -1, -1, -1)])
        padded_BCHW = padded_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(self.torch_device.type, AUTOCAST[self.precision], enabled=self.precision != "fp32"):
            logits = [self.model(x) for x in padded_BCHW.split(part)]
        return torch.cat(logits)[: len(x_BCHW)].half()


class CachedTeacher:
    """A teacher whose logits are kept on disk: only images without complete ones go through the model.

    Args:
        teacher: The teacher.
        context: The run; what decides how each view of each image looks names the file.
    """

    def __init__(self, teacher: Teacher, context: Context) -> None:
        contract, pixels = context.contract.to_json(), [context.data_digest, context.augmentation, context.seed, context.views]
        computed = [teacher.sha256, context.precision, context.torch_device, torch.__version__]
        pixels += [AUGMENTATION_VERSION, *(version(name) for name in ("torchvision", "timm", "numpy", "Pillow"))]
        self.teacher = teacher
        self.cache = open_cache(digest_of(computed, contract, pixels), (context.views, context.train_images, context.num_classes))
        self.notes = self.cache.notes

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits float32 (B, C)."""
        logits_BC, known_B = self.cache.read(batch.view, batch.indices)
        if not known_B.all():
            missing = np.flatnonzero(~known_B)
            pixels_BCHW = batch.pixels_BCHW[torch.from_numpy(missing).to(batch.pixels_BCHW.device)]
            logits_BC[missing] = self.teacher.logits(pixels_BCHW).cpu().numpy()
            self.cache.write(batch.view, batch.indices[missing], logits_BC[missing])
        return torch.from_numpy(logits_BC).to(batch.pixels_BCHW.device).float()


def load_teacher(path: Path, context: Context) -> Teacher:
    """The teacher of a checkpoint, for the run's data, device and precision; leaves torch's random numbers as they were.

    Raises:
        InputError: Not a checkpoint of vitedge, or one of other classes, or of the same in another order.
    """
    sha256 = hash_files([path])
    with torch.random.fork_rng(devices=[]):  # a model is built with random weights first; the student's own must not move
        model, meta = load_checkpoint(path)
    _check_classes(path, meta, context)
    try:
        contract = Preprocessing.from_json(meta.preprocessing)
    except ValueError as error:
        raise InputError(str(path), expected="a checkpoint of vitedge", found=str(error), fix="train the teacher again") from error
    return Teacher(model, contract, meta.arch, sha256, context.torch_device, context.precision)


def own_teacher(model: nn.Module, context: Context) -> Teacher:
    """A copy of the model as it is now, before the techniques and the training to come.

    It is known by its weights and by its answer to one made image: how many tokens are merged, or how
    many landmarks stand for the rest, is in no weight.
    """
    teacher = Teacher(copy.deepcopy(model), context.contract, "self", "", context.torch_device, context.precision)
    size = context.contract.size
    made_BCHW = torch.from_numpy(np.random.RandomState(0).uniform(0, 255, (1, 3, size, size)).astype(np.float32))
    digest = hashlib.sha256()
    for name, tensor in [*teacher.model.state_dict().items(), ("logits", teacher.logits(made_BCHW.to(teacher.torch_device)))]:
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    teacher.sha256 = digest.hexdigest()
    return teacher


def _check_classes(path: Path, meta: CheckpointMeta, context: Context) -> None:
    """Refuse a teacher whose output i is not the data's class i."""
    if meta.labels == context.labels and meta.num_classes == context.num_classes:
        return
    if len(meta.labels) != context.num_classes:
        expected, found = f"the data's {context.num_classes} classes", f"{len(meta.labels)}"
    else:
        index = next(i for i, (theirs, ours) in enumerate(zip(meta.labels, context.labels, strict=True)) if theirs != ours)
        same = set(meta.labels) == set(context.labels)
        expected = f"the data's classes in its order, '{context.labels[index]}' at position {index}"
        found = f"'{meta.labels[index]}' there" + (" (the same classes, in another order)" if same else "")
    raise InputError(
        f"teacher {path}", expected=expected, found=found, fix="train the teacher on this data, or choose another for distill.teacher"
    )
