"""From a study's file to its tasks: what is shared, what starts from what, and what is said of a file that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.study.made_study import plan_of, write_study
from vitedge.artifact import Artifact, Manifest, hash_files
from vitedge.errors import FileProblems, UsageError
from vitedge.schema import list_files, load_yaml
from vitedge.study.budget import Budget
from vitedge.study.estimate import estimate_measuring, estimate_task, fitted
from vitedge.study.plan import Options, Plan, make_plan
from vitedge.study.spec import folder_name, load_study

ROW = {"label": "one", "recipe": "deit_tiny_112_ptq"}


def write(folder: Path, **content: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"rows": [ROW], **content}, sort_keys=False))
    return path


def keys(plan: Plan) -> dict[str, str]:
    return {task.name: task.key for task in plan.tasks}


def test_what_rows_share_is_built_once_and_first(tmp_path: Path) -> None:
    plan = plan_of(write_study(tmp_path, tmp_path), tmp_path / "out")
    assert [task.name for task in plan.tasks] == [
        "trained, shared", "Tiny / untouched on board", "Tiny / int8 on board", "Tiny / broken on board",
    ]  # fmt: skip
    base, *rows = plan.tasks
    assert base.shared and base.weights is None
    for row in rows:
        assert row.needs == (base.key,)
        assert row.weights == str(tmp_path / "out" / "builds" / "trained" / "checkpoint.safetensors")
    assert [row.folder for row in rows] == ["tiny-untouched", "tiny-int8", "tiny-broken"]
    assert [row.recipe.name for row in rows] == [row.folder for row in rows]


def test_a_teacher_is_shared_by_the_rows_it_teaches(tmp_path: Path) -> None:
    rows = [{**ROW, "label": label, "recipe": "deit_tiny_32_distilled"} for label in ("one", "two")]
    plan = plan_of(write(tmp_path, rows=rows), tmp_path / "out")
    assert [task.name for task in plan.tasks] == ["teacher_resnet14_32, shared", "one on cpu", "two on cpu"]
    assert plan.root(plan.tasks[0]) == plan.root(plan.tasks[1]).parent / "teacher_resnet14_32"
    assert {task.needs for task in plan.tasks[1:]} == {(plan.tasks[0].key,)}


def test_a_row_may_start_from_a_row_above_it(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "label": "two", "weights": "one"}]
    one, two = plan_of(write(tmp_path, rows=rows), tmp_path / "out").tasks
    assert two.needs == (one.key,) and two.weights == str(tmp_path / "out" / "builds" / "one" / "checkpoint.safetensors")
    with pytest.raises(FileProblems, match=r"rows\.0\.weights: expected the label of a row above"):
        plan_of(write(tmp_path, rows=[{**ROW, "weights": "two"}, {**ROW, "label": "two"}]), tmp_path / "out")


def test_a_key_changes_with_what_a_row_is_made_from_and_with_nothing_else(tmp_path: Path) -> None:
    before = keys(plan_of(write_study(tmp_path, tmp_path), tmp_path / "out"))
    assert keys(plan_of(write_study(tmp_path, tmp_path, description="other words"), tmp_path / "elsewhere")) == before
    other_base = keys(plan_of(write_study(tmp_path, tmp_path, steps=13), tmp_path / "out"))
    assert not set(before.values()) & set(other_base.values())  # every row starts from it
    assert not set(before.values()) & set(keys(plan_of(write_study(tmp_path, tmp_path), tmp_path / "out", Budget(0.5))).values())
    mine = keys(plan_of(write_study(tmp_path, tmp_path), tmp_path / "out", weights="mine.safetensors"))
    assert "trained, shared" not in mine and not set(before.values()) & set(mine.values())
    # Where it lies differs from machine to machine; what it holds, the study is held to.
    assert keys(plan_of(write_study(tmp_path, tmp_path), tmp_path / "out", weights="elsewhere/mine.safetensors")) == mine


def test_other_devices_take_the_checkpoint_of_the_one_without_an_accelerator(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, devices=["cuda", "cpu"]), tmp_path / "out")
    cpu, cuda = plan.tasks
    assert (cpu.device, cpu.folder, cpu.after) == ("cpu", "one", "")
    assert (cuda.device, cuda.folder, cuda.after, cuda.source) == ("cuda", "one.cuda", cpu.key, "one")
    assert [device.name for _, device in plan.devices] == ["cuda", "cpu"]
    assert [task.device for task in plan_of(write(tmp_path), tmp_path / "out", devices=("cuda",)).tasks] == ["cuda"]


def test_only_takes_what_a_row_is_compared_with_and_starts_from_along(tmp_path: Path) -> None:
    rows = [
        ROW,
        {**ROW, "label": "two", "weights": "one", "untouched": "four"},
        {**ROW, "label": "three"},
        {**ROW, "label": "four"},
        {**ROW, "label": "five"},
    ]
    study = write(tmp_path, rows=rows, baseline="five")
    assert [task.label for task in plan_of(study, tmp_path / "out", only=("two",)).tasks] == ["one", "two", "four", "five"]
    whole, part = keys(plan_of(study, tmp_path / "out")), keys(plan_of(study, tmp_path / "out", only=("two",)))
    assert part.items() <= whole.items()  # the same tasks: what was built for one is there for the other
    with pytest.raises(UsageError, match=r"did you mean 'three'"):
        plan_of(study, tmp_path / "out", only=("thre",))


def test_the_studys_data_is_every_rows_data(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, base="deit_tiny_112_int8", data="cifar100", rows=[{**ROW, "weights": "base"}]), tmp_path / "out")
    assert {task.recipe.data.name for task in plan.tasks} == {"cifar100"}


def test_a_budget_in_minutes_is_spread_over_the_whole_study(tmp_path: Path) -> None:
    study = write(tmp_path, base="deit_tiny_112_int8", rows=[{**ROW, "weights": "base"}])
    whole = plan_of(study, tmp_path / "out")
    seconds = sum(estimate_task(whole, task).seconds for task in whole.tasks)
    options = fitted(load_study(str(study)), tmp_path / "out", Options(budget=Budget(minutes=seconds / 60 / 2)))
    part = make_plan(load_study(str(study)), tmp_path / "out", options)
    took = sum(estimate_task(part, task).seconds for task in part.tasks) + estimate_measuring(part, part.devices[0][1])
    assert took == pytest.approx(seconds / 2, rel=0.15) and 0.2 < part.budget.share < 0.5  # measuring takes its part
    assert part.budget == Budget.parse(f"{float(part.budget.label.split()[0]) / 100:g}"), "another host cannot be told which share it is"
    assert part.tasks[0].recipe.steps[0][1].steps == pytest.approx(3600 * part.budget.share, abs=4)  # type: ignore[attr-defined]
    # Whatever --only leaves out: the share is the whole study's.
    only = fitted(load_study(str(study)), tmp_path / "out", Options(budget=Budget(minutes=seconds / 60 / 2), only=("one",)))
    assert only.budget == options.budget and only.only == ("one",)


def test_a_second_device_takes_the_checkpoint_over_and_its_time_is_not_counted_twice(tmp_path: Path) -> None:
    study = write(tmp_path, devices=["cpu", "cpu_f32"], rows=[{**ROW, "recipe": "deit_tiny_112_int8"}])
    first, second = plan_of(study, tmp_path / "out").tasks
    plan = plan_of(study, tmp_path / "out")
    assert second.source and estimate_task(plan, second).seconds < 0.3 * estimate_task(plan, first).seconds


def test_what_a_device_is_and_where_it_is_built_are_part_of_the_key(tmp_path: Path) -> None:
    study = write(tmp_path, devices=["cpu", "cpu_f32"])
    both = {task.device: task.key for task in plan_of(study, tmp_path / "out").tasks}
    alone = {task.device: task.key for task in plan_of(study, tmp_path / "out", devices=("cpu_f32",)).tasks}
    assert alone["cpu_f32"] != both["cpu_f32"]  # its folder is another one
    profile = tmp_path / "board.yaml"
    content = load_yaml(list_files("devices")["cpu"])
    profile.write_text(yaml.safe_dump({**content, "name": "cpu", "quantization": {"reduce_range": True}}))
    assert plan_of(study, tmp_path / "out", devices=(str(profile), "cpu_f32")).tasks[0].key != both["cpu"]
    with pytest.raises(UsageError, match="expected profiles that differ in `name`, found 'cpu' in cpu too"):
        plan_of(study, tmp_path / "out", devices=("cpu", str(profile)))


def test_time_and_disk_are_guessed_before_anything_is_built(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, base="deit_tiny_112_int8", rows=[{**ROW, "weights": "base"}]), tmp_path / "out")
    base, row = (estimate_task(plan, task) for task in plan.tasks)
    assert base.seconds > 5 * row.seconds > 0 and not base.built
    assert base.mib == pytest.approx(2 * 5.7e6 * 4 / 2**20)
    assert row.mib is not None and row.mib > base.mib
    assert estimate_measuring(plan, plan.devices[0][1]) > 3 * 100.0  # 10,000 images for each of three files
    assert not (tmp_path / "out").exists()


def test_what_an_interrupted_build_has_is_not_counted_again(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, rows=[{**ROW, "recipe": "deit_tiny_112_int8"}]), tmp_path / "out")
    (task,) = plan.tasks
    before = estimate_task(plan, task)
    manifest = Manifest(plan.root(task))
    manifest.root.mkdir(parents=True)
    checkpoint = manifest.root / "checkpoint.safetensors"
    checkpoint.write_bytes(b"0" * (10 << 20))
    made = Artifact(checkpoint.name, "checkpoint", "fp32", (checkpoint,), hash_files([checkpoint]), 10 << 20)
    manifest.record("checkpoint", {"outputs": [checkpoint.name], "seconds": 500.0}, [made])
    manifest.save()
    after = estimate_task(plan, task)
    assert after.seconds < 0.2 * before.seconds and not after.built
    assert before.mib is not None and after.mib == pytest.approx(before.mib - 10)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"rows": [{**ROW, "lable": "x"}]}, "rows.0.lable: expected one of the keys label"),
        ({"basis": "x"}, "did you mean 'base'?"),
        ({"rows": []}, "rows"),
        ({"rows": [ROW, ROW]}, "rows.1.label: expected labels that differ in letters or digits, found 'one' twice"),
        ({"rows": [ROW, {**ROW, "label": "One"}]}, "found 'One' and 'one'"),
        ({"rows": [{**ROW, "label": "???"}]}, "expected letters or digits"),
        ({"rows": [{**ROW, "untouched": "onne"}]}, "rows.0.untouched: expected the label of a row, found 'onne' (did you mean 'one'?)"),
        ({"baseline": "two"}, "baseline: expected the label of a row"),
        ({"rows": [{**ROW, "weights": "base"}]}, "expected a base in the study"),
        ({"rows": [{**ROW, "recipe": "deit_tiny_112_ptqq"}]}, "did you mean 'deit_tiny_112_ptq'?"),
        ({"rows": [{**ROW, "overrides": {"model.imgsize": 3}}]}, "did you mean 'img_size'?"),
        ({"measure": {"rounds": 0}}, "measure.rounds: expected"),
        ({"devices": ["cpuu"]}, "did you mean 'cpu'?"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(write(tmp_path, **content), tmp_path / "out")
    assert said in str(caught.value)


def test_every_wrong_row_is_said_in_one_go(tmp_path: Path) -> None:
    rows = [{**ROW, "recipe": "nonsense"}, {**ROW, "label": "two", "overrides": {"steps.train.steps": 3}}, {**ROW, "label": "three"}]
    with pytest.raises(FileProblems) as caught:
        plan_of(write(tmp_path, rows=rows), tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "rows.0 (one)" in lines[0] and "rows.1 (two)" in lines[1]


def test_a_study_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'cifar10_table1'.*vitedge study --list"):
        load_study("cifar10_tabel1")


def test_a_label_becomes_a_folders_name() -> None:
    assert folder_name("DeiT-Ti 112 px / LSQ, W4A8") == "deit-ti-112-px-lsq-w4a8"
