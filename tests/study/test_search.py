"""A search as a whole, on a tiny recipe in real engines and a real storage: built, killed, gone on with, shared by workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bench.made import write_profile
from tests.recipes_for_tests import write_recipe
from vitedge.artifact import Manifest
from vitedge.cli.main import run
from vitedge.recipe import load_recipe
from vitedge.schema import load_yaml

pytest.importorskip("optuna")

SCHEME = "quantize.schemes.onnxruntime.int8_dynamic"
# The smallest file there is in the space, so that no other dominates it.
GOOD = {f"{SCHEME}.per_channel": False, f"{SCHEME}.op_types": ["MatMul", "Gemm"], f"{SCHEME}.exclude": []}


@dataclass(frozen=True)
class Made:
    """A search that ran to its end.

    Attributes:
        space: The search file.
        folder: Where everything is.
        result: What it printed.
    """

    space: Path
    folder: Path
    result: dict[str, Any]


def write_search(folder: Path, data: Path, **changes: Any) -> Path:
    """One training, and eight ways to quantize it, half of which leave out nodes that are not there."""
    step = {"train": {"steps": 20, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "shift": 1}}
    recipe = write_recipe(folder, data, steps=[step], quantize={"schemes": ["onnxruntime.int8_dynamic"]})
    content = {
        "recipe": str(recipe),
        "space": {
            f"{SCHEME}.per_channel": {"choice": [True, False]},
            f"{SCHEME}.op_types": {"choice": [["MatMul", "Gemm"], ["MatMul"]]},
            f"{SCHEME}.exclude": {"choice": [[], ["no such node *"]]},
        },
        # The model as it was teaches, in a folder of its own: the recipes that come out must find it from anywhere.
        "steps": [{"distill": {"teacher": "small", "kind": "soft"}}, step],
        "first": [GOOD, GOOD, {**GOOD, f"{SCHEME}.exclude": ["no such node *"]}],
        "constraints": {"max_top1_drop": 100.0},
        "measure": {"rounds": 2, "seconds": 0.02, "iterations": 6, "artifacts": ["model.int8_dynamic.onnx"]},
        "device": str(write_profile(folder / "board.yaml")),
        "trials": 3,
        **changes,
    }
    path = folder / "small_search.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Made:
    """The search, run once: a good trial, the same again, one that fails, and one that is drawn."""
    folder = tmp_path_factory.mktemp("search")
    space, root = write_search(folder, colours), folder / "out"
    done = vitedge("search", space, "-o", root, "--json")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("trial ")]
    assert len(lines) == len(json.loads(done.stdout)["trials"])
    assert "the settings of trial 0" in lines[1] and "failed: exclude" in lines[2] and "left" in lines[0]
    return Made(space, root, json.loads(done.stdout))


def vitedge(*args: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vitedge", *map(str, args)], capture_output=True, text=True, timeout=280, env={**os.environ, "CI": "1"}
    )


def by_number(result: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {trial["number"]: trial for trial in result["trials"]}


def test_trials_are_built_once_fail_with_their_reason_and_are_told(made: Made) -> None:
    result, trials = made.result, by_number(made.result)
    assert result == json.loads((made.folder / "search.json").read_text())
    assert result["schema_version"] == 1 and result["ended"] == "3 different settings were tried"
    assert (trials[0]["state"], trials[0]["duplicate_of"], trials[0]["failure"]) == ("complete", None, None)
    assert trials[0]["settings"] == GOOD
    assert trials[1]["duplicate_of"] == 0 and trials[1]["seconds"] < trials[0]["seconds"] / 2
    assert trials[2]["state"] == "failed" and "no such node" in trials[2]["failure"]
    counted = [trial for trial in trials.values() if trial["duplicate_of"] is None]
    assert len(counted) == 3 == len({trial["digest"] for trial in counted})
    # All recipes have the same fp32 model, which was trained once for the baseline and once for them.
    folders = [path for path in (made.folder / "trials").iterdir() if path.is_dir()]
    assert len(folders) == 2 and (made.folder / "trials" / "small").is_dir()


def test_every_file_is_a_point_against_the_baseline_of_the_same_run(made: Made) -> None:
    result = made.result
    base = [point for point in result["points"] if point["trial"] is None]
    own = [point for point in result["points"] if point["trial"] is not None]
    assert {point["artifact"] for point in base} == {"model.fp32.onnx", "model.int8_dynamic.onnx"}
    assert {point["artifact"] for point in own} == {"model.int8_dynamic.onnx"}
    fastest = max(base, key=lambda point: point["images_per_s"])
    assert result["baseline"]["fastest"].startswith(fastest["artifact"]) and fastest["speed_ratio"] == 1.0
    assert min(point["size_ratio"] for point in base) == 1.0 and min(point["top1_drop"] for point in base) == 0.0
    for point in own:
        assert point["speed_low"] <= point["speed_ratio"] <= point["speed_high"]
        assert point["size_mib"] == pytest.approx(point["size_ratio"] * result["baseline"]["smallest_mib"])
        assert point["images"].startswith("24 validation images")
        assert point["inside"] and point["misses"]["max_top1_drop"] < 0
    same = next(point for point in own if point["trial"] == 0)
    twin = next(point for point in base if point["artifact"] == "model.int8_dynamic.onnx")
    assert 0.9 * twin["size_mib"] < same["size_mib"] < twin["size_mib"]  # one scale for a matrix in the place of one for each column


def test_the_test_split_judges_the_winner_alone_and_once(made: Made) -> None:
    winner = made.result["winner"]
    assert winner["test"]["images"].startswith("36 test images") and 0 <= winner["test"]["top1"] <= 100
    inside = [point for point in made.result["points"] if point["inside"]]
    settled = [point for point in inside if not point["unstable"]] or inside
    assert winner["gain"] == max(point["gain"] for point in settled)
    speed = winner["test"]["speed"]
    assert speed is None or (speed["rounds"] == 6 and speed["interval"][0] <= speed["ratio"] <= speed["interval"][1])
    for folder in (made.folder / "trials").iterdir():
        for artifact in Manifest.load(folder).artifacts.values():
            assert "test" not in artifact.notes
    before = (made.folder / "winner.json").stat().st_mtime_ns
    again = vitedge("search", made.space, "-o", made.folder, "--json")
    assert again.returncode == 0, again.stderr
    assert (made.folder / "winner.json").stat().st_mtime_ns == before
    found = json.loads(again.stdout)
    assert found == made.result and not [line for line in again.stderr.splitlines() if line.startswith("trial ")]


def test_the_result_is_a_table_for_people(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["search", str(made.space), "-o", str(made.folder)]) == 0
    out = capsys.readouterr().out
    assert "winner: " in out and "winner on 36 test images" in out and "Pareto set in top1, images_per_s, mib" in out
    assert "trial 2 failed: " in out and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_pareto_set_is_recipes_that_export(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = made.result["recipes"]
    on_front = {point["settings"] for point in made.result["points"] if point["on_front"] and point["trial"] is not None}
    assert set(recipes) == on_front and sorted(map(str, (made.folder / "pareto").iterdir())) == sorted(recipes.values())
    assert recipes, "no trial is on the front"
    path = Path(next(iter(recipes.values())))
    assert Path(load_yaml(path)["steps"][0]["distill"]["teacher"]).is_absolute(), "it exports from this folder alone"
    text = path.read_text()
    assert f"#   vitedge export --recipe {path}" in text and "# Expect: model.int8_dynamic.onnx in onnxruntime int8: images/s x" in text
    assert load_recipe(str(path)).name == path.stem and "name" not in load_yaml(path)
    assert run(["export", "--recipe", str(path), "-o", str(tmp_path / "out"), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {stage["stage"] for stage in stages} == {"checkpoint", "export", "quantize onnxruntime.int8_dynamic"}
    built = Manifest.load(tmp_path / "out").artifacts["model.int8_dynamic.onnx"]
    trial = next(folder for folder in (made.folder / "trials").iterdir() if folder.name != "small")
    assert (
        Manifest.load(trial).artifacts["checkpoint.safetensors"].sha256
        == Manifest.load(tmp_path / "out").artifacts["checkpoint.safetensors"].sha256
    )
    settings = next(settings for settings, place in recipes.items() if place == str(path))
    (point,) = [point for point in made.result["points"] if point["on_front"] and point["settings"] == settings]
    assert built.sha256 == point["sha256"]


def test_another_search_in_the_same_folder_is_refused(
    made: Made, tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_search(tmp_path, colours, constraints={"max_top1_drop": 1.0})
    shutil.copytree(made.folder, tmp_path / "out")
    assert run(["search", str(other), "-o", str(tmp_path / "out")]) == 2
    assert "the search that was begun here" in capsys.readouterr().err


QUERY = "select count(*) from trials join trial_user_attributes using (trial_id) where state = 'RUNNING' and key = 'worker'"


def running(database: Path) -> int:
    """Trials that are being run and are signed, as the storage has it."""
    with sqlite3.connect(database, timeout=30) as connection:
        count: int = connection.execute(QUERY).fetchone()[0]
    connection.close()
    return count


@pytest.mark.slow
def test_a_killed_workers_trial_is_run_again_and_two_workers_share_the_rest(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(made.folder, root)
    command = [sys.executable, "-m", "vitedge", "search", str(made.space), "-o", str(root), "--trials", "5", "--json"]
    quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "CI": "1"}}
    first = subprocess.Popen(command, **quiet)
    deadline = time.monotonic() + 120
    while not running(root / "study.db") and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert running(root / "study.db") == 1
    workers = [subprocess.Popen(command, **quiet) for _ in range(2)]
    ended = [worker.communicate(timeout=250) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    assert sum("was lost with its process" in err for _, err in ended) == 1
    assert running(root / "study.db") == 0
    result = json.loads((root / "search.json").read_text())
    counted = [trial for trial in result["trials"] if trial["duplicate_of"] is None]
    assert len(counted) == 5 == len({trial["digest"] for trial in counted})
    assert result["winner"]["test"]["images"].startswith("36 test images")
    # What was there is there still, to the last figure.
    kept = [point for point in result["points"] if point["trial"] in (None, *by_number(made.result))]
    strip = [{key: value for key, value in point.items() if key != "on_front"} for point in kept]
    assert strip == [{key: value for key, value in point.items() if key != "on_front"} for point in made.result["points"]]


@pytest.mark.slow
def test_nothing_inside_the_limits_is_exit_code_3_and_no_winner(made: Made, tmp_path: Path, colours: Path) -> None:
    space = write_search(tmp_path, colours, constraints={"max_size_mib": 0.001}, trials=1)
    shutil.copytree(made.folder / "trials", tmp_path / "out" / "trials")  # so that nothing has to be built again
    done = vitedge("search", space, "-o", tmp_path / "out", "--json")
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout)
    assert result["winner"] is None and "misses max_size_mib" in done.stderr and not (tmp_path / "out" / "winner.json").exists()
    assert len(result["points"]) == 3 and all(point["misses"]["max_size_mib"] > 0 for point in result["points"])


def test_what_cannot_run_here_fails_its_own_trial_and_a_missing_package_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed back, such a trial would be the next one's again, and the search could never end."""
    from vitedge.errors import ExtraMissingError, InputError, UnavailableError, extra_missing
    from vitedge.study import trial

    def fails(error: UnavailableError) -> None:
        def raises(*args: object) -> None:
            raise error

        monkeypatch.setattr(trial, "_measure_trial", raises)
        trial.measure_trial(None, None, load_recipe("deit_tiny_int8"), 0, None)  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"settings that run on this host, found x: expected fp16.*change the space"):
        fails(UnavailableError("x", expected="fp16", found="none", fix="leave it out"))
    with pytest.raises(ExtraMissingError, match="pip install"):
        fails(extra_missing("x", "openvino"))


def test_a_winner_that_cannot_be_judged_ends_the_search_all_the_same(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitedge.errors import InputError
    from vitedge.study import outcome

    def other_bytes(*args: object) -> None:
        raise InputError("trials/x", expected="the file as it was measured", found="other bytes", fix="search again")

    shutil.copytree(made.folder, tmp_path / "out")
    monkeypatch.setattr(outcome, "test_winner", other_bytes)
    assert run(["search", str(made.space), "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["winner"]["test"] == {"reason": "trials/x: expected the file as it was measured, found other bytes; search again"}
    assert set(found["recipes"]) == set(made.result["recipes"])
