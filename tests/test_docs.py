"""Docs cannot drift: every command is documented, and the README's commands run as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vitedge
from tests.homes import watched
from vitedge.cli.main import LazyGroup, cli
from vitedge.plugins import KINDS, names
from vitedge.schema import list_files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", README, flags=re.S)
COMMANDS = [line[2:] for block in BLOCKS for line in block.splitlines() if line.startswith("$ ")]


def command_names() -> list[str]:
    import click

    assert isinstance(cli, LazyGroup)
    return cli.list_commands(click.Context(cli))


@pytest.mark.parametrize("name", command_names())
def test_every_command_is_in_the_readme_and_has_help(name: str) -> None:
    import click

    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.help
    assert f"vitedge {name}" in README
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_every_line_of_the_readme_that_calls_vitedge_is_a_call_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in plain blocks are not run, for they take hours, data or a board."""
    import click

    lines: list[str] = re.findall(r"^(?:\$ )?(vitedge .*)$", README, flags=re.M)
    assert len(lines) > 30
    for line in lines:
        words = shlex.split(line.split("#")[0])[1:]
        command, context = cli, click.Context(cli, info_name="vitedge")
        while isinstance(command, click.Group):
            found = command.get_command(context, words[0])
            assert found is not None, line
            command, words, context = found, words[1:], click.Context(found, info_name=words[0], parent=context)
        # Files named are the reader's own.
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                monkeypatch.setattr(parameter.type, "exists", False)
        command.make_context(line, words, parent=context.parent)


def test_links_lead_somewhere() -> None:
    for page in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{page}: {target}"


def test_architecture_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {path.stem for path in Path(vitedge.__file__).parent.iterdir() if not path.name.startswith("_")}
    assert [room for room in sorted(rooms) if not re.search(rf"`{room}[`/]", text)] == []


def test_every_kind_of_plugin_is_a_folder_that_can_be_listed() -> None:
    assert all(names(kind) for kind in KINDS)
    assert set(names("runtimes")) >= {"onnxruntime", "openvino", "pytorch"}


def test_the_install_line_comes_first() -> None:
    head = "\n".join(README.splitlines()[:12])
    assert "pip install" in head and "[all]" in head


def test_the_changelog_knows_this_version() -> None:
    assert f"## {vitedge.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_and_ci_do_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "bench"):
        assert re.search(rf"^{target}:", makefile, flags=re.M) and f"make {target}" in README
    assert "make lint" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# Loaded by every Python that starts with its folder on the path.
NO_NETWORK = """
import os, socket

def refused(host, *rest, **more):
    with open(os.environ["HOSTS_ASKED_FOR"], "a") as log:
        print(host, file=log)
    raise socket.gaierror(f"name lookup of {host!r}: there is no network here")

socket.getaddrinfo = socket.gethostbyname = socket.gethostbyname_ex = refused
"""


def on_one_core() -> None:
    """A bench of two threads beside other tests takes both cores away from them, and settles late."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("measuring", [" --rounds 2 --seconds 0.1", pytest.param("", marks=pytest.mark.slow)], ids=["briefly", "as it is"])
def test_the_readmes_commands_run(measuring: str, tmp_path: Path) -> None:
    """In order, in an empty folder, as a newcomer without data or network would; the bench table has static int8 in it."""
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "sitecustomize.py").write_text(NO_NETWORK)
    assert any("export" in command for command in COMMANDS) and any("verify" in command for command in COMMANDS)
    binaries = str(Path(sys.executable).parent)
    paths = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    paths["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path / "offline"), os.environ.get("PYTHONPATH")]))
    asked_for = tmp_path / "offline" / "hosts"
    home = tmp_path / "home"
    environment = {**watched(home), **paths, "NO_COLOR": "1", "HOSTS_ASKED_FOR": str(asked_for)}
    assert "VITEDGE_DATA" not in environment and "VITEDGE_WEIGHTS" not in environment
    lookup = [sys.executable, "-c", "import socket; socket.getaddrinfo('example.org', 80)"]
    assert "there is no network here" in subprocess.run(lookup, capture_output=True, text=True, env=environment).stderr
    tables = []
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[0] in ("vitedge", "python", "unzip"), command
        done = subprocess.run(
            command + measuring * (words[:2] == ["vitedge", "bench"]),
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
            env=environment,
            preexec_fn=on_one_core,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        tables += [done.stdout] if words[:2] == ["vitedge", "bench"] else []
    assert asked_for.read_text().split() == ["example.org"], "nothing is reported anywhere, nor fetched unasked"
    # Engines that report from native code are not seen by a patched socket; they keep an identifier in the home folder.
    assert [str(path.relative_to(home)) for path in home.rglob("*")] == []
    assert "model.int8_dynamic.onnx" in tables[0] and "model.int8_static.onnx" in tables[0]


def test_shipped_recipes_and_devices_are_where_the_readme_says() -> None:
    assert (ROOT / "recipes").is_dir() and (ROOT / "devices").is_dir()
    assert {"cpu", "cpu_f32", "cuda"} <= set(list_files("devices"))
