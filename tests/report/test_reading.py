"""Whatever holds measurements is read; what does not is one line, and the rest is read all the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import vitedge
from tests.report.made import FP32, INT8, other_conditions, row, study, write_bench, write_study
from vitedge.bench.records import Measurement, Skipped
from vitedge.errors import InputError, UsageError
from vitedge.report.against import with_comparisons
from vitedge.report.comparable import with_warnings
from vitedge.report.figures import pareto_size
from vitedge.report.grids import grids
from vitedge.report.reading import read


def test_a_measurement_comes_back_from_json(tmp_path: Path):
    table = read([write_bench(tmp_path / "out.json", [FP32, INT8])])
    assert [r.measurement for r in table.rows] == [FP32, INT8]
    assert [(r.label, r.recipe, r.device, r.study) for r in table.rows] == [("tiny", "tiny", "board", "")] * 2


def test_a_measurement_of_before_answers_were_kept_is_read():
    plain = FP32.to_plain()
    for later in ("answers", "top1_reason"):
        del plain[later]
    plain["of_tomorrow"] = 1
    found = Measurement.from_plain(plain)
    assert (found.answers, found.top1_reason, found.images_per_s) == (None, "", 100.0)


def test_results_that_came_with_an_older_version_are_read():
    table = read([Path(vitedge.__file__).parent.parent / "results"])
    labels = {r.label for r in table.rows}
    assert "deit_tiny_int8" in labels
    # One recipe, built twice, a JSON each: told apart by what holds them.
    assert sum(label.startswith("deit_tiny_112_int8 (2026") for label in labels) == 2 and "deit_tiny_112_int8" not in labels
    assert table.problems == ()
    assert any("int8_accuracy" in line for line in table.left_out)


def test_a_build_folder_knows_itself(tmp_path: Path):
    build = tmp_path / "build" / "tiny"
    write_bench(build / "report.json", [FP32])
    (build / "manifest.json").write_text("{}")
    for place in (build, build / "report.json", build.parent):
        assert read([place]).builds == [build]


def test_a_build_that_was_never_measured_says_what_to_run(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="vitedge bench"):
        read([tmp_path])


def test_a_studys_rows_have_labels_papers_and_reasons(tmp_path: Path):
    write_study(tmp_path, study(budget="10 % of the steps"))
    table = read([tmp_path])
    assert table.title == "small"
    assert [(r.label, r.measurement is None) for r in table.rows] == [
        ("untouched", False),
        ("untouched", False),
        ("dynamic", False),
        ("pruned", True),
    ]
    assert table.rows[3].failure == "expected a ratio below 1, found 1"
    assert table.rows[2].paper == {"top1": 98.73, "cpu_it_s": 0.062, "size_mb": 84.0}
    assert {r.budget for r in table.rows} == {"10 % of the steps"}
    assert {r.baseline for r in table.rows} == {"untouched"}
    assert table.builds == [tmp_path / "builds" / "untouched"]


def test_what_the_methods_themselves_took_is_without_training(tmp_path: Path):
    steps = [{"decompose": {"seconds": 0.25}}, {"train": {"seconds": 900.0}}, {"prune": {"kept": 3}}, {"decompose": {"seconds": 0.5}}]
    rows = [row("svd", [FP32], notes={"steps": steps}), row("plain", [], notes={"steps": [{"train": {"seconds": 1.0}}]}), row("old", [])]
    write_study(tmp_path, study(rows=rows))
    assert [one.method_seconds for one in read([tmp_path]).rows] == [0.75, None, None]


def test_a_search_says_how_its_builds_are_measured_in_one_run(tmp_path: Path):
    (tmp_path / "search.json").write_text('{"schema_version": 1}')
    with pytest.raises(InputError, match=r"a search, whose trials were timed in runs of their own.*vitedge bench .*trials/\*"):
        read([tmp_path])
    write_bench(tmp_path / "trials" / "one" / "report.json", [FP32])
    assert len(read([tmp_path]).rows) == 1


def test_a_row_without_measurement_or_reason_is_not_measured_yet(tmp_path: Path):
    write_study(tmp_path, study(rows=[row("soon", [])]))
    assert read([tmp_path]).rows[0].failure == "not measured yet"


def test_a_benchs_failed_rows_are_rows_and_its_unavailable_ones_are_not(tmp_path: Path):
    skipped = (Skipped("broken.onnx", "onnxruntime", "fp32", "it died", failed=True), Skipped("m", "openvino", "fp16", "no fp16 here"))
    table = read([write_bench(tmp_path / "out.json", [FP32], skipped)])
    assert [(r.label, r.failure) for r in table.rows] == [("tiny", ""), ("broken.onnx", "it died")]


def test_a_file_named_twice_and_a_studys_own_build_are_read_once(tmp_path: Path):
    results = write_study(tmp_path)
    report = write_bench(tmp_path / "builds" / "untouched" / "report.json", [FP32])
    assert len(read([results, results, report, tmp_path]).rows) == 4
    assert len(read([report, results]).rows) == 4


def test_a_folder_of_both_is_read_with_its_files(tmp_path: Path):
    write_study(tmp_path / "studies" / "small")
    write_bench(tmp_path / "studies" / "bench.json", [INT8])
    (tmp_path / "studies" / "notes.json").write_text("[1]")
    table = read([tmp_path / "studies"])
    assert [r.study for r in table.rows] == ["small"] * 4
    assert len(table.left_out) == 1 and "notes.json" in table.left_out[0]


BAD = {
    "half.json": '{"schema_version": 1, "measurements": [',
    "other.json": '{"hello": 1}',
    "new.json": '{"schema_version": 99, "measurements": []}',
    "rows.json": '{"schema_version": 1, "study": "s", "rows": 3}',
    "binary.json": "\x00",
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_file_is_one_line_and_the_others_are_read(tmp_path: Path, name: str):
    bad = tmp_path / name
    bad.write_text(BAD[name])
    good = write_bench(tmp_path / "good.json", [FP32])
    table = read([bad, good])
    assert len(table.rows) == 1
    assert len(table.problems) == 1 and name in table.problems[0] and "\n" not in table.problems[0]
    with pytest.raises(InputError, match=name):
        read([bad])


def test_a_bad_measurement_names_its_place(tmp_path: Path):
    path = write_bench(tmp_path / "out.json", [FP32, INT8])
    content = json.loads(path.read_text())
    content["measurements"][0]["images_per_s"] = "fast"
    path.write_text(json.dumps(content))
    table = read([path])
    assert [r.measurement for r in table.rows] == [INT8]
    assert "measurements.0.images_per_s" in table.problems[0]


DAMAGE = {
    "rounds: none": ("rounds", []),
    "rates: expected": ("rounds", [{}]),
    "rates: expected finite": ("images_per_s", float("nan")),
    "rates: expected finite numbers": ("iterations_per_s", 0.0),
    "samples_ms: expected": ("samples_ms", [[0.0]]),
    "size_bytes: expected": ("size_bytes", 0),
    "conditions.versions: expected a dict": ("conditions", {"device": "board", "versions": [1]}),
    "conditions.load_average: expected numbers": ("conditions", {"device": "board", "load_average": ["much"]}),
    "answers: damage": ("answers", {"images": "made", "count": 3}),
}


@pytest.mark.parametrize("words", sorted(DAMAGE))
def test_figures_that_no_report_could_show_are_one_line_with_their_place(tmp_path: Path, words: str):
    path = write_bench(tmp_path / "out.json", [FP32, INT8])
    content = json.loads(path.read_text())
    name, value = DAMAGE[words]
    content["measurements"][0][name] = value
    path.write_text(json.dumps(content))
    table = read([path])
    assert [r.measurement for r in table.rows] == [INT8]
    assert f"out.json: measurements.0: a damaged measurement: {words}" in table.problems[0]


def test_json_of_the_wrong_shape_is_one_line(tmp_path: Path):
    good = write_bench(tmp_path / "good.json", [FP32])
    deep, skipped, measurements = (tmp_path / f"{name}.json" for name in ("deep", "skipped", "measurements"))
    deep.write_text("[" * 100_000)
    skipped.write_text(json.dumps({**json.loads(good.read_text()), "skipped": 5}))
    measurements.write_text(json.dumps(study(rows=[{**row("untouched", []), "measurements": 7}])))
    table = read([deep, skipped, measurements, good])
    assert [r.measurement for r in table.rows] == [FP32]
    assert len(table.problems) == 2 and "deep.json" in table.problems[0] and "rows.0.measurements: expected a list" in table.problems[1]


def test_builds_of_one_name_in_different_places_are_told_apart(tmp_path: Path):
    for place, sha256 in (("first", "aa"), ("second", "bb")):
        folder = tmp_path / place / "tiny"
        write_bench(folder / "report.json", [replace(FP32, sha256=sha256), replace(INT8, sha256=f"{sha256}8")])
        (folder / "manifest.json").write_text("{}")
    labels = [r.label for r in read([tmp_path / "first" / "tiny", tmp_path / "second" / "tiny"]).rows]
    assert labels == ["tiny (first/tiny)"] * 2 + ["tiny (second/tiny)"] * 2


def test_two_studies_with_the_same_labels_stay_two(tmp_path: Path):
    write_study(tmp_path / "studies" / "ten", study(study="ten"))
    hundred = [replace(m, top1_images="another set", conditions=other_conditions(date="2026-02-02T00:00:00+00:00")) for m in (FP32, INT8)]
    rows = [row("untouched", [hundred[0]]), row("dynamic", [hundred[1]], untouched="untouched")]
    write_study(tmp_path / "studies" / "hundred", study(study="hundred", rows=rows))
    table = with_warnings(with_comparisons(read([tmp_path])))  # as in `vitedge report build/`
    assert {r.label for r in table.rows if r.study == "ten"} == {"untouched (ten)", "dynamic (ten)", "pruned"}
    changed = [r for r in table.rows if r.label == "dynamic (hundred)"]
    assert [(r.untouched, r.baseline, r.warnings) for r in changed] == [("untouched (hundred)", "untouched (hundred)", ())]
    (flips,) = [grid for grid in grids(table) if grid.name == "flips"]
    assert {line[0].text for line in flips.lines} == {"untouched (ten)", "dynamic (ten)", "dynamic (hundred)"}
    assert {figure.title.split(", ")[-1] for figure in pareto_size(table)} == {FP32.top1_images, "another set"}


def test_a_study_of_which_only_some_rows_were_measured_is_read(tmp_path: Path):
    write_study(tmp_path / "small").rename(tmp_path / "small" / "results.only.json")
    assert len(read([tmp_path]).rows) == len(read([tmp_path / "small"]).rows) == 4


def test_nothing_to_read_says_what_to_run(tmp_path: Path):
    with pytest.raises(UsageError, match="vitedge bench"):
        read([tmp_path])
