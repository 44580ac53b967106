"""What a technique may know of the run it is part of."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge import plugins
from vitedge.compress import Context
from vitedge.data.sample import labelled_sample
from vitedge.errors import UsageError
from vitedge.models.build import CheckpointMeta
from vitedge.recipe import TrainConfig
from vitedge.train.augment import Augmentation
from vitedge.train.timings import Timings

if TYPE_CHECKING:
    from vitedge.train.steps import CheckpointJob


def technique_context(
    job: CheckpointJob, meta: CheckpointMeta, index: int, torch_device: str, timings: Timings | None = None, origin: nn.Module | None = None
) -> Context:
    """What the technique at `index` of the recipe may know, the `train` steps after it included.

    Args:
        job: The recipe, its data and where it is built.
        meta: Header of its checkpoint.
        index: Of the technique among the recipe's steps.
        torch_device: `cpu` or `cuda`.
        timings: What times models on the device; None where nothing is built for one.
        origin: As `kept_origin` gives it.

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
        origin,
    )


def kept_origin(steps: Sequence[tuple[str, Any]], index: int, model: nn.Module, kept: nn.Module | None) -> nn.Module | None:
    """What the technique at `index` gets as `Context.origin`: a copy made before the first of the techniques that follow each other.

    Args:
        steps: The recipe's.
        index: Of the step that is to act next.
        model: As it is now.
        kept: What this gave for the step before.
    """
    if index and not isinstance(steps[index - 1][1], TrainConfig):
        return kept
    row = itertools.takewhile(lambda step: not isinstance(step[1], TrainConfig), steps[index:])
    return copy.deepcopy(model) if any(looks_back(name, config) for name, config in row) else None


def looks_back(name: str, config: Any) -> bool:
    """Whether a technique compares with the model as it was before the techniques in front of it."""
    technique = plugins.load("compress", name)
    return hasattr(technique, "looks_back") and bool(technique.looks_back(config))


def _untouched(meta: CheckpointMeta) -> nn.Module:
    """The architecture with random weights; torch's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        return meta.create()


def refuse_untaught(steps: Sequence[tuple[str, Any]], index: int, name: str, ended: Sequence[str]) -> None:
    """A technique that takes what another one left to be trained needs a `train` step in between.

    Args:
        steps: The recipe's.
        index: Of the technique among them.
        name: The technique's.
        ended: Techniques that are over with it.

    Raises:
        UsageError: There is none.
    """
    for other in ended:
        began = max(i for i, (earlier, _) in enumerate(steps[:index]) if earlier == other)
        if not any(isinstance(config, TrainConfig) for _, config in steps[began:index]):
            raise UsageError(
                f"steps.{index}",
                expected=f"a `train` step between `{other}` and `{name}`, which takes what it taught",
                found="none",
                fix="put one there",
            )
