"""`results.json` while a study is under way: a row has measurements, or the reason why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.bench.made import make_build, make_measurement
from tests.study.made_study import plan_of, write_study
from vitedge.artifact import Manifest, write_text
from vitedge.report.json_file import dump
from vitedge.report.reading import read
from vitedge.study.measure import find_built, measure_key, measurements_file
from vitedge.study.plan import Plan, Task
from vitedge.study.queue import State
from vitedge.study.results import collect, write_results


def made(tmp_path: Path) -> tuple[Plan, Task, Task, Task]:
    """A study with its last three tasks: untouched, int8, broken."""
    plan = plan_of(write_study(tmp_path, tmp_path), tmp_path / "out")
    _, untouched, int8, broken = plan.tasks
    return plan, untouched, int8, broken


def failures(plan: Plan, states: dict[str, State], unavailable: dict[str, str] | None = None) -> dict[str, str]:
    return {row["label"]: row["failure"] for row in collect(plan, states, unavailable or {})["rows"]}


def test_nothing_begun_everything_says_so(tmp_path: Path) -> None:
    plan, *_ = made(tmp_path)
    assert set(failures(plan, {}).values()) == {"not built yet (waiting)"}
    assert set(failures(plan, {}, {"board": "the board is away"}).values()) == {"the board is away"}


def test_each_row_says_its_own_reason(tmp_path: Path) -> None:
    plan, untouched, int8, broken = made(tmp_path)
    make_build(plan.root(untouched))
    make_build(plan.root(int8))
    states = {
        untouched.key: State("done", 1, seconds=3.0),
        int8.key: State("running", 2),
        broken.key: State("failed", 3, "a gate was missed", 3),
    }
    assert failures(plan, states, {"board": "away"})["Tiny / broken"] == "a gate was missed"
    found = failures(plan, states)
    assert found == {
        "Tiny / untouched": "built, not measured yet", "Tiny / int8": "not built yet (running)", "Tiny / broken": "a gate was missed",
    }  # fmt: skip
    device = plan.devices[0][1]
    key = measure_key(plan, device, [find_built(plan, untouched, device)])
    found = failures(plan, {**states, key: State("failed", 4, "no engine", 4)})
    assert found["Tiny / untouched"] == "built and not measured: no engine"


def test_measurements_stand_in_their_rows_and_the_report_reads_them(tmp_path: Path) -> None:
    plan, untouched, int8, broken = made(tmp_path)
    device = plan.devices[0][1]
    for task in (untouched, int8):
        make_build(plan.root(task))
    states = {task.key: State("done", 1, seconds=3.0) for task in (untouched, int8)}
    states[broken.key] = State("failed", 3, "a gate was missed", 3)
    built = [find_built(plan, task, device) for task in (untouched, int8)]
    assert [[artifact.name for artifact in one.artifacts] for one in built] == [["model.fp32.onnx"], ["model.int8_dynamic.onnx"]]
    rows = {
        "Tiny / untouched": [make_measurement("model.fp32.onnx", sha256="a").to_plain()],
        "Tiny / int8": [make_measurement("model.int8_dynamic.onnx", sha256="b", precision="int8").to_plain()],
    }
    path = measurements_file(plan, device, measure_key(plan, device, built))
    write_text(path, dump({"schema_version": 1, "device": "board", "rows": rows, "skipped": []}))
    results = write_results(plan, collect(plan, states, {}))
    content = json.loads(results.read_text())
    assert [len(row["measurements"]) for row in content["rows"]] == [1, 1, 0]
    assert [row["failure"] for row in content["rows"]] == ["", "", "a gate was missed"]
    hashes = {artifact["name"]: artifact["sha256"] for artifact in content["rows"][1]["artifacts"]}
    assert hashes["model.int8_dynamic.onnx"] == Manifest.load(plan.root(int8)).artifacts["model.int8_dynamic.onnx"].sha256
    table = read([plan.folder])
    assert table.title == "tiny" and not table.problems
    assert [(row.label, row.measurement is not None) for row in table.rows] == [
        ("Tiny / untouched", True), ("Tiny / int8", True), ("Tiny / broken", False),
    ]  # fmt: skip
    assert table.rows[1].paper == {"top1": 90.5} and table.rows[1].untouched == "Tiny / untouched"
    assert table.rows[1].build == plan.root(int8)


def test_a_file_that_changed_since_is_not_given_the_old_figures(tmp_path: Path) -> None:
    plan, untouched, *_ = made(tmp_path)
    device = plan.devices[0][1]
    make_build(plan.root(untouched))
    states = {untouched.key: State("done", 1)}
    key = measure_key(plan, device, [find_built(plan, untouched, device)])
    rows = {"Tiny / untouched": [make_measurement().to_plain()]}
    write_text(measurements_file(plan, device, key), dump({"schema_version": 1, "rows": rows, "skipped": []}))
    assert failures(plan, states)["Tiny / untouched"] == ""
    manifest = Manifest.load(plan.root(untouched))
    fp32 = manifest.artifacts["model.fp32.onnx"]
    manifest.artifacts["model.fp32.onnx"] = replace(fp32, sha256="another")
    manifest.save()
    assert failures(plan, states)["Tiny / untouched"] == "built, not measured yet"


def test_a_row_that_quantizes_is_never_stood_for_by_its_float_file(tmp_path: Path) -> None:
    plan, _, int8, _ = made(tmp_path)
    make_build(plan.root(int8))
    manifest = Manifest.load(plan.root(int8))
    del manifest.artifacts["model.int8_dynamic.onnx"]
    manifest.save()
    assert find_built(plan, int8, plan.devices[0][1]).artifacts == ()
    notes = {"not_built": {"quantize onnxruntime.int8_dynamic": "needs calibration images"}}
    found = failures(plan, {int8.key: State("done", 1, notes=notes)})
    assert found["Tiny / int8"] == "quantize onnxruntime.int8_dynamic: needs calibration images"
