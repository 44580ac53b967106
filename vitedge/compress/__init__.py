"""Compression techniques, one file each, behind one contract.

A module offers `Config` (a `vitedge.schema.Section`), `files(config, builds) -> list[Path]` (the files whose
contents its result depends on, for the build's key; `builds` is the folder that holds build folders), and
`apply(model, config, context) -> Compressed`. It imports without torch; code that needs torch lies in a
sibling file whose name starts with `_`. In a recipe's `steps:` a technique acts on the model at once, and its
losses and hooks on the `train` steps after it.

A technique whose result is no longer the architecture's own modules also offers `rebuild(model, structure)`, which
gives a newly built model the saved one's modules (not their values): that is how a checkpoint loads without pickle.
One that makes a quantized model offers `scheme(config) -> str`, the name that its exported files carry (`int8_` first
where products run in 8 bits).

One whose result depends on how fast a model runs offers `times(config) -> bool`: the device is then part of the build's key.
One that compares with the model as it was before the techniques in front of it offers `looks_back(config) -> bool`: that model is
then kept for it, as `Context.origin`.
One that makes a step of training longer may offer `step_cost(config) -> float`, about how many times: the estimate of `--dry-run`.

A parameter that a technique adds may carry an attribute `lr_scale: float`: its learning rate is that many times the
schedule's, with any optimizer, layer-wise decay aside; it has no weight decay and AdamW's steps where the rest has Muon's.
`apply` sets it anew in a resumed run, from the same inputs to the same value.
Shapes: B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vitedge.preprocess import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn


@dataclass(frozen=True)
class Batch:
    """Training images of one forward pass, on the device.

    Attributes:
        x_BCHW: Model inputs, float32, by the recipe's preprocessing contract.
        pixels_BCHW: The same images before normalization, float32 in 0..255; what another model is shown.
        target: Classes int64 (B,), or float32 (B, C) where images are mixed.
        indices: int64 (B,), positions in the train split.
        view: Which augmented view of its images this is: the epoch, or the epoch modulo `train.views`.
    """

    x_BCHW: torch.Tensor
    pixels_BCHW: torch.Tensor
    target: torch.Tensor
    indices: np.ndarray
    view: int


class Loss(Protocol):
    """A technique's term of the training loss.

    Attributes:
        label_share: What the loss against the labels is multiplied by when this term is added (1 leaves it whole).
    """

    label_share: float

    def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """One value per image, float32 (B,), weight included; `outputs` is what the model returned in training mode."""
        ...


@dataclass(frozen=True)
class Timing:
    """How long a model takes for one image on the device that is built for.

    Attributes:
        ms: Milliseconds of an inference at batch 1, exported to float; the median of the rounds' medians.
        conditions: Plain data: device, runtime, provider, precision, threads, whether the device is `emulated`, versions.
        unstable: Why the figure is not to be trusted; empty when it settled.
    """

    ms: float
    conditions: dict[str, Any]
    unstable: str = ""


@dataclass(frozen=True)
class Context:
    """What a technique may know of the run.

    Attributes:
        num_classes: Classes of the data.
        labels: Their names, in output order.
        contract: The preprocessing contract.
        train_images: Images of the train split.
        data_digest: Identity of the data and its split.
        seed: The recipe's.
        torch_device: `cpu` or `cuda`.
        precision: Autocast type of the next `train` step: `fp32` | `bf16` | `fp16`.
        augmentation: Plain data that, with the seed, says what every augmented view looks like; of the next `train` step.
        views: `train.views`, how many views each image has, where that and the augmentation are the same in all
            `train` steps to come; else 0, as for a new view every epoch.
        builds: The folder that holds build folders.
        untouched: `untouched()` gives the architecture as it is without any technique, with random weights: what relative
            targets count from.
        sample: `sample(count)` gives so many train images as model inputs, float32 (count, C, H, W), not augmented, and
            their classes int64 (count,); the same ones whenever it is asked. Never of validation or test.
        latency: `latency(model)` gives the time that a float model takes on the device; the model stays as it is, and a run that is
            resumed is told the same again. None where nothing is built for a device, as in a preview.
        origin: The model as it was loaded or last trained, before the techniques in front of this one; for one that `looks_back`,
            else None. It stays as it is.
    """

    num_classes: int
    labels: tuple[str, ...]
    contract: Preprocessing
    train_images: int
    data_digest: str
    seed: int
    torch_device: str
    precision: str
    augmentation: dict[str, Any]
    views: int
    builds: Path
    untouched: Callable[[], nn.Module]
    sample: Callable[[int], tuple[np.ndarray, np.ndarray]]
    latency: Callable[[nn.Module], Timing] | None = None
    origin: nn.Module | None = None


@dataclass(frozen=True)
class Compressed:
    """What a technique made of a model.

    Attributes:
        model: The model, changed in place or a new one.
        notes: For the manifest.
        losses: Terms that following `train` steps add.
        on_step: Called with (step, steps) before each of their optimizer steps.
        convert: Called on the model after them; returns the model that is saved.
        structure: Called on the model that is saved; gives plain data from which `rebuild` makes its modules again.
            None where the architecture's own modules are all there is.
        ends: Names of techniques that are over with this one: it took what they left in the model, and their losses and
            hooks, `convert` and `structure` count no more.
        keeps_last: Whether the `train` steps that follow end with their last weights, not with those that did best on validation:
            where learning costs accuracy on purpose, the best would be the ones that learned the least.
    """

    model: nn.Module
    notes: dict[str, Any] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    on_step: Callable[[int, int], None] | None = None
    convert: Callable[[nn.Module], nn.Module] | None = None
    structure: Callable[[nn.Module], dict[str, Any]] | None = None
    ends: tuple[str, ...] = ()
    keeps_last: bool = False
