"""`vitedge study` through its entry point."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.study.made_study import write_study
from vitedge.cli.main import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def one_row(folder: Path, data: Path) -> Path:
    """The tiny study with the row untouched alone."""
    study = write_study(folder, data, steps=2)
    content = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**content, "rows": content["rows"][:1]}))
    return study


def test_a_whole_study_as_json_and_again_as_a_table(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    study, storage = one_row(tmp_path, colours), ["--storage", f"sqlite:///{tmp_path / 'shared.db'}"]
    assert run(["study", str(study), *storage, "--json"]) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content == json.loads(Path("build/studies/tiny/results.json").read_text())
    (row,) = content["rows"]
    assert row["measurements"] and not row["failure"] and content["budget"] == ""
    assert "trained, shared: begun" in captured.err and "about" in captured.err
    assert run(["study", str(study), *storage]) == 0
    captured = capsys.readouterr()
    assert "untouched" in captured.out and "begun" not in captured.err
    assert "vitedge report build/studies/tiny" in captured.err
    assert (tmp_path / "shared.db").is_file() and not Path("build/studies/tiny/study.db").exists()
    assert run(["study", str(study), *storage, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Tiny / untouched on board: done" in out and "measuring all rows on board: done" in out and "in all about 0 s" in out
    assert run(["study", str(study), *storage, "--device", "cpu"]) == 2
    assert "--device: expected what this study was begun with: board, found cpu; " in capsys.readouterr().err
    assert run(["study", str(study), *storage, "--budget", "0.5"]) == 2
    assert "begun with: all of the work, found --budget 0.5" in capsys.readouterr().err


def test_a_row_that_fails_is_the_exit_code_and_stands_in_the_table(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    study = one_row(tmp_path, tmp_path / "nowhere")
    assert run(["study", str(study), "--budget", "0.5", "--json"]) == 2  # the base's own error: there is no such data
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rows"]
    assert "trained, shared to be built" in row["failure"] and row["budget"] == "50 % of the steps"
    assert "--retry-failed tries them again" in captured.err


def test_a_dry_run_says_what_is_shared_how_long_and_how_large_and_writes_nothing(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, colours)
    before = sorted(tmp_path.rglob("*"))
    assert run(["study", str(study), "--dry-run", "--budget", "0.1", "-o", "out"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("trained, shared: about ")
    assert out[1].startswith("Tiny / untouched on board: about ") and out[1].endswith("; starts from trained")
    assert out[-2].startswith("measuring all rows on board: about ")
    assert "10 % of the steps" in out[-1] and "MiB of new files" in out[-1] and out[-1].endswith("into out")
    assert run(["study", str(study), "--dry-run", "--json", "--only", "Tiny / untouched"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [task["label"] for task in plan["tasks"]] == ["trained", "Tiny / untouched"]
    assert plan["tasks"][1]["needs"] == [plan["tasks"][0]["key"]]
    assert plan["seconds_estimated"] > 0 and plan["mib_estimated"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_that_is_not_here_is_one_line_of_a_dry_run(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitedge import host

    monkeypatch.setattr("vitedge.study.available.probe_host", lambda: host.Host(**{**vars(host.probe_host()), "gpus": ()}))
    assert run(["study", str(write_study(tmp_path, colours)), "--dry-run", "--device", "cpu", "--device", "cuda", "-o", "out"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "cuda" in line]
    assert len(lines) == 1 and re.match(r"not on cuda: \d rows: device cuda: expected an NVIDIA GPU, found ", lines[0])


def test_the_shipped_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "--list"]) == 0
    assert "cifar10_table1 " in capsys.readouterr().out
    assert run(["study", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["studies"]
    wanted = {"cifar10_table1", "cifar100_table2", "seed002_decomposition", "seed003_sharing", "int8_on_this_device"}
    assert wanted <= {row["name"] for row in rows} and all(row["description"] for row in rows)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, kept = one_row(tmp_path, colours), tmp_path / "mine" / "results.csv"
    kept.parent.mkdir()
    kept.write_text("a,b")
    for name in ("mine", "search"):
        (tmp_path / "search" / "trials").mkdir(parents=True, exist_ok=True)
        assert run(["study", str(study), "-o", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert "expected an empty folder or one of a study" in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in kept.parent.iterdir()) == ["results.csv"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "expected a study's name or file"),
        (["cifar10_tabel1"], 2, "did you mean 'cifar10_table1'"),
        (["cifar10_table1", "--budget", "2"], 2, "expected a share above 0"),
        (["cifar10_table1", "--only", "DeiT-Ti"], 2, "expected the label of a row"),
        (["cifar10_table1", "--device", "cpuu"], 2, "did you mean 'cpu'"),
        (["nowhere.yaml"], 2, "see `vitedge study --list`"),
    ],
)
def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str], args: list[str], code: int, said: str) -> None:
    assert run(["study", *args]) == code
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
