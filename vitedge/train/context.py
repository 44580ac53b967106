"""What a technique may know of the run it is part of."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitedge.compress import Context
from vitedge.data.sample import labelled_sample
from vitedge.errors import UsageError
from vitedge.models.build import CheckpointMeta
from vitedge.recipe import TrainConfig
from vitedge.train.augment import Augmentation
from vitedge.train.timings import Timings

if TYPE_CHECKING:
    from vitedge.train.steps import CheckpointJob


def technique_context(job: CheckpointJob, meta: CheckpointMeta, index: int, torch_device: str, timings: Timings | None = None) -> Context:
    """What the technique at `index` of the recipe may know, the `train` steps after it included.

    Raises:
        UsageError: There is no data set.
    """
    following = [config for _, config in job.recipe.steps[index:] if isinstance(config, TrainConfig)]
    config = following[0] if following else TrainConfig()
    augmentation = Augmentation.of(config).plain()
    fixed = all(c.views == config.views and Augmentation.of(c).plain() == augmentation for c in following)
    if job.dataset is None:
        raise UsageError("steps", expected="a data set", found="none", fix="give --data, or set VITEDGE_DATA")
    return Context(
        meta.num_classes,
        meta.labels,
        job.recipe.contract(),
        len(job.dataset.train.labels),
        job.data_digest,
        job.recipe.seed,
        torch_device,
        config.precision,
        augmentation,
        config.views if fixed else 0,
        job.path.parent.parent,
        partial(_untouched, meta),
        partial(labelled_sample, job.dataset, job.recipe.contract(), seed=job.recipe.seed),
        timings,
    )


def _untouched(meta: CheckpointMeta) -> nn.Module:
    """The architecture with random weights; torch's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        return meta.create()
