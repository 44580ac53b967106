"""How much each unit matters: by its weights' size, their gradient, what the model answers without it, or its gate.

Scores are float64 on the CPU, not negative, one for each unit: (U,), or (H, K) and (H, V) for dimensions of heads.
Shapes: B batch, C classes, H heads, K and V dimensions of one, U units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.compress._prune_units import PER_HEAD, STREAM, Place, readers, unit_sums, width
from vitedge.errors import InputError, UsageError
from vitedge.models.evaluating import evaluating
from vitedge.models.gated import OPEN, READERS, Gate, gated_layers, skip_gate, ungate_

BATCH = 32  # images of one forward pass
Scores = dict[Place, torch.Tensor]


def weights_per_unit(model: nn.Module, place: Place) -> torch.Tensor:
    """How many weights each unit has, in the shape of its scores."""
    return unit_sums(model, place, lambda weight: torch.ones_like(weight, dtype=torch.float64)).detach().cpu()


def magnitude(model: nn.Module, places: Sequence[Place]) -> Scores:
    """Root of the mean square of each unit's weights: units of any kind, of few weights or many, on one scale."""
    found = {}
    for place in places:
        squares = unit_sums(model, place, lambda weight: weight.detach().double().square()).cpu()
        found[place] = (squares / weights_per_unit(model, place)).sqrt()
    return found


def taylor(model: nn.Module, places: Sequence[Place], x_BCHW: torch.Tensor, target: torch.Tensor) -> Scores:
    """`(sum_b dL/dw_b w_b)^2` over the weights w of each unit, the mean over batches of `BATCH` images.

    The square of the first-order change of the loss L, cross-entropy on the labels, when the unit goes (Molchanov et al. 2019,
    "Importance Estimation for Neural Network Pruning", equation 8, for groups of weights; Yang et al. 2021, NViT). The model answers
    as it does outside of training.

    Args:
        model: Its gradients are left as they were.
        places: Where units are scored.
        x_BCHW: Calibration images as model inputs.
        target: Their classes, int64 (B,).

    Raises:
        InputError: A gradient is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = [*zip(x_BCHW.split(BATCH), target.split(BATCH), strict=True)]
    found: Scores = {}
    with evaluating(model), torch.enable_grad():
        for x, y in batches:
            loss = F.cross_entropy(model(_like(x, model)), y.to(parameters[0].device))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            changes = {id(w): w.detach().double() * g.double() for w, g in zip(parameters, gradients, strict=True)}
            for place in places:
                score = unit_sums(model, place, lambda weight, changes=changes: changes[id(weight)]).square().cpu()  # type: ignore[misc]
                found[place] = found.get(place, torch.zeros_like(score)) + score / len(batches)
    return _finite(found)


def divergence(model: nn.Module, places: Sequence[Place], x_BCHW: torch.Tensor, group: int) -> Scores:
    """`sum_i KL(p_i || q_i)` over images i, where q is the answer of the model and p that of the model without the unit.

    Yu and Wu 2021, "A Unified Pruning Framework for Vision Transformers" (arXiv:2111.15127). Units are left out in groups of a place,
    of alike magnitude, each group in its turn; what a group costs is shared among its units by the squares of their magnitudes. Heads
    are left out one by one.

    Args:
        model: Its weights are left as they were.
        places: Where units are scored.
        x_BCHW: Calibration images as model inputs.
        group: Units left out at once; 1 is the equation as it stands.

    Raises:
        InputError: An answer is not finite.
    """
    magnitudes = magnitude(model, places)
    found: Scores = {}
    with evaluating(model), torch.no_grad():
        full_BC = _log_probabilities(model, x_BCHW)
        for place in places:
            size = magnitudes[place].flatten()
            score = torch.zeros_like(size)
            for units in size.argsort(stable=True).split(1 if place[1] == "heads" else group):
                with _without(model, place, units):
                    pruned_BC = _log_probabilities(model, x_BCHW)
                cost = (pruned_BC.exp() * (pruned_BC - full_BC)).sum().clamp(min=0)  # rounding can leave it just below
                squares = size[units].square()
                total = squares.sum()
                score[units] = cost * (squares / total if total > 0 else torch.full_like(squares, 1 / len(units)))
            found[place] = score.reshape(magnitudes[place].shape)
    return _finite(found)


def take_gates_(model: nn.Module, kinds: Sequence[str]) -> Scores:
    """The scores |a| of the gates in a model, flat (U,), all gates then folded into the weights, in place.

    Where soft gates' units are about to be cut, those that are kept are wholly open.

    Args:
        model: A model with gates.
        kinds: Units to be cut.

    Raises:
        UsageError: Units of such a kind have no gates.
    """
    gates: dict[Place, Gate] = {}
    for name, layer in gated_layers(model).items():
        gates |= {(name.removesuffix(f".{READERS[kind]}"), kind): gate for kind, gate in layer.gates.items()}
    shared = skip_gate(model)
    if shared is not None:
        gates[STREAM] = shared
    there = {kind for _, kind in gates}
    for kind in kinds:
        if kind not in there:
            raise UsageError(
                "prune.units",
                expected=f"units that have gates: {', '.join(sorted(there))}",
                found=kind,
                fix=f"add {kind} to gates.where, or leave it out of prune.units",
            )
    found = {place: gate.importance() for place, gate in gates.items() if place[1] in kinds}
    with torch.no_grad():
        for (_, kind), gate in gates.items():
            if gate.soft and kind in kinds:
                gate.a.fill_(OPEN)
    ungate_(model)
    return _finite(found)


def shaped(model: nn.Module, scores: Scores, places: Sequence[Place]) -> Scores:
    """Flat scores in the order and the shapes of these places."""
    return {
        place: scores[place].reshape(width(model, (place[0], "heads")), -1) if place[1] in PER_HEAD else scores[place] for place in places
    }


def _log_probabilities(model: nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
    """log softmax of the answers, float64 (B, C), on the CPU."""
    logits = [model(_like(x, model)).double().cpu() for x in x_BCHW.split(BATCH)]
    return F.log_softmax(torch.cat(logits), dim=-1)


def _like(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    parameter = next(model.parameters())
    return x.to(device=parameter.device, dtype=parameter.dtype)


@contextlib.contextmanager
def _without(model: nn.Module, place: Place, units: torch.Tensor) -> Iterator[None]:
    """The model as if these units were gone; their weights come back afterwards."""
    parts: list[Any] = [(tensor, axis, index.to(tensor.device)) for tensor, axis, index in readers(model, place, units)]
    kept = [tensor.index_select(axis, index) for tensor, axis, index in parts]
    try:
        for tensor, axis, index in parts:
            tensor.index_fill_(axis, index, 0)
        yield
    finally:
        for (tensor, axis, index), values in zip(parts, kept, strict=True):
            tensor.index_copy_(axis, index, values)


def _finite(scores: Scores) -> Scores:
    for (block, kind), score in scores.items():
        if not bool(score.isfinite().all()):
            raise InputError(f"prune: {kind} of {block or 'the model'}", expected="finite scores", found="others", fix="check the weights")
    return scores
