"""The stages: what runs, what is reused and why, and that nothing half-written is ever left under a final name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.recipes_for_tests import write_recipe
from vitedge import pipeline
from vitedge.artifact import Manifest, hash_files
from vitedge.cli.main import run
from vitedge.errors import VitedgeError

FILES = (
    "checkpoint.safetensors",
    "model.fp32.onnx",
    "model.fp32.batch1.onnx",
    "model.int8_dynamic.onnx",
    "model.int8_static.onnx",
    "openvino.int8_static",
)


def export(*args: object, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert run(["export", *map(str, args), "--json"]) == 0, capsys.readouterr().err
    out: dict[str, object] = json.loads(capsys.readouterr().out)
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> tuple[Path, Path]:
    """The small recipe, built once."""
    folder = tmp_path_factory.mktemp("built")
    recipe = write_recipe(folder, colours)
    assert run(["export", "--recipe", str(recipe), "-o", str(folder / "out")]) == 0
    return recipe, folder / "out"


def actions(result: dict[str, object]) -> dict[str, str]:
    return {stage["stage"]: stage["action"] for stage in result["stages"]}  # type: ignore[attr-defined]


def test_everything_is_built_with_hash_parent_contract_and_labels(built: tuple[Path, Path]) -> None:
    manifest = Manifest.load(built[1])
    assert tuple(sorted(manifest.artifacts)) == tuple(sorted(FILES))
    fp32 = manifest.artifacts["model.fp32.onnx"]
    for artifact in manifest.artifacts.values():
        assert hash_files(list(artifact.files)) == artifact.sha256
        assert sum(path.stat().st_size for path in artifact.files) == artifact.size_bytes
        assert artifact.labels == ("blue", "green", "red")
        assert artifact.contract() == fp32.contract()
        assert artifact.recipe == "small"
        if artifact.scheme != "fp32":
            assert artifact.parent == fp32.sha256
            assert artifact.size_bytes < fp32.size_bytes
    assert fp32.parent == manifest.artifacts["checkpoint.safetensors"].sha256
    assert fp32.notes["parity"]["max_abs_err"] < 1e-3
    assert not list(built[1].glob(".*.part")) and not (built[1] / ".work").exists()
    steps = manifest.artifacts["checkpoint.safetensors"].notes["steps"]
    assert steps[0]["train"]["validation_top1"] > 90.0


def test_a_second_export_reuses_everything_without_torch(built: tuple[Path, Path]) -> None:
    code = (
        "import sys\nfrom vitedge.cli.main import run\n"
        f"code = run(['export', '--recipe', {str(built[0])!r}, '-o', {str(built[1])!r}, '--json'])\n"
        "assert code == 0 and not {'torch', 'openvino', 'nncf', 'onnxruntime'} & set(sys.modules), set(sys.modules)\n"
    )
    before = {path: path.stat().st_mtime_ns for path in built[1].rglob("*.*") if path.name not in ("recipe.yaml", ".lock")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(actions(json.loads(done.stdout)).values()) == {"reuse"}
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("changes", "run_stages", "reason"),
    [
        (
            {"quantize": {"calibration": {"images": 8}, "schemes": ["onnxruntime.int8_dynamic", "onnxruntime.int8_static"]}},
            {"quantize onnxruntime.int8_static"},
            "calibration changed",
        ),
        (
            {"export": {"parity_images": 9}},
            {"export", "quantize onnxruntime.int8_dynamic", "quantize onnxruntime.int8_static", "quantize openvino.int8_static"},
            "export changed",
        ),
        (
            {"seed": 1},
            {
                "checkpoint",
                "export",
                "quantize onnxruntime.int8_dynamic",
                "quantize onnxruntime.int8_static",
                "quantize openvino.int8_static",
            },
            "seed changed",
        ),
        ({"limits": {"max_top1_drop": 1.0}, "description": "other words"}, set(), ""),
    ],
)
def test_only_what_a_change_touches_is_stale(
    built: tuple[Path, Path],
    colours: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    run_stages: set[str],
    reason: str,
) -> None:
    recipe = write_recipe(tmp_path, colours, **changes)
    result = export("--recipe", recipe, "-o", built[1], "--dry-run", capsys=capsys)
    assert {stage for stage, action in actions(result).items() if action == "run"} == run_stages
    assert reason in json.dumps(result["stages"])


def test_dry_run_writes_nothing(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, colours)
    result = export("--recipe", recipe, "-o", tmp_path / "out", "--dry-run", capsys=capsys)
    assert set(actions(result).values()) == {"run"} and not (tmp_path / "out").exists()
    assert all(stage["seconds_estimated"] > 0 for stage in result["stages"])  # type: ignore[attr-defined]


def test_a_file_changed_by_hand_is_built_again(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(
        tmp_path, colours, quantize={"schemes": ["onnxruntime.int8_dynamic"]}, steps=[{"train": {"steps": 2, "precision": "fp32"}}]
    )
    export("--recipe", recipe, "-o", tmp_path / "out", capsys=capsys)
    file = tmp_path / "out" / "model.int8_dynamic.onnx"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    result = export("--recipe", recipe, "-o", tmp_path / "out", capsys=capsys)
    assert actions(result) == {"checkpoint": "reuse", "export": "reuse", "quantize onnxruntime.int8_dynamic": "run"}
    assert file.read_bytes() == good
    (tmp_path / "out" / "model.fp32.onnx").unlink()
    again = export("--recipe", recipe, "-o", tmp_path / "out", capsys=capsys)
    assert actions(again)["export"] == "run" and actions(again)["checkpoint"] == "reuse"
    assert file.read_bytes() == good


def test_killed_while_it_trains_the_next_call_goes_on(tmp_path: Path, colours: Path, built: tuple[Path, Path]) -> None:
    recipe = write_recipe(tmp_path, colours, quantize={})
    command = [sys.executable, "-m", "vitedge", "export", "--recipe", str(recipe), "-o", str(tmp_path / "out")]
    work = tmp_path / "out" / ".work"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "CI": "1"})
    deadline = time.monotonic() + 120
    while not list(work.rglob("train.state.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()
    (tmp_path / "out" / ".model.fp32.onnx.x1.part").mkdir()  # what a kill while a file is written leaves
    assert run(command[3:]) == 0
    assert not list((tmp_path / "out").glob(".*.part"))
    assert tuple(sorted(Manifest.load(tmp_path / "out").artifacts)) == tuple(sorted(FILES[:3]))
    # Bit-exact: the interrupted run ends with the uninterrupted one's weights.
    assert (tmp_path / "out" / "checkpoint.safetensors").read_bytes() == (built[1] / "checkpoint.safetensors").read_bytes()


def test_train_alone_writes_the_checkpoint_that_export_reuses(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(
        tmp_path, colours, quantize={}, steps=[{"train": {"steps": 2, "precision": "fp32"}}, {"train": {"steps": 3, "precision": "fp32"}}]
    )
    assert run(["train", "--recipe", str(recipe), "-o", str(tmp_path / "out"), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["checkpoint"]["notes"]
    assert [step["train"]["steps"] for step in notes["steps"]] == [2, 3]
    result = export("--recipe", recipe, "-o", tmp_path / "out", capsys=capsys)
    assert actions(result) == {"checkpoint": "reuse", "export": "run"}


def test_a_rebuild_that_fails_leaves_the_recipe_of_what_is_there(
    built: tuple[Path, Path], tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the new split beside the old weights, their validation images would be those that they were trained on."""
    shutil.copytree(built[1], tmp_path / "out")
    before = (tmp_path / "out" / "recipe.yaml").read_text()

    def fails(*args: object) -> None:
        raise VitedgeError("x", expected="a training", found="a power cut", fix="try again")

    monkeypatch.setattr(pipeline.Pipeline, "_run_checkpoint", fails)
    assert run(["export", "--recipe", str(write_recipe(tmp_path, colours, validation=0.3)), "-o", str(tmp_path / "out")]) == 1
    assert "a power cut" in capsys.readouterr().err and (tmp_path / "out" / "recipe.yaml").read_text() == before


