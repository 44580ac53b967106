"""The Pareto set of a search, and its one winner.

A point is in the set where no other is at least as good in every objective and better in one. The winner is one point, chosen by
a rule that is fixed before anything is measured: among the points that miss no constraint, the allowed drop of top-1
among them, the one with the largest product of ratios, times as fast and times as small (`Point.gain`); one whose speed did not
settle only where no other is inside. The largest of many noisy ratios is too large, so the winner is timed once more (`outcome`).
Shapes: N points, K objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitedge.study.point import OBJECTIVES, Point

_CHUNK = 256  # points compared with all others at once, so that memory grows with N, not with N squared


def non_dominated(values_NK: np.ndarray, larger_is_better: Sequence[bool]) -> np.ndarray:
    """Which points no other one dominates, bool (N,); points that are equal do not dominate each other.

    Args:
        values_NK: What each point is worth in each objective.
        larger_is_better: By objective; else less is better.
    """
    values_NK = np.asarray(values_NK, np.float64).reshape(-1, len(larger_is_better))
    signed_NK = values_NK * np.where(larger_is_better, 1.0, -1.0)
    kept_N = np.ones(len(signed_NK), bool)
    for start in range(0, len(signed_NK), _CHUNK):
        chunk_CK = signed_NK[start : start + _CHUNK]
        no_worse_CN = (signed_NK[None, :, :] >= chunk_CK[:, None, :]).all(axis=2)
        better_CN = (signed_NK[None, :, :] > chunk_CK[:, None, :]).any(axis=2)
        kept_N[start : start + _CHUNK] = ~np.any(no_worse_CN & better_CN, axis=1)
    return kept_N


def front(points: Sequence[Point], objectives: Sequence[str]) -> list[Point]:
    """The Pareto set, the largest gain first."""
    if not points:
        return []
    kept = non_dominated(np.array([point.objectives(objectives) for point in points]), [OBJECTIVES[name][1] for name in objectives])
    return sorted((point for point, is_kept in zip(points, kept, strict=True) if is_kept), key=_order)


def choose_winner(points: Sequence[Point]) -> Point | None:
    """The one winner; None where every point misses a constraint."""
    inside = [point for point in points if point.inside]
    return min(inside, key=lambda point: (bool(point.unstable), _order(point))) if inside else None


def _order(point: Point) -> tuple[float, float, float, int, tuple[str, ...]]:
    """The best first; where gains are equal, the higher top-1, the smaller file, the earlier trial (the baseline first)."""
    return (-point.gain, -point.top1, point.size_mib, -1 if point.trial is None else point.trial, point.key)
