"""`vitedge search` through its entry point, as far as nothing is built: listing, planning, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bench.made import write_profile
from tests.recipes_for_tests import write_recipe
from vitedge.cli.main import run
from vitedge.schema import list_files


@pytest.fixture
def space(tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    return write(tmp_path, colours)


def write(folder: Path, data: Path, **changes: Any) -> Path:
    recipe = write_recipe(folder, data, quantize={"schemes": ["onnxruntime.int8_dynamic"]})
    content = {
        "recipe": str(recipe),
        "space": {"steps.train.lr": {"float": [1e-4, 1e-3, "log"]}, "seed": {"int": [0, 3]}},
        "device": str(write_profile(folder / "board.yaml", budgets={"size_mib": 1.0})),
        "constraints": {"max_top1_drop": 1.0},
        "trials": 7,
        **changes,
    }
    path = folder / "a_search.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def failing(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = run(["search", *map(str, args)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.err


def test_shipped_searches_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["search", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in list_files("searches")) and "deit_tiny_112" in out
    assert run(["search", "--list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["searches"]] == list(list_files("searches"))


def test_a_dry_run_says_what_would_be_tried_and_writes_nothing(space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(["search", str(space), "--dry-run", "--json", "-o", "out", "--trials", "5"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["trials"] == 5 and plain["combinations"] is None and plain["device"] == "board"
    assert plain["limits"] == {"max_top1_drop": 1.0, "max_size_mib": 1.0}
    assert plain["first"] == [{"seed": 0}]
    assert plain["seconds_estimated"] == pytest.approx(plain["seconds_baseline"] + 5 * plain["seconds_trial"], abs=5)
    assert run(["search", str(space), "--dry-run", "-o", "out", "--minutes", "1"]) == 0
    err = capsys.readouterr().err
    assert "endless combinations, 7 to be tried" in err and "seed: 0, 1, 2, 3" in err and "max_size_mib 1" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_wrong_is_one_line_and_exit_code_2(space: Path, tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    cases: list[tuple[list[object], list[str]]] = [
        ([], ["a search by name or path", "--list"]),
        (["tiny_dema"], ["did you mean 'tiny_demo'", "vitedge search --list"]),
        (["nowhere/a.yaml"], ["nowhere/a.yaml"]),
        ([space, "-o", tmp_path / "mine"], ["an empty folder or one of a search"]),
        ([space, "-o", space], ["a file"]),
        ([space, "--device", "no_such_device"], ["no_such_device"]),
        ([space, "--data", "./nowhere"], ["nowhere"]),
        ([space, "--weights", "nowhere.safetensors"], ["nowhere.safetensors"]),
        ([space, "--trials", "0"], ["trials"]),
    ]
    for args, words in cases:
        code, err = failing(capsys, *args, "--dry-run")
        assert code == 2, err
        assert all(word in err for word in words), err
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    bad = write(tmp_path, colours, measure={"runtimes": ["openvin"]})
    code, err = failing(capsys, bad, "--dry-run")
    assert code == 2 and "openvin" in err
    latency = str(write_profile(tmp_path / "fast.yaml", budgets={"latency_ms": 5.0}))
    code, err = failing(capsys, write(tmp_path, colours, measure={"batch_size": 2}, device=latency), "--dry-run")
    assert code == 2 and "measure.batch_size" in err


def test_a_gpu_that_is_not_here_is_exit_code_4(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if list(Path("/proc/driver/nvidia").glob("gpus/*")):
        pytest.skip("this host has a GPU")
    use = {"runtime": "onnxruntime", "provider": "CUDAExecutionProvider"}
    device = write_profile(tmp_path / "gpu.yaml", accelerator="cuda", runtimes=[use])
    code, err = failing(capsys, write(tmp_path, colours, device=str(device)), "--dry-run")
    assert code == 4 and "an NVIDIA GPU" in err
