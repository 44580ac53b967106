"""What a cut is to bring down, and what that is at given widths: units, parameters, multiply-accumulates, bytes, or milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from vitedge.compress import Context, Timing
from vitedge.compress._prune_cut import Widths, trial
from vitedge.compress._prune_scores import Scores
from vitedge.compress._prune_units import PER_HEAD
from vitedge.errors import UsageError
from vitedge.models.cost import ModuleCost, count

if TYPE_CHECKING:
    from vitedge.compress.prune import Config

MIB = 2**20
# Share of all units: what is measured takes half a minute a time, so that a latency is looked for in five halvings.
RESOLUTION = 1 / 32


@dataclass(frozen=True)
class Budget:
    """What a cut is to bring down.

    Attributes:
        where: Its setting.
        cost: Of widths.
        limit: What that may be at most.
        resolution: Share of all units by which the cut may be larger than it had to be; 0 for none.
        told: For the notes, of how costs were found; called when the cut is.
    """

    where: str
    cost: Callable[[Widths], float]
    limit: float
    resolution: float = 0.0
    told: Callable[[], dict[str, Any]] = dict


def budget(model: nn.Module, config: Config, context: Context, scores: Scores, shape_CHW: tuple[int, int, int]) -> Budget:
    """The budget that the settings ask for.

    A share of parameters or multiply-accumulates is one of the architecture without any technique; a share of units is one of those
    that the model has.

    Args:
        model: Before the cut.
        config: The settings.
        context: Of the run.
        scores: Of every unit that may go, by place.
        shape_CHW: Of an image.

    Raises:
        UsageError: A latency is asked for where there is no device to time on.
    """
    kept_units = UnitCount(scores)
    if config.target is None:
        return Budget("prune.ratio", kept_units, (1 - config.share) * kept_units.total)

    def counted(read: Callable[[ModuleCost], float]) -> Callable[[Widths], float]:
        return lambda widths: read(count(trial(model, widths), shape_CHW))

    if config.target.latency_ms is not None:
        where = "prune.target.latency_ms"
        if context.latency is None:
            fix = "build the recipe with `vitedge train` or `vitedge export`, or set another target"
            raise UsageError(where, expected="a device that models are timed on", found="none", fix=fix)
        trials = LatencyTrials(model, context.latency, kept_units, shape_CHW)
        return Budget(where, trials, config.target.latency_ms, RESOLUTION, trials.notes)
    if config.target.mib is not None:
        return Budget("prune.target.mib", counted(lambda cost: cost.bytes / MIB), config.target.mib)
    untouched = count(context.untouched(), shape_CHW)
    if config.target.params is not None:
        return Budget("prune.target.params", counted(lambda cost: cost.params), config.target.params * untouched.params)
    assert config.target.macs is not None  # one of the four is set
    return Budget("prune.target.macs", counted(lambda cost: cost.macs), config.target.macs * untouched.macs)


class UnitCount:
    """Counts the units that widths leave.

    Args:
        scores: Of every unit that may go, by place.

    Attributes:
        total: Units of all places.
    """

    def __init__(self, scores: Scores) -> None:
        self._parts = {place: score.shape[0] if place[1] in PER_HEAD else 1 for place, score in scores.items()}
        self.total = sum(score.numel() for score in scores.values())

    def __call__(self, widths: Widths) -> float:
        """Units of all places, those of every head counted."""
        return sum(units * self._parts[place] for place, units in widths.items())


class LatencyTrials:
    """Milliseconds of the model at given widths, each measured on a copy of it, and a note of every copy.

    Which units a copy keeps is left open: how long it takes does not depend on them.

    Args:
        model: Before the cut.
        latency: Times a model.
        kept_units: Counts units.
        shape_CHW: Of an image.
    """

    def __init__(
        self, model: nn.Module, latency: Callable[[nn.Module], Timing], kept_units: UnitCount, shape_CHW: tuple[int, int, int]
    ) -> None:
        self.model, self.latency, self.kept_units, self.shape_CHW = model, latency, kept_units, shape_CHW
        self.taken: list[dict[str, Any]] = []
        self.conditions: dict[str, Any] = {}

    def __call__(self, widths: Widths) -> float:
        """Milliseconds for an image."""
        candidate = trial(self.model, widths)
        cost, timing = count(candidate, self.shape_CHW), self.latency(candidate)
        found = {
            "ratio": round(1 - self.kept_units(widths) / self.kept_units.total, 4),
            "params": cost.params,
            "macs": cost.macs,
            "ms": timing.ms,
            "unstable": timing.unstable,
        }
        self.taken.append(found)
        self.conditions = timing.conditions
        return timing.ms

    def notes(self) -> dict[str, Any]:
        """Every copy that was timed, from the widest to the narrowest, and the conditions of the last."""
        return {"trials": sorted(self.taken, key=lambda found: float(found["ratio"])), "conditions": self.conditions}
