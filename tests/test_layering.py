"""The import rules of ARCHITECTURE.md, read off the source: imports go downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitedge
from vitedge import plugins

ROOT = Path(vitedge.__file__).parent
LAYERS = {
    "errors": 0, "plugins": 0, "progress": 0, "launch": 0,
    "locations": 1, "schema": 1, "recipe": 1, "device": 1, "artifact": 1,
    "preprocess": 1.5, "data": 1.5, "evaluate": 1.5, "packing": 1.5,
    "numerics": 2, "calibration": 2,
    "models": 2, "compress": 2, "train": 2, "host": 2, "model_file": 2, "graph": 2, "quantize": 2, "runtimes": 2, "bench": 2.5,
    "export": 3, "latency": 3, "guard": 3, "inspect": 3, "report": 3, "package": 3,
    "stage": 4, "pipeline": 4, "study": 5, "cli": 6, "__main__": 6,
}  # fmt: skip
TORCH_SIDE = {"models", "train", "compress", "numerics", "calibration"}
TORCH_ALLOWED = TORCH_SIDE | {"export", "latency", "pipeline"}
TORCH_FILES = tuple(ROOT / part for part in ("runtimes/pytorch.py", "inspect/checkpoint.py", "inspect/recipe_cost.py"))
# A maintainer's command, kept beside the files it writes: it builds with all that is below it, and nothing imports it.
COMMANDS = {"models/embed.py": 5}
# records know the contract's dataclass and the profile knows what a host offers; each points at one file below its use
DECLARED = {("recipe", "preprocess"), ("artifact", "preprocess"), ("schema", "preprocess")}


def _modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """Imported module names, with whether the import is at the top level of the file (not in TYPE_CHECKING)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(ast.walk(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = node.module in ("vitedge", "vitedge.compress")  # what is imported may be a module itself
            names = [f"{node.module}.{alias.name}" for alias in node.names] if inner else [node.module]
            found += [(name, node in top) for name in names]
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    room = _room(path)
    assert room in LAYERS, f"{room} has no layer: add it here and to ARCHITECTURE.md"
    layer = COMMANDS.get(path.relative_to(ROOT).as_posix(), LAYERS[room])
    for name, _ in _imports(path):
        assert name.removeprefix("vitedge.").replace(".", "/") + ".py" not in COMMANDS, f"{name} is a command, not a part"
        parts = name.split(".")
        if parts[0] != "vitedge" or len(parts) < 2 or parts[1] in (room, "__version__"):
            continue
        if (room, parts[1]) in DECLARED:
            continue
        assert LAYERS[parts[1]] <= layer, f"{room} imports {parts[1]} upward"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_deploy_side_has_no_torch(path: Path) -> None:
    room = _room(path)
    if room in TORCH_ALLOWED or path in TORCH_FILES:
        return
    names = {name.split(".")[0] for name, _ in _imports(path)}
    assert not names & {"torch", "timm", "torchvision"}
    inner = {name.split(".")[1] for name, _ in _imports(path) if name.startswith("vitedge.") and room != "cli"}
    assert not inner & TORCH_SIDE


def test_techniques_do_not_import_each_other() -> None:
    techniques = set(plugins.names("compress"))
    paths = sorted((ROOT / "compress").glob("*.py"))
    assert {"lsq", "_lsq", "prune"} <= {path.stem for path in paths}
    for path in paths:
        others = {name.split(".")[2] for name, _ in _imports(path) if name.startswith("vitedge.compress.")} & techniques
        # The parts of a technique, `_lsq_prepare.py` of `lsq.py`, may know it.
        assert not {name for name in others if not path.stem.startswith(f"_{name}")}, path


def test_the_contract_travels_with_numpy_and_pillow_alone() -> None:
    names = {name.split(".")[0] for name, _ in _imports(ROOT / "preprocess.py")}
    assert names <= {"__future__", "dataclasses", "json", "collections", "typing", "numpy", "PIL"}


def test_only_the_command_line_prints_or_exits() -> None:
    for path in _modules():
        if _room(path) in ("cli", "__main__") or path.name in ("runner.py", "worker.py") or path.relative_to(ROOT).as_posix() in COMMANDS:
            continue
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)}
        assert not calls & {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write", "click.echo"}, path


def _commands() -> list[str]:
    return sorted(p.stem for p in (ROOT / "cli").glob("*.py") if not p.stem.startswith("_") and p.stem != "main")


@pytest.mark.parametrize("command", ["", *_commands()])
def test_help_loads_neither_torch_nor_an_engine(command: str) -> None:
    code = (
        "import sys\nfrom vitedge.cli.main import run\n"
        f"code = run({[command, '--help'] if command else ['--help']})\n"
        "heavy = {'torch', 'timm', 'onnxruntime', 'openvino', 'nncf', 'onnx', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: vitedge" in done.stdout
