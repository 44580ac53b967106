"""Studies run whole: rows shared, failing rows isolated, workers killed and working side by side, on a real storage and real engines."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.data.made import cifar100_members, tar_of
from tests.study.made_study import answers, no_bars, plan_of, start, write_study
from vitedge.artifact import Manifest
from vitedge.errors import UnavailableError, UsageError, WorkerError
from vitedge.study import measure
from vitedge.study.origins import find_origins
from vitedge.study.plan import Plan
from vitedge.study.queue import Queue
from vitedge.study.rows import take_checkpoint
from vitedge.study.run import run_study

pytest.importorskip("optuna")
pytest.importorskip("torch")


def run(plan: Plan, said: list[str] | None = None, **options: bool) -> dict[str, dict[str, object]]:
    """Run a study here; its rows by label."""
    content, _, _ = run_study(plan, None, (said if said is not None else []).append, no_bars, **options)
    return {row["label"]: row for row in content["rows"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> tuple[Path, Path, list[str]]:
    """The tiny study, run once without interruption: its file, its folder and what was said."""
    folder = tmp_path_factory.mktemp("study")
    study, said = write_study(folder, colours), []
    run(plan_of(study, folder / "out"), said)
    return study, folder / "out", said


def test_every_row_has_figures_or_a_reason(finished: tuple[Path, Path, list[str]]) -> None:
    content = json.loads((finished[1] / "results.json").read_text())
    assert (content["schema_version"], content["study"], content["baseline"]) == (1, "tiny", "Tiny / untouched")
    plain, int8, broken = content["rows"]
    assert [m["artifact"] for m in plain["measurements"]] == ["model.fp32.onnx"]
    assert [m["artifact"] for m in int8["measurements"]] == ["model.int8_dynamic.onnx"]
    for row in (plain, int8):
        assert row["state"] == "done" and not row["failure"] and row["device"] == "board"
        (measurement,) = row["measurements"]
        assert len(measurement["rounds"]) == 2 and measurement["top1"] is not None
        assert measurement["recipe"] == Path(row["build"]).name
    assert int8["paper"] == {"top1": 90.5} and int8["untouched"] == "Tiny / untouched"
    # Interleaved in one run: the conditions are the same to the second.
    assert plain["measurements"][0]["conditions"]["date"] == int8["measurements"][0]["conditions"]["date"]
    assert broken["state"] == "failed" and not broken["measurements"] and "1e-30" in broken["failure"]
    assert content["conditions"]["board"]["device"] == "board"


def test_what_is_shared_was_built_once(finished: tuple[Path, Path, list[str]]) -> None:
    _, folder, said = finished
    begun = Counter(line for line in said if line.endswith(": begun"))
    assert begun["trained, shared: begun"] == 1 and max(begun.values()) == 1
    weights = (folder / "builds" / "trained" / "checkpoint.safetensors").stat().st_size
    assert weights > 0 and not (folder / "builds" / "trained" / "model.fp32.onnx").exists()
    plain = Manifest.load(folder / "builds" / "tiny-untouched").stages["checkpoint"]["inputs"]["weights"]
    assert plain == Manifest.load(folder / "builds" / "trained").artifacts["checkpoint.safetensors"].sha256


def test_it_says_how_far_it_is(finished: tuple[Path, Path, list[str]]) -> None:
    said = finished[2]
    broken = next(line for line in said if line.startswith("Tiny / broken on board: failed: "))
    assert "1 failed" in broken and "to go" in broken
    assert any(line.startswith("measuring 2 rows on board: done in ") for line in said)


def test_run_again_nothing_is_done_twice(finished: tuple[Path, Path, list[str]]) -> None:
    study, folder, _ = finished
    before = (folder / "results.json").read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("measurements/*.json")}
    said: list[str] = []
    run(plan_of(study, folder), said)
    assert said == [] and len(kept) == 1
    assert (folder / "results.json").read_bytes() == before
    assert kept == {path: path.stat().st_mtime_ns for path in folder.glob("measurements/*.json")}


@pytest.mark.slow
def test_a_row_that_was_mended_is_measured_together_with_the_others(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    study, folder, _ = finished
    shutil.copytree(folder, tmp_path / "out")
    mended = tmp_path / "tiny.yaml"
    mended.write_text(study.read_text().replace("1.0e-30", "0.01"))
    said: list[str] = []
    rows = run(plan_of(mended, tmp_path / "out"), said)
    assert [line for line in said if line.endswith("begun")] == ["Tiny / broken on board: begun", "measuring 3 rows on board: begun"]
    dates = {row["measurements"][0]["conditions"]["date"] for row in rows.values()}  # type: ignore[index]
    assert len(rows) == 3 and len(dates) == 1


def test_a_failed_row_is_tried_again_when_asked_and_a_base_that_fails_is_named(tmp_path: Path, colours: Path) -> None:
    study = write_study(tmp_path, tmp_path / "nowhere", steps=2)
    only = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**only, "rows": only["rows"][:1]}))
    rows = run(plan_of(study, tmp_path / "out"))
    assert "trained, shared to be built" in str(rows["Tiny / untouched"]["failure"])
    said: list[str] = []
    run(plan_of(study, tmp_path / "out"), said)
    assert said == []
    (tmp_path / "nowhere").symlink_to(colours)
    rows = run(plan_of(study, tmp_path / "out"), said, retry_failed=True)
    assert sum(line.endswith(": begun") for line in said) == 3  # the base, the row, measuring
    assert rows["Tiny / untouched"]["state"] == "done" and rows["Tiny / untouched"]["measurements"]


def test_a_row_is_what_its_folder_holds_and_not_what_was_done_there_once(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    """Edited and put back, the first version is built again; and what somebody removed is too."""
    study, folder, _ = finished
    shutil.copytree(folder, tmp_path / "out")
    only = {"only": ("Tiny / int8",)}
    edited = tmp_path / "tiny.yaml"
    content = yaml.safe_load(study.read_text())
    content["rows"][1]["overrides"] = {"quantize.schemes.onnxruntime.int8_dynamic.op_types": ["MatMul"]}
    edited.write_text(yaml.safe_dump(content))
    before = run(plan_of(study, tmp_path / "out", **only))["Tiny / int8"]["artifacts"]
    between = run(plan_of(edited, tmp_path / "out", **only))["Tiny / int8"]["artifacts"]
    said: list[str] = []
    after = run(plan_of(study, tmp_path / "out", **only), said)["Tiny / int8"]["artifacts"]
    assert before == after != between and "Tiny / int8 on board: begun" in said
    shutil.rmtree(tmp_path / "out" / "builds" / "tiny-int8")
    shutil.rmtree(tmp_path / "out" / "measurements")
    row = run(plan_of(study, tmp_path / "out", **only))["Tiny / int8"]
    assert row["artifacts"] == before and row["measurements"]


@pytest.mark.slow
def test_a_file_that_could_not_be_measured_is_tried_again_when_asked(
    finished: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder, _ = finished
    shutil.copytree(folder, tmp_path / "out")
    content = yaml.safe_load(study.read_text())
    anew = {**content, "measure": {**content["measure"], "rounds": 3}}  # what was built stays, and is measured again
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(anew))
    plan = plan_of(tmp_path / "tiny.yaml", tmp_path / "out", only=("Tiny / int8",))
    real = measure.bench
    died = WorkerError("a worker", expected="figures", found="that it died", fix="look at the memory")

    def dying(*arguments: Any) -> Any:
        result = real(*arguments)
        return replace(result, measurements=result.measurements[:1], folders=result.folders[:1], errors=(died,))

    monkeypatch.setattr(measure, "bench", dying)
    content, _, failed = run_study(plan, None, lambda text: None, no_bars)
    assert [bool(row["measurements"]) for row in content["rows"]] == [True, False] and len(failed) == 1
    assert "built and not measured" in content["rows"][1]["failure"]
    monkeypatch.setattr(measure, "bench", real)
    content, _, failed = run_study(plan, None, lambda text: None, no_bars)
    assert len(failed) == 1  # not of its own accord
    content, _, failed = run_study(plan, None, lambda text: None, no_bars, retry_failed=True)
    assert all(row["measurements"] for row in content["rows"]) and not failed


def test_a_host_without_the_images_fails_nothing_for_the_others(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    study, folder, _ = finished
    shutil.copytree(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "builds" / "tiny-int8")
    content = yaml.safe_load(study.read_text())
    content["rows"][1]["overrides"] = {"quantize.schemes.onnxruntime.int8_dynamic.op_types": ["MatMul"]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    data = yaml.safe_load(Path(content["base"]).read_text())["data"]["name"]
    hidden = Path(data).rename(Path(data).with_name("hidden"))
    try:
        with pytest.raises(UsageError, match=r"data set .*expected what this study was begun with: .*found none on this host"):
            run(plan_of(tmp_path / "tiny.yaml", tmp_path / "out"))
    finally:
        hidden.rename(data)
    with Queue(tmp_path / "out", None, "tiny") as queue:
        assert not [state for state in queue.states().values() if state.name == "failed" and "data set" in state.reason]


def test_other_images_or_weights_under_the_same_name_are_refused(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    study, folder, _ = finished
    shutil.copytree(folder, tmp_path / "out")
    before = (folder / "results.json").read_bytes()
    other = tmp_path / "other"
    for split in ("train", "test"):
        for name in ("one", "two"):
            (other / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(other / split / name / "0.png")
    with pytest.raises(UsageError, match=r"data set .*begun with: .*, found .*other"):
        run(plan_of(study, tmp_path / "out", data=str(other)))
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_given_weights_are_known_by_their_bytes_wherever_they_lie(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    study, folder, _ = finished

    def origins(path: Path) -> dict[str, str]:
        found = find_origins(plan_of(study, folder, weights=str(path)), None)
        return {one.name: one.digest for one in found if one.name.startswith("--weights")}

    given, moved = tmp_path / "given.safetensors", tmp_path / "moved.safetensors"
    shutil.copyfile(folder / "builds" / "trained" / "checkpoint.safetensors", given)
    before = origins(Path(shutil.copyfile(given, moved)))
    assert origins(given) == before and list(before) == ["--weights of test_vit"]
    given.write_bytes(given.read_bytes()[:-1] + b"\x01")
    assert origins(given) != before
    assert origins(tmp_path / "nowhere") == {"--weights of test_vit": ""}  # which is why its rows will fail


def test_a_device_that_is_not_here_says_so_in_its_rows(finished: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from vitedge import host

    monkeypatch.setattr("vitedge.study.available.probe_host", lambda: host.Host(**{**vars(host.probe_host()), "gpus": ()}))
    study, folder, _ = finished
    before = answers(folder)
    board = plan_of(study, folder).devices[0][0]
    content, _, failed = run_study(plan_of(study, folder, devices=(board, "cuda")), None, lambda text: None, no_bars)
    cuda = [row for row in content["rows"] if row["device"] == "cuda"]
    assert len(cuda) == 3 and all("expected an NVIDIA GPU" in row["failure"] and not row["measurements"] for row in cuda)
    assert [row["label"] for row in content["rows"] if row["device"] == "board" and row["measurements"]] == [
        "Tiny / untouched",
        "Tiny / int8",
    ]
    assert len(failed) == 1
    with pytest.raises(UnavailableError, match="an NVIDIA GPU"):
        run_study(plan_of(study, folder, devices=("cuda",)), None, lambda text: None, no_bars)
    run(plan_of(study, folder))
    assert answers(folder) == before


def test_some_rows_alone_leave_the_table_of_all_as_it_is(finished: tuple[Path, Path, list[str]]) -> None:
    study, folder, _ = finished
    before = (folder / "results.json").read_bytes()
    run(plan_of(study, folder, only=("Tiny / untouched",)))
    assert (folder / "results.json").read_bytes() == before
    rows = json.loads((folder / "results.only.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["Tiny / untouched"] and rows[0]["measurements"]


def test_another_devices_build_takes_the_checkpoint(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    source = finished[1] / "builds" / "tiny-int8"
    take_checkpoint(source, tmp_path / "other")
    made, taken = Manifest.load(source), Manifest.load(tmp_path / "other")
    assert list(taken.artifacts) == ["checkpoint.safetensors"] and list(taken.stages) == ["checkpoint"]
    assert taken.stages["checkpoint"] == made.stages["checkpoint"]
    assert taken.artifacts["checkpoint.safetensors"].path.read_bytes() == made.artifacts["checkpoint.safetensors"].path.read_bytes()
    stamp = taken.artifacts["checkpoint.safetensors"].path.stat().st_mtime_ns
    take_checkpoint(source, tmp_path / "other")
    assert taken.artifacts["checkpoint.safetensors"].path.stat().st_mtime_ns == stamp


def test_what_is_cut_to_a_time_takes_no_other_devices_checkpoint(
    finished: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitedge.study import rows

    plan = plan_of(finished[0], tmp_path / "out")
    task = replace(next(task for task in plan.tasks if not task.shared), source="tiny-int8")
    taken: list[Path] = []
    monkeypatch.setattr(rows, "take_checkpoint", lambda source, root: taken.append(source))

    def no_further(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "Pipeline", no_further)
    for times in (False, True):
        monkeypatch.setattr(rows, "times_models", lambda recipe, times=times: times)
        with pytest.raises(KeyboardInterrupt):
            rows.build_task(plan, task, None, lambda line: None, no_bars)
        assert len(taken) == 1


@pytest.mark.slow
def test_two_workers_share_the_rows(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    study, folder, _ = finished
    workers = [start(study, tmp_path / "out") for _ in range(2)]
    ended = [worker.communicate(timeout=240) for worker in workers]
    codes = [worker.returncode for worker in workers]
    assert codes == [3, 3], ended  # the broken row misses a gate; both say so
    begun = Counter(line for _, err in ended for line in err.splitlines() if line.endswith(": begun"))
    assert begun == Counter(dict.fromkeys(begun, 1)) and len(begun) == 5  # shared, three rows, measuring
    assert answers(tmp_path / "out") == answers(folder)


def kill_and_finish(study: Path, folder: Path, kills: int, seed: int) -> None:
    """Kill a worker so many times at random moments, then let one finish."""
    chance = random.Random(seed)
    for _ in range(kills):
        worker = start(study, folder)
        # Starting takes seconds in which nothing can be lost: the moment is drawn from when the storage is there.
        deadline = time.monotonic() + 60
        while not (folder / "study.db").exists() and worker.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        until = time.monotonic() + chance.uniform(0.0, 8.0)
        while worker.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    run(plan_of(study, folder))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    study, folder, _ = finished
    kill_and_finish(study, tmp_path / "out", kills=2, seed=6)
    assert answers(tmp_path / "out") == answers(folder)
    assert not list((tmp_path / "out" / "builds").rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_often_it_ends_as_if_it_had_not_been(finished: tuple[Path, Path, list[str]], tmp_path: Path, seed: int) -> None:
    study, folder, _ = finished
    kill_and_finish(study, tmp_path / "out", kills=5, seed=seed)
    assert answers(tmp_path / "out") == answers(folder)


@pytest.mark.slow
def test_told_to_end_it_hands_its_row_back(tmp_path: Path, colours: Path) -> None:
    study = write_study(tmp_path, colours, steps=100_000)
    worker = start(study, tmp_path / "out")
    state = tmp_path / "out" / "builds" / "trained" / ".work" / "step0" / "train.state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    _, err = worker.communicate(timeout=60)
    assert worker.returncode == 130, err
    assert "goes on from there" in err
    with Queue(tmp_path / "out", None, "tiny") as queue:
        states = queue.states()
        assert {state.name for state in states.values()} == {"waiting"} and not any(state.lost for state in states.values())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_cifar100_table2_runs_whole_on_a_small_file_of_the_official_layout(
    tmp_path: Path, real_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITEDGE_WEIGHTS", str(real_weights))
    from vitedge.study.budget import Budget
    from vitedge.study.plan import Options, make_plan
    from vitedge.study.spec import load_study

    data = tar_of(tmp_path / "cifar-100-binary.tar.gz", cifar100_members()[0])
    spec = load_study("cifar100_table2")
    spec = spec.model_copy(update={"measure": spec.measure.model_copy(update={"rounds": 2, "seconds": 0.05})})
    plan = make_plan(spec, tmp_path / "out", Options(devices=("cpu",), data=str(data), budget=Budget(0.001)))
    rows = run(plan)
    assert {label: row["failure"] for label, row in rows.items() if row["failure"]} == {}
    assert len(rows) == len(spec.rows) and all(row["budget"] == "0.1 % of the steps" for row in rows.values())
