"""How many units each place keeps, so that a cost comes down to a limit, and which ones.

Three ways to deal a cut out over the layers, each with one number to turn, how many of all T units are to go:
- global: the lowest scores of all places go;
- layer: the same share of every place goes;
- redistribute: as many of each kind as for layer, but a layer's width is in proportion to the sum of the roots of its units'
  scores, none above the width it has (after NViT, Yang et al. 2021, whose pruned models move dimensions from layer to layer at the
  same total). Roots, for Taylor's score and KL grow with the square of a change.
A place's count is then rounded to the nearest width that is allowed, and the number is the least whose widths keep the limit.

Widths allowed are the full one and multiples of a step: of `multiple` itself for hidden units and channels; of `multiple / gcd(multiple,
heads)` for dimensions of a head, so that those of all heads together are a multiple of `multiple`; of 1 for heads.
Shapes: T units of all places, P places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vitedge.compress._prune_cut import Widths
from vitedge.compress._prune_scores import Scores
from vitedge.compress._prune_units import PER_HEAD, Place
from vitedge.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """How a cut is dealt out.

    Attributes:
        scope: global | layer.
        normalize: Whether the scores of a place are divided by their mean before they are compared with those of others.
        redistribute: Whether layers' widths go by their importance; in the place of scope.
        multiple: What widths are multiples of.
        minimum: Units kept in a place, or in each head of one.
    """

    scope: str = "global"
    normalize: bool = False
    redistribute: bool = False
    multiple: int = 8
    minimum: int = 1


@dataclass(frozen=True)
class Selection:
    """What a cut leaves.

    Attributes:
        widths: Units of each place; of kinds of `PER_HEAD` in each head.
        cost: Of these widths.
        threshold: The highest score that was to go, before rounding, where scores of all places are compared as they are; else None.
    """

    widths: Widths
    cost: float
    threshold: float | None


def select(
    scores: Scores, cost: Callable[[Widths], float], limit: float, rule: Rule, where: str = "prune", resolution: float = 0.0
) -> Selection:
    """The widths of the smallest cut whose cost is within a limit, found by bisection: some 14 costs for 10,000 units.

    The cost may be anything that grows with widths: parameters, multiply-accumulates, a measured latency. One that does not quite, as
    measurements, is still within the limit at the widths that come out.

    Args:
        scores: By place; (U,), or (heads, U) for kinds of `PER_HEAD`.
        cost: Of a model of these widths, all places included.
        limit: What it may be at most.
        rule: How the cut is dealt out.
        where: What an error speaks of.
        resolution: Share of all units by which the cut may be larger than it had to be, for costs that take long: 1/32 takes seven
            of them at most.

    Raises:
        UsageError: The model is within the limit as it is, or is not at the least widths.
    """
    ladder = _Ladder(scores, rule)
    seen: dict[tuple[int, ...], float] = {}

    def judge(removed: int) -> float:
        widths = ladder.widths(removed)
        key = tuple(widths.values())
        if key not in seen:
            seen[key] = cost(widths)
        return seen[key]

    low, high = 0, ladder.total
    if judge(low) <= limit:
        raise UsageError(where, expected=f"a model of more than {limit:.6g}", found=f"one of {judge(low):.6g}", fix="remove the step")
    if judge(high) > limit:
        raise UsageError(
            where,
            expected=f"at most {limit:.6g}",
            found=f"{judge(high):.6g} at the least widths",
            fix="ask for less, add kinds to prune.units, or lower prune.multiple or prune.minimum",
        )
    gap = max(1, math.ceil(resolution * ladder.total))
    while high - low > gap:
        middle = (low + high) // 2
        low, high = (low, middle) if judge(middle) <= limit else (middle, high)
    return Selection(ladder.widths(high), judge(high), ladder.threshold(high))


def keep(scores: Scores, widths: Mapping[Place, int]) -> dict[Place, torch.Tensor]:
    """The units of the highest scores in each place that becomes narrower, sorted; of equals the first. See `_prune_cut.Kept`."""
    kept = {}
    for place, score in scores.items():
        if widths[place] < score.shape[-1]:
            order = torch.sort(score, dim=-1, descending=True, stable=True).indices
            kept[place] = order[..., : widths[place]].sort(dim=-1).values
    return kept


def allowed_width(exact: float, full: int, step: int, minimum: int) -> int:
    """The nearest of the full width and the multiples of `step` below it that are no less than `minimum`; of two the wider."""
    allowed = [width for width in {*range(step, full, step), full} if width >= minimum] or [full]
    nearest: int = min(allowed, key=lambda width: (abs(width - exact), -width))
    return nearest


def deal(total: float, sizes_P: np.ndarray, importance_P: np.ndarray) -> np.ndarray:
    """`total` units dealt out in proportion to importance, float64 (P,), to none more than its size.

    Args:
        total: At most the sum of the sizes.
        sizes_P: Units there are.
        importance_P: Not negative; where all that is left to deal among is 0, sizes take its place.
    """
    dealt_P, taking_P = np.zeros(len(sizes_P)), np.ones(len(sizes_P), dtype=bool)
    while taking_P.any():
        weights = importance_P[taking_P] if importance_P[taking_P].sum() > 0 else sizes_P[taking_P]
        offers = (total - sizes_P[~taking_P].sum()) * weights / weights.sum()
        positions, full = np.flatnonzero(taking_P), offers >= sizes_P[taking_P]
        if not full.any():
            dealt_P[positions] = offers
            break
        dealt_P[positions[full]] = sizes_P[positions[full]]
        taking_P[positions[full]] = False
    return dealt_P


class _Ladder:
    """Widths for every number of units that are to go, from none to all."""

    def __init__(self, scores: Scores, rule: Rule) -> None:
        self.rule, self.places = rule, list(scores)
        self.parts = {place: score.shape[0] if place[1] in PER_HEAD else 1 for place, score in scores.items()}
        flat = [score.double().flatten().numpy() for score in scores.values()]
        self.sizes_P = np.array([len(values) for values in flat])
        self.total = int(self.sizes_P.sum())
        self.importance_P = np.array([np.sqrt(values).sum() for values in flat])
        if rule.normalize:
            flat = [values / values.mean() if values.mean() > 0 else values for values in flat]
        self.scores_T = np.concatenate(flat)
        # Of equal scores those of all places go in turn, not one place after the other.
        turns_T = np.concatenate([np.arange(size) / size for size in self.sizes_P])
        self.order_T = np.lexsort((turns_T, self.scores_T))
        self.owners_T = np.repeat(np.arange(len(flat)), self.sizes_P)[self.order_T]

    @property
    def compares(self) -> bool:
        """Whether scores of one place are compared with those of others."""
        return self.rule.scope == "global" and not self.rule.redistribute

    def threshold(self, removed: int) -> float | None:
        """The highest score of those to go."""
        as_they_are = self.compares and not self.rule.normalize
        return float(self.scores_T[self.order_T[removed - 1]]) if as_they_are and removed else None

    def counts(self, removed: int) -> np.ndarray:
        """Units that each place is to keep, before rounding, float64 (P,)."""
        if self.compares:
            return self.sizes_P - np.bincount(self.owners_T[:removed], minlength=len(self.places)).astype(np.float64)
        share = 1 - removed / self.total
        if not self.rule.redistribute:
            return self.sizes_P * share
        counts_P = np.zeros(len(self.places))
        for kind in {kind for _, kind in self.places}:
            chosen = np.array([place[1] == kind for place in self.places])
            counts_P[chosen] = deal(share * self.sizes_P[chosen].sum(), self.sizes_P[chosen], self.importance_P[chosen])
        return counts_P

    def widths(self, removed: int) -> Widths:
        """What is left of each place, rounded."""
        rule = self.rule
        widths: Widths = {}
        exact = dict(zip(self.places, self.counts(removed), strict=True))
        full = {place: int(size) // self.parts[place] for place, size in zip(self.places, self.sizes_P, strict=True)}
        # Heads first: a step of the dimensions of a head depends on how many heads are left.
        for place in sorted(self.places, key=lambda place: place[1] != "heads"):
            step = 1 if place[1] == "heads" else rule.multiple
            if place[1] in PER_HEAD:
                step = rule.multiple // math.gcd(rule.multiple, widths.get((place[0], "heads"), self.parts[place]))
            widths[place] = allowed_width(exact[place] / self.parts[place], full[place], step, rule.minimum)
        return {place: widths[place] for place in self.places}
