"""Each way in which a row does not belong beside the others is a warning on it, and one that does belong has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import BF16, FP32, INT8, judged, made_table, other_conditions, row, study, write_study
from vitedge.report.comparable import conditions_of, grouped


def warned(tmp_path: Path, second: Any, **changes: Any) -> tuple[str, ...]:
    """Warnings of a row beside an fp32 baseline."""
    rows = [row("untouched", [FP32]), row("dynamic", [second], **changes)]
    return made_table(write_study(tmp_path, study(rows=rows))).rows[1].warnings


def test_rows_of_one_run_have_none(tmp_path: Path):
    table = made_table(write_study(tmp_path))
    assert [r.warnings for r in table.rows] == [()] * 4
    assert grouped(table.rows) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conditions": other_conditions(cpu="Another processor")}, "another host"),
        ({"conditions": other_conditions(cores=64)}, "64 cores"),
        ({"conditions": other_conditions(date="2026-03-03T00:00:00+00:00")}, "another run"),
        ({"conditions": other_conditions(threads=1)}, "other threads than the baseline's: 1, not 2"),
        (
            {"conditions": other_conditions(inherited={"OMP_NUM_THREADS": "1"}, gpus=[])},
            "other engine variables than the baseline's: OMP_NUM_THREADS=1, not none",
        ),
        ({"conditions": other_conditions(gpus=["NVIDIA T4"], inherited={})}, "other GPUs than the baseline's: NVIDIA T4, not none"),
        ({"conditions": other_conditions(commit="def+")}, "another commit than the baseline's: def+, not abc"),
        ({"conditions": other_conditions(versions={"vitedge": "1", "openvino": "3"})}, "openvino 3, not None"),
        ({"unstable": "the rounds' medians differ by 30 %"}, "unstable: the rounds' medians differ by 30 %"),
        (
            {"emulated": True, "conditions": other_conditions(mismatches=["arch: a, b"], environment={"ISA": "AVX2"})},
            "arch: a, b; ISA=AVX2",
        ),
        ({"top1": None, "top1_interval": None, "answers": None, "top1_reason": "no data"}, "top-1 not measured: no data"),
        ({"top1_images": "500 randomly chosen test images of made"}, "other images than the baseline's: 500 randomly"),
    ],
)
def test_what_differs_is_said(tmp_path: Path, changes: dict[str, Any], words: str):
    found = warned(tmp_path, replace(INT8, **changes))
    assert len(found) == 1
    assert words in found[0]


def test_a_host_that_was_busy_is_said_of_all_that_it_timed(tmp_path: Path):
    busy = other_conditions(load_average=[1.5, 0, 0])
    rows = [row("untouched", [replace(FP32, conditions=busy)]), row("dynamic", [replace(INT8, conditions=busy)])]
    table = made_table(write_study(tmp_path, study(rows=rows)))
    assert grouped(table.rows) == [("the host was busy before it was timed (load 1.50 on 2 cores)", ["all rows"])]


def test_what_a_ratio_stands_on_is_named_where_it_did_not_settle(tmp_path: Path):
    shaky = replace(BF16, unstable="it shook")
    rows = [row("untouched", [FP32, shaky]), row("dynamic", [INT8], untouched="untouched")]
    fp32, bf16, dynamic = made_table(write_study(tmp_path, study(rows=rows))).rows
    said = "compared with an unstable figure: untouched: model.fp32.onnx in openvino bf16"
    assert fp32.warnings == dynamic.warnings == (said,) and bf16.warnings == ("unstable: it shook",)


def test_why_a_change_is_missing_is_said_once(tmp_path: Path):
    unjudged = replace(FP32, top1=None, top1_interval=None, answers=None)
    rows = [row("untouched", [FP32]), row("longer", [unjudged]), row("dynamic", [INT8], continued="longer")]
    dynamic = made_table(write_study(tmp_path, study(rows=rows))).rows[2]
    assert dynamic.warnings == ("not compared: top-1 of longer was not measured",)


def test_images_of_one_name_and_other_content_are_told_apart(tmp_path: Path):
    other = replace(judged("model.int8_dynamic.onnx", (150.0, 151.0, 149.0), 86, images="made again"), top1_images=FP32.top1_images)
    (found,) = warned(tmp_path, other)
    assert "another content" in found


def test_a_budget_is_a_warning_on_every_figure_made_with_it(tmp_path: Path):
    assert warned(tmp_path, INT8, budget="10 % of the steps") == ("made with less work than the full study: 10 % of the steps",)


def test_a_warning_is_said_once_with_its_rows(tmp_path: Path):
    table = made_table(write_study(tmp_path, study(budget="10 % of the steps")))
    assert grouped(table.rows) == [("made with less work than the full study: 10 % of the steps", ["all rows"])]
    shaky = replace(INT8, unstable="it shook")
    table = made_table(write_study(tmp_path, study(rows=[row("untouched", [FP32]), row("dynamic", [shaky])])))
    assert grouped(table.rows) == [("unstable: it shook", ["dynamic: model.int8_dynamic.onnx in onnxruntime int8, batch 1"])]


def test_conditions_are_said_once_per_run(tmp_path: Path):
    table = made_table(write_study(tmp_path))
    (lines,) = conditions_of(table.rows)
    text = "\n".join(lines)
    for word in ("board", "A processor", "2 threads of 2", "3 rounds", "seed 0", "commit abc", "2026-01-01", "bootstrap"):
        assert word in text
    emulated = replace(INT8, emulated=True)
    table = made_table(write_study(tmp_path, study(rows=[row("untouched", [FP32]), row("dynamic", [emulated])])))
    assert ["EMULATED" in lines[0] for lines in conditions_of(table.rows)] == [False, True]
