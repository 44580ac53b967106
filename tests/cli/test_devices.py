"""`vitedge devices` and `vitedge env` through the command line's entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vitedge
from vitedge.cli.main import run
from vitedge.device import load_device, mismatches
from vitedge.host import gpus, isa_flags, probe_host, usable_cores


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["schema_version"] == 1
    return dict(content)


def test_list_names_the_shipped_profiles_and_where_this_host_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["devices", "list", "--json"]) == 0
    rows = {row["name"]: row for row in _json(capsys)["devices"]}
    assert {"cpu", "cpu_f32", "cuda"} <= set(rows)
    assert rows["cpu"]["mismatches"] == mismatches(load_device("cpu"), probe_host())
    assert run(["devices", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows)
    cuda = next(line for line in lines if line.startswith("cuda"))
    assert ("not this host" in cuda) == (not gpus())


def test_show_says_what_can_be_used_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["devices", "show", "cpu", "--json"]) == 0
    content = _json(capsys)
    assert content["device"]["runtimes"][0]["runtime"] == "onnxruntime"
    first = content["runtimes"][0]
    assert first == {"runtime": "onnxruntime", "provider": "CPUExecutionProvider", "precision": "fp32", "reason": None}
    assert run(["devices", "show", "cuda"]) == 0
    captured = capsys.readouterr()
    assert "accelerator: cuda" in captured.out
    if not gpus():
        assert "pytorch cuda fp32: no NVIDIA GPU" in captured.err


def test_show_of_an_unknown_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["devices", "show", "cpu_f23"]) == 2
    assert "did you mean 'cpu_f32'" in capsys.readouterr().err


def test_probe_writes_a_profile_that_loads_and_is_this_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my_board.yaml"
    assert run(["devices", "probe", "-o", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"wrote {path}" in captured.err
    device = load_device(str(path))
    assert device.name == "my_board"
    assert mismatches(device, probe_host()) == []
    assert device.isa == isa_flags() and device.threads == usable_cores()
    assert f"by vitedge {vitedge.__version__}" in device.source["isa"]
    assert any(use.runtime == "onnxruntime" for use in device.runtimes)
    assert path.read_text().startswith("# ")


def test_probe_prints_the_profile_when_no_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["devices", "probe"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert mismatches(load_device(str(path)), probe_host()) == []


def test_probe_as_json_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["devices", "probe", "--json"]) == 0
    content = _json(capsys)
    assert content["path"] is None
    assert content["host"]["usable_cores"] == content["device"]["threads"] == usable_cores()


def test_probe_overwrites_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "board.yaml"
    path.write_text("mine")
    assert run(["devices", "probe", "-o", str(path)]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert run(["devices", "probe", "-o", str(path), "--overwrite"]) == 0
    assert load_device(str(path)).name == "board"


@pytest.mark.parametrize("name", ["board.json", "my board.yaml", ".yaml"])
def test_probe_refuses_a_name_that_no_profile_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(["devices", "probe", "-o", str(tmp_path / name)]) == 2
    assert "choose another name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_probe_into_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(["devices", "probe", "-o", str(tmp_path / "file" / "board.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_env_is_a_block_for_a_bug_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env"]) == 0
    block = capsys.readouterr().out
    for name in (
        "vitedge:",
        "python:",
        "os:",
        "cpu:",
        "isa:",
        "cores:",
        "memory:",
        "engine onnxruntime:",
        "onnxruntime package:",
        "extra [torch]:",
    ):
        assert f"\n{name}" in f"\n{block}", name


def test_env_imports_no_torch_and_says_how_to_install_what_is_missing() -> None:
    code = (
        "import importlib.metadata as m, sys\nreal = m.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'timm'): raise m.PackageNotFoundError(name)\n    return real(name)\n"
        "m.version = version\nfrom vitedge.cli.main import run\ncode = run(['env', '--json'])\n"
        "assert code == 0 and not {'torch', 'nncf', 'timm'} & set(sys.modules), code"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VITEDGE_DEBUG"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert set(content["extras"]["torch"]["missing"]) == {"torch", "timm"}
    assert content["extras"]["torch"]["fix"] == "pip install 'vitedge[torch]'"
    assert content["engines"]["pytorch"]["version"] is None
    assert content["vitedge"] == vitedge.__version__


def test_env_warns_of_two_onnxruntimes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vitedge.host.onnxruntime_packages", lambda: ["onnxruntime", "onnxruntime-gpu"])
    assert run(["env"]) == 0
    assert "onnxruntime, onnxruntime-gpu; these overwrite each other" in capsys.readouterr().out
