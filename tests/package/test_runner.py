"""The travelling program: in its own folder, with neither vitedge nor torch to be had."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitedge.preprocess
from tests.tiny import CONTRACT, LABELS, logits
from vitedge.host import ISA_FLAGS, isa_flags
from vitedge.package import runner

# Runs a program with some packages made impossible to import; -I keeps the checkout off the path.
BLOCKER = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
sys.argv = ["run.py", *{arguments!r}]
runpy.run_path({program!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def unpacked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def own_copy(bundle: Path, tmp_path: Path) -> Path:
    """An unpacked bundle that a test may spoil."""
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path / "own")
    return tmp_path / "own"


def program(folder: Path, *arguments: str, blocked: tuple[str, ...] = ("vitedge", "torch", "pydantic", "yaml", "onnx", "click")) -> Any:
    code = BLOCKER.format(blocked=blocked, arguments=arguments, program=str(folder / "run.py"))
    return subprocess.run([sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=False, timeout=120)


def test_selftest_runs_without_vitedge_and_torch(unpacked: Path) -> None:
    before = sorted(unpacked.rglob("*"))
    done = program(unpacked, "--selftest")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("selftest ok: 4 golden pictures in onnxruntime fp32")
    assert sorted(unpacked.rglob("*")) == before


def test_pictures_get_the_classes_of_the_float64_reference(unpacked: Path, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (11, 13, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    scores = logits(CONTRACT([picture]))[0]
    expected = np.exp(scores) / np.exp(scores).sum()
    done = program(unpacked, str(tmp_path / "picture.png"), "--top", "4", "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["images"]
    assert [p["label"] for p in answer["predictions"]] == [LABELS[index] for index in np.argsort(-expected)]
    np.testing.assert_allclose([p["probability"] for p in answer["predictions"]], np.sort(expected)[::-1], rtol=1e-4)


def test_text_is_a_label_and_a_probability_per_line(unpacked: Path) -> None:
    done = program(unpacked, str(unpacked / "golden/00.png"), str(unpacked / "golden/01.png"), "--top", "2")
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and lines[0].endswith("00.png:") and lines[3].endswith("01.png:")
    label, probability = lines[1].split("  ")
    assert label in LABELS and 0 < float(probability) <= 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "found nothing"),
        (("--selftest", "picture.png"), 2, "found both"),
        (("--top", "0", "picture.png"), 2, "below 1"),
        (("--top", "many", "picture.png"), 2, "invalid int value"),
        (("--frobnicate",), 2, "unrecognized arguments"),
        (("/nowhere/picture.png",), 1, "No such file"),
        (("run.py-is-no-picture",), 1, "No such file"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], code: int, says: str, unpacked: Path) -> None:
    done = program(unpacked, *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and says in done.stderr


def test_a_file_that_is_no_picture(unpacked: Path) -> None:
    done = program(unpacked, str(unpacked / "labels.txt"))
    assert done.returncode == 1
    assert "expected a picture" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_picture_whose_notes_are_damaged_is_one_line(unpacked: Path, tmp_path: Path) -> None:
    """Pillow raises struct.error for it, which is neither an OSError nor a ValueError."""
    path = tmp_path / "cut.png"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0")
    done = program(unpacked, str(path), "--json")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(f"error: {path}: expected a picture, found ")
    assert json.loads(done.stdout)["error"]["exit_code"] == 1


def test_an_engine_that_fails_at_a_picture_is_one_line(unpacked: Path) -> None:
    classifier = runner.Classifier(unpacked)

    def fails(x_BCHW: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of\nmemory")

    classifier.session = fails
    with pytest.raises(runner.RunError, match="expected logits, found out of memory; check that memory is free") as caught:
        classifier.logits(unpacked / "golden" / "00.png")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_containers_quota_limits_the_threads(
    files: dict[str, str], cores: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert runner.container_cores(tmp_path) == cores
    monkeypatch.setattr(runner, "container_cores", lambda: 1.0)
    assert runner.usable_threads({"threads": {"asked": None}}) == 1
    assert runner.usable_threads({"threads": {"asked": 3}}) == 3


def test_a_changed_model_is_not_loaded(own_copy: Path) -> None:
    with (own_copy / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    done = program(own_copy, "--selftest")
    assert done.returncode == 1
    assert done.stderr.startswith("error: model.onnx: expected sha256") and len(done.stderr.strip().splitlines()) == 1


def test_a_missing_file_is_named(own_copy: Path) -> None:
    (own_copy / "labels.txt").unlink()
    done = program(own_copy, "--selftest")
    assert done.returncode == 1 and done.stderr.startswith("error: labels.txt: expected a file of the bundle")


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_lacking_instruction_set_is_refused_before_loading(own_copy: Path) -> None:
    edit(own_copy, isa={"arch": "any", "needed": [["avx9000", "neon9000"]], "packaged_on": []})
    done = program(own_copy, "--selftest", blocked=("vitedge", "torch", "onnxruntime", "numpy"))
    assert done.returncode == 4 and "avx9000 or neon9000" in done.stderr


def test_a_missing_engine_names_the_pip_line(own_copy: Path) -> None:
    done = program(own_copy, "--selftest", blocked=("vitedge", "onnxruntime"))
    assert done.returncode == 4
    assert "run: pip install numpy Pillow onnxruntime==" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 9}', '{"schema_version": 1}'])
def test_a_damaged_manifest_is_one_line(text: str, own_copy: Path) -> None:
    (own_copy / "manifest.json").write_text(text)
    done = program(own_copy, "--selftest", "--json")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert json.loads(done.stdout)["error"]["exit_code"] == 1


def test_the_program_knows_the_instruction_sets_that_vitedge_names() -> None:
    flags = runner.host_flags()
    assert flags is not None
    here = {name for name in ISA_FLAGS if not runner.missing_instructions([[name]], flags)}
    assert here == set(isa_flags())


@pytest.mark.parametrize("module", [runner, vitedge.preprocess])
def test_what_travels_is_python_3_8_and_imports_nothing_of_vitedge(module: Any) -> None:
    source = Path(module.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in ("vitedge", "torch")}
    # What came after 3.8, which parsing does not notice, and after the Pillow of Debian 11 and Ubuntu 22.04.
    assert not {"removeprefix", "removesuffix", "is_relative_to", "Resampling"} & {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }


@pytest.mark.parametrize(
    ("beyond", "by", "says"),
    [
        (3, 0.2, ""),
        (
            4,
            0.2,
            "within 0.1 of those packaged for 1 of 4 pictures, and within 0.5 for all, found a difference of 0.2, and 0.2 for the worst",
        ),
        (1, 0.7, "found a difference of"),
        (1, float("nan"), "and nan for the worst"),
    ],
)
def test_where_tokens_are_chosen_some_pictures_may_be_further_off(own_copy: Path, beyond: int, by: float, says: str) -> None:
    path = own_copy / "golden" / "expected.npy"
    expected = np.load(path, allow_pickle=False)
    expected[:beyond, 0] += by
    np.save(path, expected, allow_pickle=False)
    manifest = json.loads((own_copy / "manifest.json").read_text())
    entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    golden = {**manifest["golden"], "max_abs_err": 0.1, "close": 1, "choice_abs_err": 0.5}
    edit(own_copy, golden=golden, files={**manifest["files"], "golden/expected.npy": entry})
    done = program(own_copy, "--selftest")
    assert done.returncode == (1 if says else 0), done.stderr
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == (1 if says else 0)
