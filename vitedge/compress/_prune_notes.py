"""What a cut did, as plain data: widths of each block, and how important the weights were that stayed and went.

Shapes: U units of all places of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vitedge.compress._prune_scores import Scores
from vitedge.compress._prune_units import PER_HEAD, Place

BINS = 40
NARROWEST = 1e-6  # in log10 of a score: what lies closer together is one score


def widths_by_block(before: Mapping[Place, int], after: Mapping[Place, int]) -> dict[str, dict[str, list[int]]]:
    """`[before, after]` by block and kind of unit; the residual stream is under `model`."""
    made: dict[str, dict[str, list[int]]] = {}
    for (block, kind), width in before.items():
        made.setdefault(block or "model", {})[kind] = [width, after[block, kind]]
    return made


def histograms(scores: Scores, kept: Mapping[Place, torch.Tensor], weights: Scores) -> dict[str, dict[str, Any]]:
    """For each kind of unit, how many weights belong to units of which score.

    Args:
        scores: By place.
        kept: Positions along the last axis of what stays; a place that is not in it stays whole.
        weights: How many weights each unit has, in the shape of its scores.

    Returns:
        By kind: `edges` of the bins, in log10 of the score; in each bin `counts` of weights before the cut, and `kept` of them;
        `zeros`, weights of units whose score is 0, which are in no bin, and `zeros_kept` of them.
    """
    return {kind: _histogram(scores, kept, weights, kind) for kind in dict.fromkeys(kind for _, kind in scores)}


def _histogram(scores: Scores, kept: Mapping[Place, torch.Tensor], weights: Scores, kind: str) -> dict[str, Any]:
    places = [place for place in scores if place[1] == kind]
    score_U, weights_U = _flat([scores[place] for place in places]), _flat([weights[place] for place in places])
    kept_U = weights_U * _flat([_mask(scores[place], kept.get(place)) * _heads_kept(scores[place], place, kept) for place in places])
    found_U = score_U > 0
    logs_U = np.log10(score_U[found_U])
    low, high = (float(logs_U.min()), float(logs_U.max())) if len(logs_U) else (0.0, 0.0)
    if high - low < NARROWEST:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    counts, kept_counts = (np.histogram(logs_U, edges, weights=each_U[found_U])[0] for each_U in (weights_U, kept_U))
    return {
        "edges": edges.tolist(),
        "counts": [round(count) for count in counts.tolist()],
        "kept": [round(count) for count in kept_counts.tolist()],
        "zeros": round(float(weights_U[~found_U].sum())),
        "zeros_kept": round(float(kept_U[~found_U].sum())),
    }


def _flat(tensors: list[torch.Tensor]) -> np.ndarray:
    flat: np.ndarray = torch.cat([tensor.double().flatten() for tensor in tensors]).numpy()
    return flat


def _heads_kept(score: torch.Tensor, place: Place, kept: Mapping[Place, torch.Tensor]) -> torch.Tensor:
    """0 for dimensions whose head goes, whatever is kept of the dimensions; (heads, 1), or 1 for what no head has."""
    heads = kept.get((place[0], "heads"))
    if place[1] not in PER_HEAD or heads is None:
        return torch.ones(())
    return torch.zeros(len(score)).scatter_(0, heads.cpu(), 1.0)[:, None]


def _mask(score: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """1 for units that stay, 0 for those that go."""
    if kept is None:
        return torch.ones_like(score)
    return torch.zeros_like(score).scatter_(-1, kept, 1.0)
