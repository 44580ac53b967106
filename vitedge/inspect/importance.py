"""How important the units were that pruning kept and removed: weights by score, as the notes of a build's checkpoint keep them.

Luo et al.'s Figure 3, number of parameters against importance score, for each kind of unit of each step that scored them.
Shapes: N bins of a histogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitedge.artifact import MANIFEST, Manifest
from vitedge.errors import InputError

_CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Importance:
    """Weights by the score of the unit they are part of.

    Attributes:
        step: Position in the recipe's `steps`.
        technique: Its name.
        unit: What was scored: `mlp`, `heads` ...
        edges_log10: Of the bins, log10 of the score, float64 (N + 1,), rising.
        params_N: Weights in each bin before the cut, int64.
        kept_N: Those of them that were kept.
        threshold: The score up to which units were removed; None where there is not one for all layers.
        zeros, zeros_kept: Weights of units with a score of 0, which are in no bin, and those of them that were kept.
    """

    step: int
    technique: str
    unit: str
    edges_log10: np.ndarray
    params_N: np.ndarray
    kept_N: np.ndarray
    threshold: float | None
    zeros: int = 0
    zeros_kept: int = 0

    @property
    def params(self) -> int:
        """Weights of all units before the cut."""
        return int(self.params_N.sum()) + self.zeros

    @property
    def kept(self) -> int:
        """Those of them that were kept."""
        return int(self.kept_N.sum()) + self.zeros_kept

    @property
    def removed_percent(self) -> float:
        """Share of the weights that was removed."""
        return 100 * (1 - self.kept / self.params) if self.params else 0.0

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs."""
        edges = [float(edge) for edge in self.edges_log10]
        bins = zip(edges[:-1], edges[1:], self.params_N.tolist(), self.kept_N.tolist(), strict=True)
        return {
            "step": self.step,
            "technique": self.technique,
            "unit": self.unit,
            "threshold": self.threshold,
            "params": self.params,
            "removed": self.params - self.kept,
            "score_0": {"params": self.zeros, "kept": self.zeros_kept},
            "bins": [{"log10_from": low, "log10_to": high, "params": params, "kept": kept} for low, high, params, kept in bins],
        }


def read_importances(folder: Path | None) -> tuple[tuple[Importance, ...], str]:
    """The histograms in the manifest of a build, in the order of its steps; none with the reason why.

    Args:
        folder: The build folder; None for a file outside of one.

    Raises:
        InputError: The manifest is damaged.
    """
    if folder is None:
        return (), "not in a build folder, whose manifest keeps the scores"
    checkpoint = Manifest.load(folder).artifacts.get(_CHECKPOINT)
    if checkpoint is None:
        return (), f"the manifest of {folder.resolve().name} has no {_CHECKPOINT}, whose notes keep the scores"
    found = []
    try:
        for index, step in enumerate(checkpoint.notes.get("steps", ())):
            for technique, notes in step.items():
                histograms = notes.get("histogram", {})
                found += [_read(index, technique, unit, plain, notes.get("threshold")) for unit, plain in histograms.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            str(folder / MANIFEST), expected="histograms of scores with edges, counts and kept", found=str(error), fix="train it again"
        ) from error
    return tuple(found), "" if found else "no step of this build removed anything by score, as `prune` does"


def _read(step: int, technique: str, unit: str, plain: dict[str, Any], threshold: Any) -> Importance:
    """One histogram.

    Raises:
        KeyError, TypeError, ValueError: It is not what it must be.
    """
    edges = np.asarray(plain["edges"], np.float64)
    params_N, kept_N = (np.asarray(plain[key], np.int64) for key in ("counts", "kept"))
    zeros, zeros_kept = int(plain.get("zeros", 0)), int(plain.get("zeros_kept", 0))
    if not (edges.ndim == params_N.ndim == 1 and len(edges) == len(params_N) + 1 == len(kept_N) + 1 > 1):
        raise ValueError(f"{unit}: {edges.shape} edges, {params_N.shape} counts and {kept_N.shape} kept")
    if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
        raise ValueError(f"{unit}: edges that do not rise")
    if not ((kept_N >= 0).all() and (kept_N <= params_N).all() and 0 <= zeros_kept <= zeros):
        raise ValueError(f"{unit}: more kept than there were")
    is_score = isinstance(threshold, (int, float)) and math.isfinite(threshold) and threshold > 0
    return Importance(step, technique, unit, edges, params_N, kept_N, float(threshold) if is_score else None, zeros, zeros_kept)
