"""One prune step: score, select, cut, and say what was done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge.compress import Context
from vitedge.compress._prune_budget import budget
from vitedge.compress._prune_cut import cut_, describe
from vitedge.compress._prune_notes import histograms, widths_by_block
from vitedge.compress._prune_scores import Scores, divergence, magnitude, shaped, take_gates_, taylor, weights_per_unit
from vitedge.compress._prune_select import Rule, keep, select
from vitedge.compress._prune_units import Place, find_places, width
from vitedge.errors import UsageError
from vitedge.models.blocks import block_names
from vitedge.models.cost import count
from vitedge.models.gated import gated_layers

if TYPE_CHECKING:
    from vitedge.compress.prune import Config


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
    goal = budget(model, config, context, scores, shape_CHW)
    rule = Rule(config.scope, config.normalize == "layer", config.redistribute, config.multiple, config.minimum)
    before = {place: width(model, place) for place in places}
    selection = select(scores, goal.cost, goal.limit, rule, goal.where, goal.resolution)
    kept = keep(scores, selection.widths)
    found = histograms(scores, kept, {place: weights_per_unit(model, place) for place in places})
    full = count(model, shape_CHW)
    cut_(model, kept)
    left = count(model, shape_CHW)
    notes = {
        "score": config.score,
        "units": list(config.units),
        "images": images,
        goal.where.removeprefix("prune."): {"limit": goal.limit, "reached": selection.cost, **goal.told()},
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
