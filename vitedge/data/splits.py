"""Splitting off a share of every class, the same for the same seed on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


def split_off_by_name(names: Sequence[str], labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of positions 0..N-1 in which every image's side follows from its own name.

    Images added or removed later leave the others where they are, so that what was trained on once is
    never judged on after. A name is split off where its hash, as a number in [0, 1), is below the
    share; every class gives about `share * n` of its n images, at least one and never all (the image
    of the smallest hash moves, or that of the largest); a class of one image gives none.

    Args:
        names: N different names, in any order.
        labels: int64 (N,).
        share: In (0, 1).
        seed: Of the choice.

    Returns:
        Positions kept and positions split off, each ascending; disjoint, together all.
    """
    drawn = np.array([_uniform(f"{seed}/{name}") for name in names])
    chosen = drawn < share
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        positions = positions[np.argsort(drawn[positions], kind="stable")]
        chosen[positions[:1]] = len(positions) > 1
        chosen[positions[-1:]] = False
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _uniform(text: str) -> float:
    """In [0, 1), from the first 53 bits of the text's sha256: all that a float64 holds."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
