"""`vitedge package` and `vitedge verify` through the command line's own entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.package.building import make_build, row, write_profile, write_report
from vitedge.artifact import Manifest
from vitedge.cli.main import run


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder without data sets."""
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_build(tmp_path / "tiny")
    write_profile(tmp_path / "board.yaml")


PACKAGE = ["package", "tiny", "--device", "./board.yaml"]


def test_package_then_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PACKAGE) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "chosen model.fp32.onnx (onnxruntime fp32) at 100.0 it/s" in told.err
    assert "synthetic" in told.err and "wrote tiny-board.zip" in told.err
    assert run(["verify", "tiny-board.zip"]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "ok  golden: 4 pictures" in told.err


def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PACKAGE, "-o", "out/a.zip", "--golden", "1", "--json"]) == 0
    packaged = json.loads(capsys.readouterr().out)
    assert packaged["schema_version"] == 1 and packaged["artifact"]["name"] == "model.fp32.onnx"
    assert run(["verify", "out/a.zip", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["ok"] is True and verified["sha256"] == packaged["sha256"]
    assert [check["name"] for check in verified["checks"]] == ["archive", "hashes", "contents", "processor", "golden"]
    assert run(["verify", "out/a.zip", "--no-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"][-1]["name"] == "runner"


def nothing_measured() -> None:
    Path("tiny/report.json").unlink()


def too_inaccurate() -> None:
    artifact = Manifest.load(Path("tiny")).artifacts["model.fp32.onnx"]
    write_report(Path("tiny"), [row(artifact.name, artifact.sha256, precision="int8", top1_drop={"points": 3.0})])


def report_damaged() -> None:
    Path("tiny/report.json").write_text("{")


def manifest_damaged() -> None:
    Path("tiny/manifest.json").write_text('{"schema_version": 1}')


def recipe_gone() -> None:
    Path("tiny/recipe.yaml").unlink()


def model_gone() -> None:
    Path("tiny/model.fp32.onnx").unlink()


def output_there() -> None:
    Path("tiny-board.zip").write_text("mine")


def model_changed() -> None:
    with Path("tiny/model.fp32.onnx").open("ab") as stream:
        stream.write(b"\0")


WRONG: dict[str, tuple[Any, list[str], int, str]] = {
    "nothing measured": (nothing_measured, PACKAGE, 2, "vitedge bench --device board"),
    "outside the limits": (too_inaccurate, PACKAGE, 3, "top-1 drop 3.00 > 0.50"),
    "report damaged": (report_damaged, PACKAGE, 1, "report.json"),
    "manifest damaged": (manifest_damaged, PACKAGE, 1, "manifest.json"),
    "recipe gone": (recipe_gone, PACKAGE, 2, "no recipe.yaml"),
    "model gone": (model_gone, PACKAGE, 1, "model.fp32.onnx"),
    "model changed": (model_changed, PACKAGE, 1, "other contents"),
    "no such folder": (None, ["package", "tinny", "--device", "./board.yaml"], 2, "vitedge export"),
    "artifact misspelt": (None, [*PACKAGE, "--artifact", "model.fp23.onnx"], 2, "did you mean 'model.fp32.onnx'?"),
    "no such device": (None, ["package", "tiny", "--device", "cpuu"], 2, "cpuu"),
    "no golden": (None, [*PACKAGE, "--golden", "0"], 2, "--golden"),
    "no such data": (None, [*PACKAGE, "--data", "nowhere"], 2, "nowhere"),
    "output there": (output_there, PACKAGE, 2, "--overwrite"),
    "output a folder": (None, [*PACKAGE, "-o", "tiny"], 2, "a folder"),
    "output the model": (None, [*PACKAGE, "-o", "tiny/model.fp32.onnx", "--overwrite"], 2, "an artifact of the build folder"),
    "output below a file": (None, [*PACKAGE, "-o", "board.yaml/a.zip"], 1, "board.yaml"),
    "verify nothing": (None, ["verify", "nothing.zip"], 2, "nothing.zip"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, arguments, code, says = WRONG[case]
    if prepare:
        prepare()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(arguments) == code
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts}
    assert after == before


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that not even root may write to")
def test_a_read_only_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PACKAGE, "-o", "/sys/a.zip"]) == 1
    assert "a place that can be written" in capsys.readouterr().err


def test_overwrite_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    output_there()
    assert run([*PACKAGE, "--overwrite"]) == 0
    assert run(["verify", "tiny-board.zip"]) == 0


def test_an_error_under_json_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PACKAGE, "--artifact", "nothing", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.parametrize("name", ["package", "verify"])
def test_help_loads_nothing_heavy(name: str) -> None:
    code = (
        f"import sys; from vitedge.cli.main import run; code = run(['{name}', '--help']); "
        "heavy = {'numpy', 'pydantic', 'onnx', 'onnxruntime', 'openvino', 'torch', 'rich', 'PIL'} & set(sys.modules); "
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
