"""The choice is a pure function of a table of measurements."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.package.building import row
from vitedge.device import Budgets
from vitedge.errors import GateError, InputError, UsageError
from vitedge.package.choose import Measured, choose, current_rows, read_rows, why_not
from vitedge.recipe import Limits

LIMITS = Limits(max_top1_drop=0.5)


def rows(*plain: dict[str, Any]) -> list[Measured]:
    return read_rows({"schema_version": 1, "measurements": list(plain)}, "board", "report.json")


def fp32(speed: float = 100.0, **changes: Any) -> dict[str, Any]:
    return row("model.fp32.onnx", "a" * 64, iterations_per_s=speed, **changes)


def int8(speed: float, drop: float | None, **changes: Any) -> dict[str, Any]:
    quality = (
        {"top1_drop": {"points": drop, "low": drop - 0.1, "high": drop + 0.1}, "top1": 90 - drop} if drop is not None else {"top1": None}
    )
    return row("model.int8.onnx", "b" * 64, iterations_per_s=speed, precision="int8", **{**quality, **changes})


def test_the_fastest_inside_the_limit_wins_and_the_line_says_why() -> None:
    table = rows(fp32(), int8(331, 0.2), int8(408, 0.9, runtime="openvino", artifact="openvino.int8"))
    choice = choose(table, LIMITS, Budgets())
    assert choice.row.artifact == "model.int8.onnx"
    assert choice.why == (
        "chosen model.int8.onnx (onnxruntime int8) at 331.0 it/s over model.fp32.onnx (onnxruntime fp32) at 100.0; "
        "openvino.int8 (openvino int8) faster at 408.0 it/s but top-1 drop 0.90 > 0.50 points"
    )
    assert len(choice.passed_over) == 1


def test_a_drop_of_exactly_the_limit_is_inside() -> None:
    assert choose(rows(fp32(), int8(200, 0.5)), LIMITS, Budgets()).row.precision == "int8"


def test_none_inside_is_a_gate_missed() -> None:
    with pytest.raises(GateError, match=r"top-1 drop 0.90 > 0.50 points"):
        choose(rows(int8(200, 0.9)), LIMITS, Budgets())


def test_the_fp32_reference_drops_nothing_and_another_fp32_file_may() -> None:
    reference, other = rows(fp32(top1_agreement=100.0), fp32(top1_agreement=98.0))
    assert reference.top1_drop == 0.0
    assert other.top1_drop is None


def test_packed_weights_multiplied_in_fp32_are_not_the_reference() -> None:
    (packed,) = rows(fp32(node_counts={"int8": 0, "float": 24, "quantize_left": 0, "int4_weights": 50}))
    assert packed.top1_drop is None


def test_bf16_of_the_fp32_file_is_a_candidate_of_its_own() -> None:
    bf16 = fp32(
        300, runtime="openvino", provider="CPU", precision="bf16", float_precision="bf16", top1_drop={"points": 0.1}, top1_agreement=99.0
    )
    choice = choose(rows(fp32(), bf16), LIMITS, Budgets())
    assert (choice.row.runtime, choice.row.float_precision) == ("openvino", "bf16")


def test_int8_says_when_the_rest_runs_in_bf16() -> None:
    assert rows(int8(100, 0.1, float_precision="bf16"))[0].label == "model.int8.onnx (onnxruntime int8+bf16)"


def test_without_any_top1_the_fastest_is_taken() -> None:
    assert choose(rows(fp32(top1=None), int8(200, None)), LIMITS, Budgets()).row.precision == "int8"


def test_where_top1_is_known_a_row_without_it_is_not_taken() -> None:
    choice = choose(rows(fp32(), int8(200, None)), LIMITS, Budgets())
    assert choice.row.precision == "fp32"
    assert "its top-1 drop was not measured" in choice.why


def test_a_row_with_agreement_alone_is_not_taken() -> None:
    with pytest.raises(GateError, match="not measured"):
        choose(rows(int8(200, None, top1_agreement=97.0)), LIMITS, Budgets())


@pytest.mark.parametrize(
    ("budgets", "reason"),
    [
        ({"size_mib": 0.01}, "size 0.0 > 0.0 MiB"),
        ({"latency_ms": 5.0}, "p50 latency 10.0 > 5.0 ms"),
        ({"peak_rss_mib": 50.0}, "peak memory 90.0 > 50.0 MiB"),
    ],
)
def test_budgets_hold(budgets: dict[str, float], reason: str) -> None:
    assert why_not(rows(fp32())[0], LIMITS, Budgets(**budgets), has_top1=True) == reason


def test_a_runtime_that_no_bundle_runs_is_passed_over() -> None:
    choice = choose(rows(fp32(), fp32(500, runtime="pytorch", provider="cpu")), LIMITS, Budgets())
    assert choice.row.runtime == "onnxruntime"
    assert "not pytorch" in choice.passed_over[0]


def test_only_batch_1_and_this_device_count() -> None:
    assert len(rows(fp32(), fp32(batch_size=8), fp32(conditions={"device": "other"}))) == 1


def test_a_changed_artifact_must_be_measured_again() -> None:
    with pytest.raises(UsageError, match=r"changed since.*vitedge bench --device board"):
        current_rows(rows(fp32()), {"model.fp32.onnx": "c" * 64}, "board")


def test_nothing_measured_names_the_command() -> None:
    with pytest.raises(UsageError, match="vitedge bench --device board"):
        current_rows([], {}, "board")


@pytest.mark.parametrize(
    "report",
    [
        {},
        [],
        {"schema_version": 2, "measurements": []},
        {"schema_version": 1, "measurements": [{}]},
        {"schema_version": 1, "measurements": [fp32(conditions=3)]},
    ],
)
def test_a_damaged_report_is_one_error(report: Any) -> None:
    with pytest.raises(InputError, match="measure again"):
        read_rows(report, "board", "report.json")


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(-2, 2)), min_size=1, max_size=8), st.floats(0, 1))
def test_the_choice_is_the_maximum_over_those_inside(table: list[tuple[float, float]], limit: float) -> None:
    plain = [int8(speed, drop, artifact=f"model.{index}.onnx") for index, (speed, drop) in enumerate(table)]
    inside = [speed for speed, drop in table if drop <= limit]
    if not inside:
        with pytest.raises(GateError):
            choose(rows(*plain), Limits(max_top1_drop=limit), Budgets())
        return
    choice = choose(rows(*plain), Limits(max_top1_drop=limit), Budgets())
    assert choice.row.iterations_per_s == max(inside)
    assert len(choice.passed_over) == sum(speed > max(inside) for speed, _ in table)