def test_a_folder_with_other_files_is_kept(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, colours)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert run(["export", "--recipe", str(recipe), "-o", str(tmp_path / "mine")]) == 2
    assert "expected an empty folder or one that vitedge built" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.name != ".lock"] == ["thesis.txt"]


@pytest.mark.parametrize("stage", ["checkpoint", "export", "quantize"])
def test_another_version_of_a_stage_or_of_its_tools_makes_it_anew(
    stage: str, built: tuple[Path, Path], colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, colours)

    def reasons() -> dict[str, str]:
        result = export("--recipe", recipe, "-o", built[1], "--dry-run", capsys=capsys)
        return {one["stage"].split(" ")[0]: one["reason"] for one in result["stages"]}  # type: ignore[attr-defined]

    assert set(reasons().values()) == {"nothing changed"}
    versions = {**pipeline.STAGE_VERSIONS, stage: -1}
    monkeypatch.setattr(pipeline, "STAGE_VERSIONS", versions)
    assert reasons()[stage] == "version changed"
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "tool_versions", lambda names: dict.fromkeys(names, "0.0"))
    assert reasons()["checkpoint"] == "tools changed"


def test_one_folder_is_built_by_one_process(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write_recipe(tmp_path, colours), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        for command in ("export", "train"):
            assert run([command, "--recipe", str(recipe), "-o", str(out)]) == 2
            assert "expected no other build of this folder, found one is running" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_files_for_a_gpu_are_built_where_there_is_none(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A workstation builds for a board; what the profile says decides the integer types."""
    result = export("--recipe", write_recipe(tmp_path, colours), "-o", tmp_path / "out", "--device", "cuda", "--dry-run", capsys=capsys)
    assert set(actions(result).values()) == {"run"} and "quantize onnxruntime.int8_static" in actions(result)


def test_a_dry_run_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vitedge.data import download

    fetched: list[object] = []
    monkeypatch.setattr(download, "fetch", lambda *args: fetched.append(args))
    for command in ("export", "train"):
        assert run([command, "--recipe", "deit_tiny_32_untied", "-o", str(tmp_path / "out"), "--dry-run"]) == 2
        assert "vitedge data fetch cifar10" in capsys.readouterr().err
    assert not fetched and not (tmp_path / "out").exists()


def test_files_of_older_weights_go_with_them(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or they would be measured against the new ones, and shipped in their place."""
    schemes, train = ["onnxruntime.int8_dynamic", "onnxruntime.int8_weights"], {"steps": 2, "precision": "fp32"}
    out = tmp_path / "out"
    export("--recipe", write_recipe(tmp_path, colours, quantize={"schemes": schemes}, steps=[{"train": train}]), "-o", out, capsys=capsys)
    fewer = write_recipe(tmp_path, colours, quantize={"schemes": schemes[:1]}, steps=[{"train": train}])
    export("--recipe", fewer, "-o", out, capsys=capsys)
    assert "model.int8_weights.onnx" in Manifest.load(out).artifacts, "of the same weights: it may stay"
    other = write_recipe(tmp_path, colours, quantize={"schemes": schemes[:1]}, steps=[{"train": train}], seed=1)
    export("--recipe", other, "-o", out, capsys=capsys)
    left = Manifest.load(out)
    assert "model.int8_weights.onnx" not in left.artifacts and not (out / "model.int8_weights.onnx").exists()
    assert "quantize onnxruntime.int8_weights" not in left.stages
    assert {a.parent for a in left.artifacts.values()} <= {"", *(a.sha256 for a in left.artifacts.values())}


def test_overwrite_mends_a_damaged_manifest(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, colours, quantize={}, steps=[{"train": {"steps": 2, "precision": "fp32"}}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"schema_version": 0}')
    assert run(["export", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    export("--recipe", recipe, "-o", tmp_path / "out", "--overwrite", capsys=capsys)
    assert "model.fp32.onnx" in Manifest.load(tmp_path / "out").artifacts
