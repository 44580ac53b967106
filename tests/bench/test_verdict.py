"""Verdicts on synthetic rounds whose ratio is known, and causes from facts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.made import make_measurement
from vitedge.bench.verdict import judge, paired_ratio, relation, t95


def test_t_quantiles_are_the_closed_forms():
    assert math.isclose(t95(1), math.tan(math.pi * 0.475), rel_tol=1e-7)
    assert math.isclose(t95(2), 0.95 / math.sqrt(2 * 0.975 * 0.025), rel_tol=1e-7)
    assert math.isclose(t95(10_000), 1.96020, rel_tol=1e-5)


@pytest.mark.parametrize("freedom", [3, 4, 5, 8, 15])
def test_t_quantiles_leave_five_percent_outside(freedom):
    """Simpson's rule over the density, an integral the finite sums do not use."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    x = np.linspace(0, t95(freedom), 20_001)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    assert math.isclose(2 * (density * weights).sum() * (x[1] - x[0]) / 3, 0.95, rel_tol=1e-8)


def test_ratio_of_a_worked_case():
    ratio, low, high = paired_ratio([2.0, 8.0], [1.0, 2.0])  # logs of 2 and 4
    center, half = math.log(8) / 2, 12.7062047 * (math.log(2) / math.sqrt(2)) / math.sqrt(2)
    assert math.isclose(ratio, math.exp(center))
    assert low is not None and math.isclose(low, math.exp(center - half), rel_tol=1e-6)
    assert high is not None and math.isclose(high, math.exp(center + half), rel_tol=1e-6)


@given(st.floats(0.1, 10), st.lists(st.floats(1, 1000), min_size=2, max_size=9))
def test_what_hits_both_rows_of_a_round_cancels(ratio, speeds):
    center, low, high = paired_ratio([speed * ratio for speed in speeds], speeds)
    assert math.isclose(center, ratio, rel_tol=1e-9)
    assert low is not None and high is not None
    assert math.isclose(low, high, rel_tol=1e-6)


@pytest.mark.parametrize("rounds", [3, 5])
def test_interval_covers_a_known_ratio_in_95_of_100_runs(rounds):
    generator = np.random.default_rng(rounds)
    covered = 0
    for _ in range(2000):
        shared = generator.lognormal(0, 0.3, rounds)
        _, low, high = paired_ratio(1.2 * shared * generator.lognormal(0, 0.03, rounds), shared * generator.lognormal(0, 0.02, rounds))
        covered += low <= 1.2 <= high
    assert 0.935 <= covered / 2000 <= 0.965


def test_relation_is_same_where_the_interval_covers_one():
    assert relation(1.01, 1.2) == "faster"
    assert relation(0.99, 1.2) == "same"
    assert relation(0.8, 0.99) == "slower"
    assert relation(None, None) == "unknown"


FP32 = make_measurement()
PARENTS = {"int8": "model.fp32.onnx", "model.fp32.onnx": ""}
SCHEMES = {"int8": "int8_dynamic", "model.fp32.onnx": "fp32"}


def int8(rates: tuple[float, ...], **changes):
    return make_measurement(
        "model.int8.onnx", rates, sha256="int8", precision="int8", node_counts={"int8": 4, "float": 0, "quantize_left": 0}, **changes
    )


def said(measurements, isa=("avx512_vnni",), schemes=SCHEMES, parents=PARENTS):
    return [m.verdict for m in judge(measurements, parents, schemes, isa)]


def test_faster_same_slower_and_baseline():
    verdicts = said([FP32, int8((150.0, 152.0, 148.0)), int8((100.0, 102.0, 98.5), runtime="other")])
    assert [v.relation for v in verdicts] == ["baseline", "faster", "unknown"]
    assert math.isclose(verdicts[1].ratio, 1.5, rel_tol=0.01)
    assert verdicts[1].low > 1.4
    assert verdicts[1].baseline == "model.fp32.onnx fp32"
    assert "fp32 row of other" in verdicts[2].cause
    assert said([FP32, int8((101.0, 99.0, 100.0))])[1].relation == "same"
    assert said([FP32, int8((50.0, 51.0, 49.0))])[1].relation == "slower"


