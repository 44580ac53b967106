"""`vitedge report` through its entry point: formats by option and by ending, exit codes, one line per bad file, nothing else on stdout."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.made import make_build, make_images, write_profile
from tests.report.made import FP32, INT8, write_bench, write_study
from vitedge.cli.main import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "small")


def test_a_studys_table_is_the_default(capsys: pytest.CaptureFixture[str]):
    assert run(["report", "small"]) == 0
    captured = capsys.readouterr()
    assert "Methods: small" in captured.out and "slower x0.75" in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100
    assert captured.err == ""


def test_the_ending_chooses_the_format_and_the_option_wins(capsys: pytest.CaptureFixture[str]):
    for name in ("a.csv", "a.json", "a.md", "a.txt", "a.CSV"):
        assert run(["report", "small", "-o", name]) == 0
    assert run(["report", "small", "-o", "b.txt", "--format", "csv"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "wrote a.md" in captured.err
    assert Path("a.csv").read_text() == Path("b.txt").read_text() == Path("a.CSV").read_text()
    with Path("a.csv").open(encoding="utf-8", newline="") as lines:
        assert len(list(csv.DictReader(lines))) == 4
    assert json.loads(Path("a.json").read_text())["schema_version"] == 1
    assert Path("a.md").read_text().startswith("# small\n")
    assert "Methods: small" in Path("a.txt").read_text()
    assert not list(Path().glob(".*.part"))


def test_a_page_is_written_whole(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("plotly", reason="the page needs the [report] extra")
    assert run(["report", "small", "-o", "report.html"]) == 0
    text = Path("report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    assert "wrote report.html" in capsys.readouterr().err


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]):
    assert run(["report", "small", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in content["rows"]] == ["untouched", "untouched", "dynamic", "pruned"]


def test_baseline_is_named_by_the_option(capsys: pytest.CaptureFixture[str]):
    assert run(["report", "small", "--baseline", "dynamic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baselines"] == ["dynamic"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nowhere"], 2, "nowhere"),
        ([], 2, "PATH"),
        (["small", "--baseline", "dynamik"], 2, "did you mean 'dynamic'"),
        (["small", "--format", "excel"], 2, "excel"),
        (["small", "-o", "report.xls"], 2, ".html"),
        (["small", "-o", "no/such/folder/a.csv"], 1, "a.csv"),
        (["small", "--json", "--format", "csv"], 2, "--format csv"),
        (["small", "--json", "-o", "a.json"], 2, "-o a.json"),
        (["small", "--pictures", "nowhere"], 2, "nowhere"),
        (["empty"], 2, "vitedge bench"),
        (["bad.json"], 1, "bad.json"),
    ],
)
def test_errors_are_one_line_with_their_code(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, words: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    before = set(tmp_path.rglob("*"))
    assert run(["report", *args]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]
    assert "Traceback" not in captured.err
    assert set(tmp_path.rglob("*")) == before


def test_a_bad_file_is_a_line_and_exit_1_and_the_rest_is_reported(capsys: pytest.CaptureFixture[str]):
    Path("bad.json").write_text("{")
    assert run(["report", "small", "bad.json", "--json"]) == 1
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert len(content["rows"]) == 4 and len(content["problems"]) == 1
    assert [line for line in captured.err.splitlines() if line.startswith("error: ")] == [f"error: {content['problems'][0]}"]


def test_without_plotly_the_page_names_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert run(["report", "small", "-o", "a.html"]) == 4
    assert "pip install 'vitedge[report]'" in capsys.readouterr().err
    assert not Path("a.html").exists()


def test_two_benches_side_by_side(capsys: pytest.CaptureFixture[str]):
    write_bench(Path("a.json"), [FP32])
    write_bench(Path("b.json"), [INT8])
    assert run(["report", "a.json", "b.json", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert first["speed_vs_baseline"] == "baseline"
    assert second["speed_ratio_vs_baseline"] == pytest.approx(1.5)
    assert (second["broken_images_vs_baseline"], second["repaired_images_vs_baseline"]) == (4, 0)


def test_what_a_real_bench_measured_is_reported_with_flips(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = make_images(tmp_path / "insects")
    make_build(tmp_path / "build" / "tiny", data=images)
    board = write_profile(tmp_path / "board.yaml", batch_sizes=[1])
    quick = ["--rounds", "2", "--seconds", "0.02", "--iterations", "7"]
    assert run(["bench", "--device", str(board), *quick]) == 0
    capsys.readouterr()
    assert run(["report", "build", "--json"]) == 0
    fp32, int8 = json.loads(capsys.readouterr().out)["rows"]
    assert (fp32["artifact"], fp32["speed_vs_baseline"], fp32["top1_vs_baseline"]) == ("model.fp32.onnx", "baseline", "baseline")
    assert int8["speed_vs_baseline"] in ("faster", "same", "slower")
    assert int8["speed_ratio_low_vs_baseline"] < int8["speed_ratio_vs_baseline"] < int8["speed_ratio_high_vs_baseline"]
    lost = 24 * (fp32["top1_percent"] - int8["top1_percent"]) / 100
    assert int8["broken_images_vs_baseline"] - int8["repaired_images_vs_baseline"] == pytest.approx(lost)
    assert 0 <= int8["agreement_percent_vs_baseline"] <= 100


def test_help_and_a_table_load_neither_plotly_nor_an_engine(tmp_path: Path):
    code = (
        "import sys\nfrom vitedge.cli.main import run\n"
        "assert run(['report', 'small']) == 0\n"
        "assert not {'plotly', 'torch', 'onnxruntime', 'openvino', 'optuna', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
