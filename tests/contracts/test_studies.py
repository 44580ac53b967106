"""Every shipped study: it is valid, its recipes exist, its rows refer to rows, its dry run works and it says how to run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitedge.cli.main import run
from vitedge.schema import list_files
from vitedge.stage import trained_scheme
from vitedge.study.plan import Options, make_plan
from vitedge.study.spec import load_study

STUDIES = list_files("studies")
TABLES = ("cifar10_table1", "cifar100_table2")


@pytest.mark.parametrize("name", STUDIES)
def test_it_resolves_to_tasks(name: str, tmp_path: Path) -> None:
    spec = load_study(name)
    plan = make_plan(spec, tmp_path / "out", Options())
    assert spec.description and spec.name == name
    rows = [task for task in plan.tasks if not task.shared]
    assert len(rows) == len(spec.rows) * len(plan.devices)
    done: set[str] = set()
    for task in plan.tasks:  # what a task needs comes before it
        assert set(task.needs) <= done
        done.add(task.key)
    assert len(done) == len(plan.tasks)
    by_label = {row.label: row for row in spec.rows}
    for row in spec.rows:
        assert row.untouched is None or by_label[row.untouched].untouched is None, "an untouched row is counted against nothing"
        assert row.continued is None or by_label[row.continued].untouched == row.untouched
    for task in rows:
        if by_label[task.label].untouched is None or by_label[task.label].label in {row.continued for row in spec.rows}:
            assert not task.recipe.quantize.schemes and trained_scheme(task.recipe) is None, "what others are compared with is in float"


@pytest.mark.parametrize("name", STUDIES)
def test_its_dry_run_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["study", name, "--dry-run", "--device", "cpu", "--budget", "0.1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"] == "10 % of the steps"
    assert plan["seconds_estimated"] > 0 and all(task["mib_estimated"] for task in plan["tasks"])
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_its_file_says_what_it_is_and_how_to_run_it(name: str) -> None:
    head = [line for line in STUDIES[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"vitedge study {name}" in line for line in head) and any(line.startswith("# Expect:") for line in head)


@pytest.mark.parametrize("name", TABLES)
def test_the_papers_tables_have_all_of_its_methods_and_figures(name: str) -> None:
    spec = load_study(name)
    methods = [row.label.partition(" / ")[2] for row in spec.rows]
    for method in (
        "untouched", "dynamic quantization", "FQ-ViT", "LSQ W4A8", "DiffQ", "pruning 0.1", "pruning 0.2", "Nystroem, 24 landmarks",
        "Nystroem, 32 landmarks", "Nystroem, 64 landmarks", "distillation", "distillation + dynamic quantization",
    ):  # fmt: skip
        row = spec.rows[methods.index(method)]
        assert row.paper.top1 is not None and (method == "untouched" or row.untouched is not None)
    # The paper's DeiT tiny is smaller than what it is compared with: no effect of distillation.
    paper = {method: row.paper for row, method in zip(spec.rows, methods, strict=True)}
    assert paper["distillation"].size_mb == paper["without a teacher"].size_mb
    trained = {"LSQ W4A8", "DiffQ", "pruning 0.1", "pruning 0.2"}
    assert all(row.continued for row, method in zip(spec.rows, methods, strict=True) if method in trained)


def test_both_tables_have_the_same_rows() -> None:
    one, two = (load_study(name) for name in TABLES)
    assert [row.label for row in one.rows] == [row.label for row in two.rows]
    assert (one.data, two.data) == ("cifar10", "cifar100")
