"""Faster, same or slower than fp32 of the same runtime, with an interval, and the likely cause.

Rows are measured in turns, round by round, so that a slow minute of the host hits all of them: the
ratio is paired. Per round r the log ratio is d_r = log(rate_r / baseline rate_r); the ratio given is
exp(mean d) and its 95 % interval exp(mean d -+ t s / sqrt(R)), Student's t with R - 1 degrees of
freedom. Each round is a fresh process, so s holds what differs between processes too, which a
bootstrap over the samples of few processes would leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev

from vitedge.bench.records import Measurement, Verdict

_VNNI = {"avx_vnni", "avx512_vnni", "amx_int8", "neon_dotprod", "neon_i8mm"}
SMALL_MACS_G = 0.1  # below this, what surrounds the matrix products weighs as much as they do


def _t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t, the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def t95(freedom: int) -> float:
    """97.5 % quantile of Student's t, found by bisection."""
    low, high = 1.9, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return high


def paired_ratio(rates: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Ratio of two rates measured in the same rounds, with its 95 % interval; no interval from one round."""
    logs = [math.log(rate / base) for rate, base in zip(rates, baseline, strict=True)]
    center = mean(logs)
    if len(logs) < 2:
        return math.exp(center), None, None
    half = t95(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(center), math.exp(center - half), math.exp(center + half)


def relation(low: float | None, high: float | None) -> str:
    """`same` where the interval covers 1, `unknown` without one."""
    if low is None or high is None:
        return "unknown"
    return "faster" if low > 1 else "slower" if high < 1 else "same"


def find_baseline(
    measurement: Measurement, others: Sequence[Measurement], parents: dict[str, str], schemes: dict[str, str]
) -> Measurement | None:
    """The fp32 row of the same runtime, provider, batch size and recipe; with several, the file it was made from.

    Args:
        measurement: The row to judge.
        others: All rows of the run.
        parents: sha256 of a file to that of the file it was made from.
        schemes: sha256 of a file to its scheme; a quantized file that a runtime ran in fp32 is no baseline.
    """
    place = (measurement.runtime, measurement.provider, measurement.batch_size, measurement.recipe)
    found = [
        m for m in others if m.precision == "fp32" == schemes.get(m.sha256) and (m.runtime, m.provider, m.batch_size, m.recipe) == place
    ]
    if len(found) > 1:
        found = [m for m in found if m.sha256 in (measurement.sha256, parents.get(measurement.sha256))]
    return found[0] if len(found) == 1 else None


def judge(measurements: Sequence[Measurement], parents: dict[str, str], schemes: dict[str, str], isa: Sequence[str]) -> list[Measurement]:
    """Every row with its verdict.

    Args:
        measurements: All rows of one run.
        parents: sha256 of a file to that of the file it was made from.
        schemes: sha256 of a file to its scheme.
        isa: Instruction sets of the host, as `vitedge.host` names them.
    """
    judged = []
    for measurement in measurements:
        baseline = find_baseline(measurement, measurements, parents, schemes)
        if baseline is None:
            verdict = Verdict("unknown", cause=f"this run has not one fp32 row of {measurement.runtime} that it could be compared with")
        elif baseline is measurement:
            verdict = Verdict("baseline", 1.0)
        else:
            ratio, low, high = paired_ratio(_rates(measurement), _rates(baseline))
            said = relation(low, high)
            cause = "one round gives no interval; use --rounds 2 or more" if said == "unknown" else ""
            verdict = Verdict(said, ratio, low, high, f"{baseline.artifact} fp32", cause)
        judged.append(replace(measurement, verdict=verdict))
    return [_with_cause(measurement, judged, schemes.get(measurement.sha256, ""), set(isa)) for measurement in judged]


def _rates(measurement: Measurement) -> list[float]:
    return [float(one["iterations_per_s"]) for one in measurement.rounds]


def _with_cause(measurement: Measurement, others: Sequence[Measurement], scheme: str, isa: set[str]) -> Measurement:
    verdict = measurement.verdict
    if verdict.relation == "slower":
        cause = _why_slower(measurement, scheme, isa)
    elif verdict.relation in ("faster", "same") and measurement.precision.startswith("int"):
        cause = _why_no_gain_over_bf16(measurement, others, isa)
    else:
        return measurement
    return replace(measurement, verdict=replace(verdict, cause=cause))


def _why_slower(measurement: Measurement, scheme: str, isa: set[str]) -> str:
    """The likely cause, out of what is known of the row: its scheme, its graph as run, the host."""
    counts = measurement.node_counts
    if scheme.endswith("_weights"):
        return "packed weights save bytes, not arithmetic: they are unpacked as they are multiplied"
    if measurement.precision in ("bf16", "fp16"):
        missing = not {"amx_bf16", "avx512_bf16"} & isa
        return "this processor has no bf16 arithmetic" if missing else "so small a model does not repay converting between types"
    causes = []
    if scheme.startswith("int8") and not _VNNI & isa:
        causes.append("this processor has no dot-product instructions for int8 (VNNI)")
    if scheme == "int8_dynamic":
        causes.append("dynamic quantization reads and quantizes the input of every MatMulInteger at run time")
    if counts.get("quantize_left", 0) > 0:
        causes.append(f"{counts['quantize_left']} QuantizeLinear/DequantizeLinear nodes were not fused and run by themselves")
    if scheme.startswith("int") and counts.get("int8") == 0:
        causes.append("the runtime runs no node in int8")
    if measurement.macs_g is not None and measurement.macs_g < SMALL_MACS_G:
        causes.append(f"{measurement.macs_g:.3g} GMAC (few tokens) leave little to gain from int8")
    return "; ".join(causes) or "unknown: see node_counts, or profile the file"


def _why_no_gain_over_bf16(measurement: Measurement, others: Sequence[Measurement], isa: set[str]) -> str:
    """Said of an int8 row that a bf16 row of the same runtime outruns."""
    for other in others:
        same_place = (other.runtime, other.provider, other.batch_size, other.recipe) == (
            measurement.runtime,
            measurement.provider,
            measurement.batch_size,
            measurement.recipe,
        )
        if same_place and other.precision == "bf16":
            _, low, _ = paired_ratio(_rates(measurement), _rates(other))
            if low is not None and low <= 1:
                unit = "AMX" if "amx_bf16" in isa else "bf16 instructions"
                return f"no faster than bf16 of the same runtime, which already uses {unit}"
    return ""