def test_other_batch_sizes_and_recipes_are_no_baseline():
    for changes in ({"batch_size": 8}, {"recipe": "another"}, {"provider": "CUDAExecutionProvider"}):
        assert said([FP32, int8((150.0, 150.0, 151.0), **changes)])[1].relation == "unknown"


def test_quantized_file_that_ran_in_fp32_is_no_baseline():
    unquantized = int8(
        (100.0, 100.0, 100.0),
    )
    pretender = make_measurement("model.int8.onnx", sha256="int8")
    assert [v.relation for v in said([pretender, unquantized])] == ["unknown", "unknown"]


def test_of_two_fp32_files_the_one_it_was_made_from_counts():
    other = make_measurement("other.onnx", (10.0, 10.0, 10.1))
    verdict = said([other, FP32, int8((150.0, 150.0, 151.0))], schemes={**SCHEMES, "other.onnx": "fp32"})[2]
    assert verdict.baseline == "model.fp32.onnx fp32"
    unrelated = said([other, FP32, int8((150.0, 150.0, 151.0))], schemes={**SCHEMES, "other.onnx": "fp32"}, parents={})[2]
    assert unrelated.relation == "unknown"


def test_one_round_gives_a_ratio_and_no_verdict():
    verdict = said([make_measurement(rates=(100.0,)), int8((150.0,))])[1]
    assert (verdict.relation, verdict.low, verdict.high) == ("unknown", None, None)
    assert verdict.ratio == 1.5
    assert "--rounds" in verdict.cause


@pytest.mark.parametrize(
    ("changes", "isa", "schemes", "words"),
    [
        ({}, ("avx2",), SCHEMES, "VNNI"),
        ({}, ("avx512_vnni",), SCHEMES, "dynamic quantization"),
        ({"macs_g": 0.01}, ("avx512_vnni",), SCHEMES, "few tokens"),
        (
            {"node_counts": {"int8": 1, "float": 1, "quantize_left": 7}},
            ("avx512_vnni",),
            {**SCHEMES, "int8": "int8_static"},
            "7 QuantizeLinear",
        ),
        (
            {"node_counts": {"int8": 0, "float": 4, "quantize_left": 0}},
            ("avx512_vnni",),
            {**SCHEMES, "int8": "int8_static"},
            "no node in int8",
        ),
        ({}, ("avx512_vnni",), {**SCHEMES, "int8": "int8_static"}, "unknown"),
        ({"precision": "fp32"}, ("avx512_vnni",), {**SCHEMES, "int8": "int4_weights"}, "unpacked as they are multiplied"),
        ({"precision": "bf16"}, ("avx512_vnni",), {**SCHEMES, "int8": "int8_weights"}, "unpacked as they are multiplied"),
    ],
)
def test_cause_of_slower_comes_from_the_facts(changes, isa, schemes, words):
    facts = {"precision": "int8", "node_counts": {"int8": 4}, **changes}
    slow = make_measurement("int8", (50.0, 51.0, 49.0), sha256="int8", **facts)
    verdict = said([FP32, slow], isa=isa, schemes=schemes)[1]
    assert verdict.relation == "slower"
    assert words in verdict.cause
    assert ("VNNI" in verdict.cause) == (isa == ("avx2",))


def test_slow_bf16_without_bf16_arithmetic():
    slow = make_measurement("model.fp32.onnx", (50.0, 51.0, 49.0), precision="bf16")
    assert "no bf16" in said([FP32, slow], isa=("avx2",))[1].cause
    assert "no bf16" not in said([FP32, slow], isa=("avx512_bf16",))[1].cause


def test_int8_that_bf16_outruns_says_so():
    bf16 = make_measurement("model.fp32.onnx", (200.0, 201.0, 199.0), precision="bf16")
    verdict = said([FP32, bf16, int8((190.0, 191.0, 189.0))], isa=("amx_bf16", "avx512_vnni"))[2]
    assert verdict.relation == "faster"
    assert "bf16" in verdict.cause and "AMX" in verdict.cause
    assert said([FP32, bf16, int8((300.0, 301.0, 299.0))])[2].cause == ""
