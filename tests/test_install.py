"""What an install gives: the wheel ships recipes and devices, and without extras the board's commands work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.bench.made import make_build, write_profile

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def wheel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built by its own backend and unpacked as pip would."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


@pytest.fixture(scope="session")
def bare_site(wheel_folder: Path) -> Path:
    """A site folder with the wheel and its core dependencies, and nothing of any extra."""
    (info,) = wheel_folder.glob("vitedge-*.dist-info")
    waiting = [r for r in metadata.PathDistribution(info).requires or [] if "extra ==" not in r]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name
        key = name.group(0).lower().replace("_", "-")
        if key in seen or "extra ==" in requirement or "sys_platform ==" in requirement or "platform_system ==" in requirement:
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(key)
        except metadata.PackageNotFoundError:
            continue
        waiting += distribution.requires or []
        for file in distribution.files or []:
            top = wheel_folder / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(Path(str(distribution.locate_file(file.parts[0]))))
    assert not (wheel_folder / "torch").exists() and (wheel_folder / "onnxruntime").exists()
    return wheel_folder


def vitedge(site: Path, *args: str, cwd: str = "/") -> subprocess.CompletedProcess[str]:
    """Run the command line with nothing but `site` on the path."""
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from vitedge.cli.main import main; main()"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VITEDGE_DATA", "VITEDGE_WEIGHTS")}
    return subprocess.run([sys.executable, "-S", "-c", code, *args], cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


def test_the_wheel_ships_recipes_and_devices(bare_site: Path) -> None:
    listed = vitedge(bare_site, "recipes", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = json.loads(listed.stdout)["recipes"]
    assert {row["name"] for row in rows} >= {"deit_tiny_int8", "deit_tiny_112_int8"}
    assert all(row["path"].startswith(str(bare_site)) for row in rows)
    devices = vitedge(bare_site, "devices", "list", "--json")
    assert devices.returncode == 0 and '"cpu"' in devices.stdout
    assert (bare_site / "vitedge" / "models" / "zoo").is_dir()
    for command in ("study", "search"):
        shipped = vitedge(bare_site, command, "--list", "--json")
        assert shipped.returncode == 0, shipped.stderr
        assert str(bare_site) in shipped.stdout
    assert {path.suffix for path in (bare_site / "vitedge" / "report" / "assets").iterdir()} >= {".css", ".js"}


def test_the_wheel_is_small_enough_for_a_board(bare_site: Path) -> None:
    size = sum(path.stat().st_size for path in (bare_site / "vitedge").rglob("*") if path.is_file())
    assert size < 16e6


@pytest.mark.parametrize(
    "args", [["recipes", "validate", "deit_tiny_int8"], ["recipes", "schema"], ["devices", "show", "cpu"], ["devices", "probe"], ["env"]]
)
def test_commands_of_the_core_install_work(bare_site: Path, tmp_path: Path, args: list[str]) -> None:
    done = vitedge(bare_site, *args, cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["export", "train"])
def test_a_missing_extra_is_one_line_with_the_pip_command(bare_site: Path, tmp_path: Path, command: str) -> None:
    done = vitedge(bare_site, command, "--recipe", "deit_tiny_int8", cwd=str(tmp_path))
    assert done.returncode == 4, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "pip install 'vitedge[torch]'" in errors[0]
    assert "Traceback" not in done.stderr


def test_a_board_measures_packages_and_verifies_a_copied_build_without_extras(bare_site: Path, tmp_path: Path) -> None:
    make_build(tmp_path / "build" / "tiny")
    device = ["--device", str(write_profile(tmp_path / "board.yaml", batch_sizes=[1]))]
    bench = ["bench", "build/tiny", *device, "--rounds", "2", "--seconds", "0.1", "--no-top1", "--json"]
    done = vitedge(bare_site, *bench, cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [row["iterations_per_s"] > 0 for row in json.loads(done.stdout)["measurements"]] == [True, True]
    for command in (["package", "build/tiny", *device, "-o", "tiny.zip"], ["verify", "tiny.zip"]):
        done = vitedge(bare_site, *command, cwd=str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert "ok  golden: " in done.stderr


def test_help_costs_little_more_than_click() -> None:
    """`vitedge --help` against importing click alone, instructions being steadier than seconds: modules loaded."""
    count = "import sys; before = set(sys.modules); {}; print(len(set(sys.modules) - before))"
    click = subprocess.run([sys.executable, "-c", count.format("import click")], capture_output=True, text=True, check=True)
    ours = subprocess.run([sys.executable, "-c", count.format("import vitedge.cli.main")], capture_output=True, text=True, check=True)
    assert int(ours.stdout) - int(click.stdout) <= 8
