"""Splitting off a share of every class, the same for the same seed on every machine."""

from __future__ import annotations

import numpy as np


def split_off(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of positions 0..N-1.

    Every class gives `round(share * n)` of its n images, at least one and never all; a class of one
    image gives none.

    Args:
        labels: int64 (N,).
        share: In (0, 1).
        seed: Of the choice.

    Returns:
        Positions kept and positions split off, each ascending; disjoint, together all.
    """
    # RandomState, not default_rng: NumPy promises its stream never changes (NEP 19), so a model
    # trained today is not tuned on its own training images after an upgrade.
    generator = np.random.RandomState(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(positions))), len(positions) - 1)
        chosen[positions[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
