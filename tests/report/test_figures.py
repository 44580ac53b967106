"""What is drawn: fronts by their definition, nothing lost without a word, no name that Plotly could take for a tag."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.report.made import BF16, FP32, INT8, NASTY, made_table, row, study, write_bench, write_study
from vitedge.report.curves import ALL, MANY, read_curves
from vitedge.report.figures import DRAWN_SAMPLES, figures, front, latencies, pareto_size, pareto_speed, spaced
from vitedge.report.pictures import BUDGET, WIDTH, load_pictures

POINTS = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), min_size=1, max_size=20)


@given(POINTS, st.booleans())
def test_the_front_is_what_no_point_beats(points: list[tuple[float, float]], more: bool):
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        x = a[0] >= b[0] if more else a[0] <= b[0]
        return x and a[1] >= b[1] and a != b

    expected = {point for point in points if not any(beats(other, point) for other in points)}
    found = [points[i] for i in front(points, more)]
    assert set(found) == expected
    assert len(found) == len(expected)  # equal points once
    assert [x for x, _ in found] == sorted(x for x, _ in found)


def test_a_plot_per_device_and_batch_size_and_one_of_sizes(tmp_path: Path):
    rows = [FP32, INT8, replace(FP32, batch_size=8), replace(INT8, top1=None, top1_interval=None)]
    table = made_table(write_bench(tmp_path / "a.json", [*rows[:3], replace(rows[3], batch_size=8)]))
    speed = pareto_speed(table)
    assert [figure.title for figure in speed] == ["Top-1 against images/s on board, batch 1", "Top-1 against images/s on board, batch 8"]
    assert "1 row has no top-1" in speed[1].note and "no top-1" not in speed[0].note
    (size,) = pareto_size(table)
    assert sum(len(trace["x"]) for trace in size.traces[1:]) == 2
    assert size.traces[0]["line"]["shape"] == "hv" and speed[0].traces[0]["line"]["shape"] == "vh"


def test_markers_differ_by_shape_and_bars_are_the_intervals(tmp_path: Path):
    (speed,) = pareto_speed(made_table(write_study(tmp_path)))
    untouched, dynamic = speed.traces[1:]
    assert untouched["marker"]["symbol"] != dynamic["marker"]["symbol"]
    assert untouched["marker"]["color"] != dynamic["marker"]["color"]
    assert (dynamic["x"], dynamic["y"]) == ([150.0], [86.0])
    assert INT8.top1_interval is not None
    assert dynamic["error_y"]["array"] == [INT8.top1_interval[1] - 86.0]
    for word in ("recipe tiny_dynamic", "150 images/s at batch 1", "A processor", "2026-01-01"):
        assert word in dynamic["hovertext"][0]


def test_names_are_no_tags(tmp_path: Path):
    table = made_table(write_study(tmp_path, study(rows=[row(NASTY, [FP32])], baseline=NASTY)))
    drawn, _ = figures(table)
    text = json.dumps([figure.traces for figure in drawn])
    assert "<img" not in text and "</script" not in text and "&lt;img" in text


def test_boxes_are_of_all_inferences_or_say_of_how_many(tmp_path: Path):
    many = replace(FP32, samples_ms=[[float(i) for i in range(1000, 0, -1)], [5000.0]])
    kept = spaced(many)
    assert len(kept) == DRAWN_SAMPLES and kept == sorted(kept) and (kept[0], kept[-1]) == (1.0, 5000.0)
    assert spaced(FP32) == [10.0, 10.0, 10.0]
    (figure,) = latencies(made_table(write_bench(tmp_path / "a.json", [many, BF16, INT8])))
    assert [len(trace["x"]) for trace in figure.traces] == [3, 3, DRAWN_SAMPLES]  # the first row on top
    assert len({trace["name"] for trace in figure.traces}) == 3
    assert str(DRAWN_SAMPLES) in figure.note


def write_metrics(build: Path, steps: int, tail: str = "") -> Path:
    build.mkdir(parents=True, exist_ok=True)
    lines = [{"stage": stage, "label": "train", "step": step, "loss": 1 / step} for stage in (0, 1) for step in range(1, steps + 1)]
    lines.append({"stage": 1, "label": "train", "step": steps, "validation_top1": 88.5})
    (build / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return build


def test_curves_go_over_all_stages_and_end_where_the_training_ended(tmp_path: Path):
    build = write_metrics(tmp_path / "tiny", 400, tail='{"stage": 1, "st')
    (loss,), problems = read_curves([build, tmp_path / "none"], "loss")
    assert problems == []
    assert (loss.build, loss.of, loss.steps[0], loss.steps[-1], loss.values[-1]) == ("tiny", 800, 1, 800, 1 / 400)
    assert len(loss.steps) <= MANY + 1
    (top1,), _ = read_curves([build], "validation_top1")
    assert (top1.steps, top1.values) == ((800,), (88.5,))


def test_many_curves_share_what_a_page_carries(tmp_path: Path):
    builds = [write_metrics(tmp_path / f"tiny{index}", 200) for index in range(60)]
    curves, _ = read_curves(builds, "loss")
    assert len(curves) == 60 and all(len(curve.steps) <= ALL // 60 + 1 and curve.steps[-1] == 400 for curve in curves)
    assert all(value == float(f"{value:.5g}") for curve in curves for value in curve.values)


def test_damaged_metrics_are_a_line_and_no_curve(tmp_path: Path):
    damaged = '{"stage": 0, "step": 1, "loss": NaN}\nhello\n{"stage": 0, "step": 2}\n'
    (write_metrics(tmp_path / "tiny", 3) / "metrics.jsonl").write_text(damaged)
    curves, problems = read_curves([tmp_path / "tiny"], "loss")
    assert curves == [] and len(problems) == 1 and "line 2" in problems[0]


def test_curves_are_drawn_for_the_builds_of_a_study(tmp_path: Path):
    write_metrics(tmp_path / "builds" / "untouched", 5)
    drawn, problems = figures(made_table(write_study(tmp_path)))
    assert problems == []
    assert {"curves-top1", "curves-loss"} <= {figure.name for figure in drawn}


def test_a_budget_is_in_every_title(tmp_path: Path):
    write_metrics(tmp_path / "builds" / "untouched", 5)
    drawn, _ = figures(made_table(write_study(tmp_path, study(budget="10 % of the steps"))))
    assert len(drawn) >= 5 and all(figure.title.endswith(" (10 % of the steps)") for figure in drawn)


def picture(path: Path, width: int = 1000, height: int = 500) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((width, height), 60).save(path)


def test_pictures_are_found_beside_the_build_and_where_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "builds" / "untouched.inspect" / "importance.png", 300, 100)
    picture(tmp_path / "untouched.inspect" / "ranges.png", 300, 100)
    picture(tmp_path / "more" / "mine.png", 300, 100)
    picture(tmp_path / "more" / "vit.inspect" / "attention.png", 1800, 900)
    (tmp_path / "more" / "broken.png").write_text("no picture")
    pictures, left_out = load_pictures(made_table(write_study(tmp_path), pictures=tmp_path / "more"))
    assert {(one.title, one.caption.split()[0]) for one in pictures} == {
        ("untouched", "Weights"),
        ("untouched", "Ranges"),
        ("more", "mine"),
        ("vit", "Attention"),
    }
    assert {(one.width, one.height) for one in pictures} == {(300, 100), (WIDTH, WIDTH // 2)}
    assert all(one.uri.startswith("data:image/png;base64,") for one in pictures)
    assert len(left_out) == 1 and "broken.png" in left_out[0]


def test_pictures_stay_inside_the_pages_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for index in range(6):
        picture(tmp_path / "more" / f"noise{index}.png", 600, 600)
    pictures, left_out = load_pictures(made_table(write_study(tmp_path), pictures=tmp_path / "more"))
    assert sum(len(one.uri) for one in pictures) <= BUDGET
    assert len(pictures) + len(left_out) == 6 and pictures and left_out
