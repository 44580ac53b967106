"""One run of the training loop: what it is asked, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vitedge.compress import Loss
from vitedge.data import Split
from vitedge.preprocess import Preprocessing
from vitedge.progress import Progress, silent
from vitedge.recipe import TrainConfig
from vitedge.train.processes import Processes


class Log(Protocol):
    """Takes the metrics of a step."""

    def __call__(self, step: int, **metrics: float) -> None:
        """Metrics by name, after `step` steps."""
        ...


@dataclass(frozen=True)
class TrainJob:
    """One run of the loop.

    Attributes:
        config: The recipe's `train` step.
        train, validation: Splits; the test split is never seen here.
        contract: The preprocessing contract.
        num_classes: Classes of the data.
        seed: Of data order, augmentation and drop path.
        processes: This process among the run's.
        folder: Where the resumable state is kept.
        key: Identity of the run; a state of another key is not resumed.
        losses: Terms that techniques add to the loss against the labels.
        on_step: Called with (step, steps) before each optimizer step.
        progress: Told loss, images/s and validation top-1.
        watch: Told the step that the run starts from, returns what takes its metrics; called in process 0.
        keep_last: Whether the model ends with its last weights, not with those that did best on validation.
    """

    config: TrainConfig
    train: Split
    validation: Split
    contract: Preprocessing
    num_classes: int
    seed: int
    processes: Processes
    folder: Path
    key: str
    losses: Sequence[Loss] = ()
    on_step: Sequence[Callable[[int, int], None]] = ()
    progress: Progress = silent
    watch: Callable[[int], Log] | None = None
    keep_last: bool = False


def total_steps(config: TrainConfig, images: int) -> int:
    """Optimizer steps of a run over `images` training images; incomplete last batches are dropped."""
    return config.steps or max(1, math.ceil(config.epochs * images / min(config.batch_size, images)))


@dataclass(frozen=True)
class Trained:
    """What a run left; the model itself holds the best weights, or the last where the job says so.

    Attributes:
        notes: For the manifest: steps, seconds, images_per_s, validation top-1 over the run, conditions.
        last: Weights at the last step (their moving average where there is one), by tensor name, on the CPU.
    """

    notes: dict[str, Any]
    last: dict[str, torch.Tensor]
