"""A point of a search: one file of one trial in one runtime, what it costs, what it is worth, and what it misses.

Trials are timed at different moments, so images per second are compared as ratios: every file is timed in turns with one and the
same file of the baseline, its fastest, in the same run, and the ratio is paired over rounds. Sizes are ratios to the
baseline's smallest file, and top-1 is points below its best one on the same validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from vitedge.errors import UsageError

if TYPE_CHECKING:
    from vitedge.device import Device
    from vitedge.study.definition import Constraints

# Objective to the field of a point that it is measured by, and whether more of it is better.
OBJECTIVES: dict[str, tuple[str, bool]] = {"top1": ("top1", True), "images_per_s": ("speed_ratio", True), "mib": ("size_mib", False)}
PointKey = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Point:
    """One file in one runtime.

    Attributes:
        trial: Number of the trial; None for the baseline's files.
        settings: Identity of the recipe that made it, hex.
        artifact, sha256: The file.
        runtime, provider: Where it ran.
        asked: Float precision that the runtime was asked for.
        precision, float_precision: Of the heavy arithmetic that really ran, and of what stays in float.
        size_mib: On disk, MiB, external data included.
        size_ratio: Over the baseline's smallest file.
        images_per_s: Median over rounds; compare `speed_ratio` between trials, not this.
        speed_ratio: Images per second over those of the baseline's fastest file in the same run, geometric mean over rounds.
        speed_low, speed_high: 95 % interval of that ratio; None with one round.
        p50_ms: Median latency, ms; None with too few samples.
        peak_rss_mib: Highest resident memory, MiB.
        top1: Percent of the validation images.
        top1_low, top1_high: Its 95 % Wilson interval.
        top1_drop: Points below the baseline's best file on the same images.
        drop_low, drop_high: Its 95 % interval, paired.
        images: How many images, and of which split.
        unstable: Why the speed is not to be trusted; empty where it settled.
        emulated: Measured under a profile that is not this host's.
        misses: By constraint, how far off it is: above 0 where it is missed.
    """

    trial: int | None
    settings: str
    artifact: str
    sha256: str
    runtime: str
    provider: str
    asked: str
    precision: str
    float_precision: str
    size_mib: float
    size_ratio: float
    images_per_s: float
    speed_ratio: float
    speed_low: float | None
    speed_high: float | None
    p50_ms: float | None
    peak_rss_mib: float
    top1: float
    top1_low: float
    top1_high: float
    top1_drop: float
    drop_low: float
    drop_high: float
    images: str
    unstable: str
    emulated: bool
    misses: dict[str, float]

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Point:
        """Read `to_plain`'s data back; keys that are unknown are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in plain.items() if key in known})

    @property
    def key(self) -> PointKey:
        """Which point it is, whatever was measured."""
        return (self.settings, self.artifact, self.runtime, self.provider, self.asked)

    @property
    def label(self) -> str:
        """For people: `openvino.int8_static in openvino int8+bf16`."""
        rest = "" if self.float_precision in ("fp32", self.precision) else f"+{self.float_precision}"
        return f"{self.artifact} in {self.runtime} {self.precision}{rest}{' (emulated)' if self.emulated else ''}"

    @property
    def inside(self) -> bool:
        """Whether it misses no constraint."""
        return all(miss <= 0 for miss in self.misses.values())

    @property
    def missed(self) -> float:
        """Sum of what it misses; 0 inside the constraints."""
        return sum(miss for miss in self.misses.values() if miss > 0)

    @property
    def gain(self) -> float:
        """How many times as fast, times how many times as small."""
        return self.speed_ratio / self.size_ratio

    def objectives(self, names: Sequence[str]) -> list[float]:
        """What it is worth, by the objectives' names."""
        return [float(getattr(self, OBJECTIVES[name][0])) for name in names]


def limits_of(constraints: Constraints, device: Device, batch_size: int) -> dict[str, float]:
    """The limits by name: the search's and the device's budgets, of two for the same thing the tighter one.

    Raises:
        UsageError: The device limits the latency at batch 1, and the search times another batch.
    """
    limits = {name: float(value) for name, value in constraints.model_dump().items() if value is not None}
    budgets = {
        "max_size_mib": device.budgets.size_mib,
        "max_latency_ms": device.budgets.latency_ms,
        "max_peak_rss_mib": device.budgets.peak_rss_mib,
    }
    for name, budget in budgets.items():
        if budget is not None:
            limits[name] = min(limits.get(name, budget), budget)
    if "max_latency_ms" in limits and batch_size != 1:
        raise UsageError(
            "measure.batch_size",
            expected=f"1, for the latency of at most {limits['max_latency_ms']:g} ms is that of one image",
            found=str(batch_size),
            fix="set it to 1, or take the limit out",
        )
    return limits


def misses_of(limits: dict[str, float], figures: dict[str, float]) -> dict[str, float]:
    """How far a point is from each limit; above 0 where it misses it.

    Top-1 in tens of points, everything else as a share of the limit: 0.1 is a point too low, a tenth too large, or a tenth too slow.

    Args:
        limits: By name, as `Constraints` has them.
        figures: A point's, by the fields' names.
    """
    of = figures
    known: dict[str, Callable[[float], float]] = {
        "max_top1_drop": lambda limit: (of["top1_drop"] - limit) / 10,
        "min_top1": lambda limit: (limit - of["top1"]) / 10,
        "min_speed_ratio": lambda limit: limit / of["speed_ratio"] - 1,
        "min_images_per_s": lambda limit: limit / of["images_per_s"] - 1,
        "max_size_ratio": lambda limit: of["size_ratio"] / limit - 1,
        "max_size_mib": lambda limit: of["size_mib"] / limit - 1,
        "max_latency_ms": lambda limit: of["p50_ms"] / limit - 1,
        "max_peak_rss_mib": lambda limit: of["peak_rss_mib"] / limit - 1,
    }
    return {name: known[name](limit) for name, limit in limits.items()}


def stands_for(points: Sequence[Point]) -> Point:
    """The point that a trial is known to the sampler by: of those inside the constraints the fastest, else the one that misses least.

    All points are kept, and the Pareto set is that of all points; a sampler takes one set of values for each trial.
    """
    return min(points, key=lambda point: (point.missed, -point.speed_ratio, point.size_mib, point.artifact, point.runtime, point.asked))
