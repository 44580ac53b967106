"""Records of measuring: the row that is measured, and the measurement that comes out.

Units are in the names; every measurement carries the conditions it was made under.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vitedge.artifact import Artifact

SCHEMA_VERSION = 1
TAIL_SAMPLES = 3  # samples expected beyond a quantile for it to be given


@dataclass(frozen=True)
class Row:
    """What is loaded into a worker: one file in one runtime.

    Attributes:
        artifact: The file.
        runtime: Name of a module of `vitedge.runtimes`.
        provider: The engine's own name for where it runs.
        precision: Float precision asked for: fp32 | bf16 | fp16.
        threads: Intra-operator threads.
        environment: Variables the process runs under, beside the ones it inherits.
    """

    artifact: Artifact
    runtime: str
    provider: str
    precision: str
    threads: int
    environment: dict[str, str] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Plain data with absolute paths."""
        return {**asdict(self), "artifact": {**asdict(self.artifact), "files": [str(path.resolve()) for path in self.artifact.files]}}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Row:
        """Read `to_plain`'s data back."""
        return cls(**{**plain, "artifact": Artifact.from_plain(plain["artifact"], Path("/"))})


def quantile_ms(samples_ms: list[float], percent: int) -> float | None:
    """The `percent` quantile, linearly interpolated; None where the sample does not support it.

    Supported when at least three samples are expected beyond it, n (1 - q) >= 3: the median from 6
    samples, p90 from 30, p99 from 300. With fewer, p99 would be the maximum under another name.
    """
    count = len(samples_ms)
    if count * (100 - percent) < 100 * TAIL_SAMPLES:
        return None
    ordered = sorted(samples_ms)
    position = (count - 1) * percent / 100
    low = int(position)
    high = min(low + 1, count - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Latency:
    """Time of one inference over all rounds, ms; a quantile is None where the sample is too small for it."""

    mean: float
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, samples_ms: list[float]) -> Latency:
        """Summarize samples."""
        p50, p90, p99 = (quantile_ms(samples_ms, percent) for percent in (50, 90, 99))
        return cls(sum(samples_ms) / len(samples_ms), p50, p90, p99)


@dataclass(frozen=True)
class Verdict:
    """A row against its baseline: fp32 of the same runtime at the same batch size.

    Attributes:
        relation: baseline | faster | same | slower | unknown.
        ratio: Iterations per second over the baseline's, geometric mean over rounds.
        low, high: 95 % interval of `ratio`; None with fewer than two rounds.
        baseline: What it was compared with.
        cause: Likely cause where it is slower, or why there is no verdict.
    """

    relation: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Difference:
    """Top-1 points lost against the reference on the same images, with the paired 95 % interval.

    Attributes:
        broken: Images that the reference has right and this row has not; None in measurements of before this was kept.
        repaired: Images that this row has right and the reference has not.
    """

    points: float
    low: float
    high: float
    reference: str
    broken: int | None = None
    repaired: int | None = None


@dataclass(frozen=True)
class Measurement:
    """One file in one runtime at one batch size.

    Attributes:
        artifact, recipe, sha256: The file; `recipe` is empty for a file vitedge did not make.
        runtime, provider: Where it ran.
        precision: Type of the heavy arithmetic that really ran: fp32 | bf16 | fp16 | int8 | int4.
        float_precision: Type of what stays in float.
        batch_size: Images per inference.
        params_m, macs_g: Millions of weights, 10^9 multiply-accumulates per image; None where not countable.
        size_bytes: On disk, external data included.
        iterations_per_s: Median over rounds of iterations over elapsed seconds.
        images_per_s: That times the batch size.
        latency_ms: Of all rounds together.
        load_ms: Reading, optimizing and compiling the file, median over rounds; the engine's import is not in it.
        first_inference_ms: First inference after loading, median over rounds.
        peak_rss_mib: Highest resident memory of the measuring process, batch sizes measured in
            ascending order, so this and smaller ones; largest of the rounds.
        node_counts: Of the graph the engine ran: `int8`, `float`, `quantize_left`.
        rounds: Per round: iterations, iterations_per_s, p50_ms, warmup_iterations, settled, load_ms, first_inference_ms.
        samples_ms: Every inference's time, a list per round, rounded to 1 microsecond.
        unstable: Why the figures are not to be trusted; empty when they settled.
        emulated: Measured under a profile that is not this host's.
        top1, top5, top1_interval: Percent, with the 95 % Wilson interval; None where not measured.
        top1_reason: Why not, and the command that would.
        top1_images: How many images, and of which split.
        top1_agreement: Percent of images predicted as the reference does.
        top1_drop: Points below the reference.
        answers: What it answered to each image, as `vitedge.bench.answers` packs it; None where top-1 was not measured.
        verdict: Against fp32.
        conditions: Host, threads, versions, load, seed, commit, date.
    """

    artifact: str
    recipe: str
    sha256: str
    runtime: str
    provider: str
    precision: str
    float_precision: str
    batch_size: int
    params_m: float | None
    macs_g: float | None
    size_bytes: int
    iterations_per_s: float
    images_per_s: float
    latency_ms: Latency
    load_ms: float
    first_inference_ms: float
    peak_rss_mib: float
    node_counts: dict[str, int]
    rounds: list[dict[str, Any]]
    samples_ms: list[list[float]]
    unstable: str
    emulated: bool
    verdict: Verdict
    conditions: dict[str, Any]
    top1: float | None = None
    top5: float | None = None
    top1_interval: tuple[float, float] | None = None
    top1_reason: str = ""
    top1_images: str = ""
    top1_agreement: float | None = None
    top1_drop: Difference | None = None
    answers: dict[str, Any] | None = None

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Measurement:
        """Read `to_plain`'s data back, checking every type; keys that are unknown are left out, later fields have their defaults.

        Raises:
            ValueError: It is no measurement; pydantic's, which knows the path of what is wrong.
        """
        made: Measurement = _reader().validate_python(plain)
        return made

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer measurement replaces."""
        return key_of(self.to_plain())


@cache
def _reader() -> Any:
    # A worker that only times has no use for pydantic.
    from pydantic import TypeAdapter

    return TypeAdapter(Measurement)


_KEY = ("artifact", "runtime", "provider", "precision", "float_precision", "batch_size")


def key_of(plain: dict[str, Any]) -> tuple[str, ...]:
    """`Measurement.key` of its plain data. One int8 file can be timed twice in a runtime, by what it leaves in float."""
    return (*(str(plain.get(name)) for name in _KEY), str((plain.get("conditions") or {}).get("device")))


@dataclass(frozen=True)
class Skipped:
    """A row that was not measured, and why; listed, never dropped."""

    artifact: str
    runtime: str
    precision: str
    reason: str
    batch_size: int | None = None
    failed: bool = False
