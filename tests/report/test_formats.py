"""Every format of the folder holds the same figures; what each looks like on a small study."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.made import FP32, INT8, NASTY, made_table, row, study, write_bench, write_study
from vitedge.plugins import load, names
from vitedge.report.columns import COLUMNS
from vitedge.report.records import Table

FORMATS = "report.formats"


@pytest.fixture
def small(tmp_path: Path) -> Table:
    return made_table(write_study(tmp_path))


def render(name: str, table: Table, width: int = 100) -> str:
    text: str = load(FORMATS, name).render(table, width)
    return text


def test_the_folder_has_the_promised_formats_with_endings_of_their_own():
    assert set(names(FORMATS)) >= {"table", "csv", "json", "markdown", "html"}
    endings = [load(FORMATS, name).SUFFIX for name in names(FORMATS)]
    assert len(set(endings)) == len(endings) and all(ending.startswith(".") for ending in endings)


@pytest.mark.parametrize("name", names(FORMATS))
def test_every_format_names_rows_baseline_failures_warnings_and_budget(tmp_path: Path, name: str):
    if name == "html":
        pytest.importorskip("plotly")
    rows = [row("untouched", [FP32]), row("dynamic", [replace(INT8, unstable="it shook")]), row("pruned", [], failure="it failed so")]
    text = render(name, made_table(write_study(tmp_path, study(rows=rows, budget="10 % of the steps"))))
    for word in ("untouched", "dynamic", "pruned", "it failed so", "it shook", "10 % of the steps"):
        assert word in " ".join(text.split()), word
    assert text.endswith("\n")


def test_csv_comes_back_with_units_in_its_columns(small: Table):
    lines = list(csv.DictReader(io.StringIO(render("csv", small))))
    assert list(lines[0]) == [column.name for column in COLUMNS]
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    assert all(column.doc for column in COLUMNS)
    dynamic, pruned = lines[2], lines[3]
    expected = {
        "label": "dynamic",
        "artifact": "model.int8_dynamic.onnx",
        "size_mib": 0.25,
        "images_per_s": 150.0,
        "top1_percent": 86.0,
        "paper_size_mb": 84.0,
        "top1_change_points_vs_baseline": -4.0,
        "broken_images_vs_baseline": 4,
        "repaired_images_vs_untouched": 0,
        "agreement_percent_vs_baseline": 96.0,
        "speed_vs_baseline": "slower",
        "p90_ms": 11.0,
        "p99_ms": "",
        "continued_name": "",
    }
    for name, value in expected.items():
        assert (dynamic[name] if isinstance(value, str) else float(dynamic[name])) == value, name
    assert float(dynamic["speed_ratio_vs_baseline"]) == pytest.approx(0.75)
    assert pruned["failure"] == "expected a ratio below 1, found 1"
    assert pruned["images_per_s"] == pruned["broken_images_vs_baseline"] == ""
    # Nothing was compared with the baseline's own row, so it has no count of flips.
    assert lines[0]["broken_images_vs_baseline"] == ""


def test_csv_keeps_commas_quotes_and_lines(tmp_path: Path):
    table = made_table(write_study(tmp_path, study(rows=[row('a, "b"\nc', [FP32])])))
    assert next(csv.DictReader(io.StringIO(render("csv", table))))["label"] == 'a, "b"\nc'


def test_csv_has_no_text_that_a_spreadsheet_would_run(tmp_path: Path):
    labels = ['=HYPERLINK("http://x")', "@sum", "+1", "-1", "plain"]
    table = made_table(write_study(tmp_path, study(rows=[row(label, [FP32]) for label in labels], baseline="plain")))
    found = [line["label"] for line in csv.DictReader(io.StringIO(render("csv", table)))]
    assert found == [*(f"'{label}" for label in labels[:4]), "plain"]


def test_json_has_the_columns_of_the_csv_and_says_what_they_are(small: Table):
    content = json.loads(render("json", small))
    assert content["schema_version"] == 1
    assert content["baselines"] == ["untouched"]
    assert list(content["columns"]) == [column.name for column in COLUMNS]
    assert [one["label"] for one in content["rows"]] == ["untouched", "untouched", "dynamic", "pruned"]
    assert content["rows"][2]["images_per_s"] == 150.0
    assert content["rows"][2]["emulated"] is False
    assert content["rows"][0]["p99_ms"] is None
    assert content["warnings"] == []
    assert "A processor" in content["conditions"][0][0]


METHODS = r"""
| method | top-1 % | paper | top-1 vs untouched | paper | CPU it/s | paper | CPU vs untouched | paper | MiB | paper | size vs untouched | paper | not measured |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
| untouched (model.fp32.onnx in openvino bf16) | 90.00 (82.6 to 94.5) | 98.94 | - | - | 200 | 0.05 | - | - | 1.00 | 327 | - | - | - |
| dynamic (model.int8\_dynamic.onnx in onnxruntime int8) | 86.00 (77.9 to 91.5) | 98.73 | same -4.00 (-8.57 to +0.72) | -0.21 | 150 | 0.062 | slower x0.75 (0.75 to 0.75) | x1.24 | 0.25 | 84 | x0.25 | x0.26 | - |
| pruned | - | - | - | - | - | - | - | - | - | - | - | - | board: expected a ratio below 1, found 1 |
"""  # noqa: E501 - a table as it stands in a file


def test_markdown_has_the_papers_columns_and_the_changes(small: Table):
    text = render("markdown", small)
    assert METHODS.strip() in text
    assert "Baseline: untouched." in text
    flips = text.split("## Flips")[1]
    assert "| dynamic (model.int8\\_dynamic.onnx in onnxruntime int8) | untouched | 100 | 96.00 | 4 | 0 | same -4.00" in flips
    assert flips.count("untouched (model.fp32.onnx in onnxruntime fp32)") == 0  # the baseline's own answers


def test_weights_and_seconds_stand_where_the_paper_has_them(tmp_path: Path):
    notes = {"steps": [{"decompose": {"seconds": 0.25}}]}
    rows = [row("untouched", [FP32], paper={"params_m": 22.1}), row("svd", [INT8], paper={"params_m": 11.1, "seconds": 3.2}, notes=notes)]
    text = render("markdown", made_table(write_study(tmp_path, study(rows=rows))))
    heads, _, first, second = [line.strip("| ").split(" | ") for line in text.split("## Methods")[1].strip().splitlines()[2:6]]
    of = [dict(zip(heads[heads.index("M params") :], line[heads.index("M params") :], strict=True)) for line in (first, second)]
    assert [one["method, s"] for one in of] == ["-", "0.25"]
    assert first[heads.index("M params") + 1] == "22.1" and second[heads.index("M params") + 1] == "11.1"
    assert second[heads.index("method, s") + 1] == "3.2"


def test_every_markdown_table_has_as_many_cells_in_each_line(small: Table):
    tables = [part.splitlines() for part in render("markdown", small).split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_markdown_text_stays_text(tmp_path: Path):
    table = made_table(write_study(tmp_path, study(rows=[row(NASTY, [FP32]), row("b", [INT8])], baseline="b", study=NASTY)))
    text = render("markdown", table)
    assert "<img" not in text and "</script" not in text
    assert "\\|" in text and "\\`b\\`" in text


def test_terminal_fits_its_width_and_has_no_colour_codes(small: Table):
    text = render("table", small)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "…" not in text
    for word in ("Methods: small", "paper 98.73", "slower x0.75", "not measured: pruned on board: expected a ratio below 1"):
        assert word in text
    assert render("table", small, 160) != text


def test_terminal_keeps_brackets_and_colons(tmp_path: Path):
    measured = replace(FP32, recipe="[bold]x :smile:")
    text = render("table", made_table(write_bench(tmp_path / "a.json", [measured])), 160)
    assert "[bold]x :smile:" in text


def test_problems_and_what_was_left_out_are_in_every_format(small: Table):
    table = replace(small, problems=("bad.json: half a file",), left_out=("notes.json: no measurements of vitedge",))
    for name in names(FORMATS):
        if name == "csv":  # a line a measurement, and nothing else
            continue
        if name == "html":
            pytest.importorskip("plotly")
        text = " ".join(render(name, table).split())
        assert "half a file" in text and "notes.json" in text
