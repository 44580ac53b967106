"""One prune step: score, select, cut, and say what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge.compress import Context
from vitedge.compress._prune_cut import Widths, cut_, describe, trial
from vitedge.compress._prune_notes import histograms, widths_by_block
from vitedge.compress._prune_scores import Scores, divergence, magnitude, shaped, take_gates_, taylor, weights_per_unit
from vitedge.compress._prune_select import Rule, keep, select
from vitedge.compress._prune_units import PER_HEAD, Place, find_places, width
from vitedge.errors import UsageError
from vitedge.models.blocks import block_names
from vitedge.models.cost import ModuleCost, count
from vitedge.models.gated import gated_layers

if TYPE_CHECKING:
    from vitedge.compress.prune import Config

MIB = 2**20


def prune(model: nn.Module, config: Config, context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cut a model in place; returns notes for the manifest, and the structure for a checkpoint.

    Raises:
        UsageError: The model does not fit, has gates that nothing asks for or none that are asked for, or cannot be cut so far.
        InputError: Scores are not finite.
    """
    block_names(model, "prune")
    has_gates = bool(gated_layers(model))
    if has_gates != (config.score == "gates"):
        raise UsageError(
            "prune.score",
            expected="gates, for a model that has them" if has_gates else "a score other than gates, for a model without them",
            found=config.score,
            fix="set score: gates" if has_gates else "put a `gates` step and a `train` step before it, or set another score",
        )
    taken = take_gates_(model, config.units) if has_gates else {}
    places = find_places(model, config.units)
    images: int | None = None
    if has_gates:
        scores = shaped(model, taken, places)
    else:
        scores, images = _scores(model, config, context, places)
    shape_CHW = (3, context.contract.size, context.contract.size)
    where, cost, limit = _budget(model, config, context, scores, shape_CHW)
    rule = Rule(config.scope, config.normalize == "layer", config.redistribute, config.multiple, config.minimum)
    before = {place: width(model, place) for place in places}
    selection = select(scores, cost, limit, rule, where)
    kept = keep(scores, selection.widths)
    found = histograms(scores, kept, {place: weights_per_unit(model, place) for place in places})
    full = count(model, shape_CHW)
    cut_(model, kept)
    left = count(model, shape_CHW)
    notes = {
        "score": config.score,
        "units": list(config.units),
        "images": images,
        where.removeprefix("prune."): {"limit": limit, "reached": selection.cost},
        "threshold": selection.threshold,
        "widths": widths_by_block(before, selection.widths),
        "params": [full.params, left.params],
        "macs": [full.macs, left.macs],
        "histogram": found,
    }
    return notes, describe(selection.widths)


def _scores(model: nn.Module, config: Config, context: Context, places: list[Place]) -> tuple[Scores, int | None]:
    """Scores of units, and the number of images that they come from."""
    if config.score == "magnitude":
        return magnitude(model, places), None
    x_BCHW, target = (torch.from_numpy(array) for array in context.sample(config.images))
    if config.score == "taylor":
        return taylor(model, places, x_BCHW, target), len(x_BCHW)
    return divergence(model, places, x_BCHW, config.group), len(x_BCHW)


def _budget(
    model: nn.Module, config: Config, context: Context, scores: Scores, shape_CHW: tuple[int, int, int]
) -> tuple[str, Callable[[Widths], float], float]:
    """What the cut is to bring down: its setting's name, the cost of widths, and the limit.

    A share of parameters or multiply-accumulates is one of the architecture without any technique; a share of units is one of those
    that the model has.
    """
    if config.target is None:
        parts = {place: score.shape[0] if place[1] in PER_HEAD else 1 for place, score in scores.items()}
        units = sum(score.numel() for score in scores.values())

        def kept_units(widths: Widths) -> float:
            return sum(units * parts[place] for place, units in widths.items())

        return "prune.ratio", kept_units, (1 - config.share) * units

    def measured(read: Callable[[ModuleCost], float]) -> Callable[[Widths], float]:
        return lambda widths: read(count(trial(model, widths), shape_CHW))

    if config.target.mib is not None:
        return "prune.target.mib", measured(lambda cost: cost.bytes / MIB), config.target.mib
    untouched = count(context.untouched(), shape_CHW)
    if config.target.params is not None:
        return "prune.target.params", measured(lambda cost: cost.params), config.target.params * untouched.params
    assert config.target.macs is not None  # one of the three is set
    return "prune.target.macs", measured(lambda cost: cost.macs), config.target.macs * untouched.macs
