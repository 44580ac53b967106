"""`vitedge data` through its real entry point: output, exit codes, one line for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.made import SPLITS, cifar10_members, pack, pixels, png, tar_of, write_images
from vitedge.cli.main import run


def test_info_says_what_is_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_images(tmp_path / "pets", SPLITS)
    assert run(["data", "info", str(tmp_path / "pets"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema_version"] == 1 and told["kind"] == "image_folder" and told["label"] == told["name"] == "pets"
    assert told["path"] == str(tmp_path / "pets") and told["classes"] == ["cat", "dog"] and len(told["digest"]) == 64
    assert told["counts"] == {"train": 14, "validation": 2, "test": 5} and told["class_counts"] == [5, 9]
    assert told["smallest"] == told["largest"] == [12, 12] and told["sampled"] == 14
    # the figures are of 14 of these 16 random images: within four standard errors of all of them
    train = np.stack([image for name, image in written.items() if name.startswith("train/")]) / 255.0
    error = 4 * 0.29 / np.sqrt(14 * 144)
    assert np.allclose(told["mean"], train.mean(axis=(0, 1, 2)), atol=error) and np.allclose(
        told["std"], train.std(axis=(0, 1, 2)), atol=error
    )


def test_figures_are_those_of_the_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for number, kind in enumerate(("cat", "dog")):
            folder = tmp_path / "set" / part / kind
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(png(pixels(number, 4 + number, 6)))
    assert run(["data", "info", str(tmp_path / "set"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    values = np.concatenate([pixels(n, 4 + n, 6).reshape(-1, 3) for n in (0, 1)]) / 255.0
    assert np.allclose(told["mean"], values.mean(axis=0), rtol=0, atol=1e-12) and np.allclose(
        told["std"], values.std(axis=0), rtol=0, atol=1e-9
    )
    assert told["smallest"] == [4, 6] and told["largest"] == [5, 6]


def test_info_for_people_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "pets", {"cat": 6, "dog": 6}, sizes=((8, 10), (12, 9)))
    assert run(["data", "info", "pets", "--data", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("pets (about 20% split off as test)", "2: cat, dog", "train 8, validation 2, test 2", "9 x 8 px to 10 x 12 px", "note "):
        assert text in captured.err


def test_fetch_checks_and_reuses_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "made", SPLITS)
    path = pack(tmp_path / "made", tmp_path / "cifar10.tar")
    monkeypatch.setenv("VITEDGE_DATA", str(tmp_path))
    assert run(["data", "fetch", "cifar10", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path) and told["checked"] == "no published checksum for this file" and told["schema_version"] == 1


def test_fetch_refuses_an_official_name_with_other_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    members, _ = cifar10_members()
    tar_of(tmp_path / "cifar-10-binary.tar.gz", members)
    monkeypatch.setenv("VITEDGE_DATA", str(tmp_path))
    assert run(["data", "fetch", "cifar10"]) == 1
    assert "expected md5 c32a1d4ab5d03f1284b67883e8d87530, found md5" in capsys.readouterr().err


def damaged_set(root: Path) -> Path:
    write_images(root / "set", SPLITS)
    image = root / "set/train/dog/004.png"
    image.write_bytes(image.read_bytes()[:50])
    return root / "set"


def folder_of(root: Path, counts: dict[str, int]) -> Path:
    write_images(root / "set", counts)
    return root / "set"


def cut_archive(root: Path, name: str) -> Path:
    path = pack(folder_of(root, SPLITS), root / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def text_named(path: Path) -> Path:
    path.write_text("not an archive")
    return path


def short_records(root: Path) -> Path:
    members, _ = cifar10_members(per_file=1)
    members["cifar-10-batches-bin/test_batch.bin"] = b"\0" * 3072
    return tar_of(root / "cifar-10-binary.tar.gz", members)


BAD: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "truncated_tar": (lambda d: cut_archive(d, "set.tar"), 1, "expected a whole .tar, .tar.gz or .zip archive"),
    "truncated_tar_gz": (lambda d: cut_archive(d, "set.tar.gz"), 1, "expected a whole"),
    "truncated_zip": (lambda d: cut_archive(d, "set.zip"), 1, "expected a whole"),
    "not_a_zip": (lambda d: text_named(d / "set.zip"), 1, "expected a whole"),
    "not_an_archive_name": (lambda d: text_named(d / "set.txt"), 1, "expected a folder or a file ending in"),
    "corrupt_image": (damaged_set, 1, "set: train/dog/004.png: expected a readable image"),
    "corrupt_image_in_tar": (lambda d: pack(damaged_set(d), d / "set.tar"), 1, "set.tar: train/dog/004.png: expected a readable image"),
    "corrupt_image_in_zip": (lambda d: pack(damaged_set(d), d / "set.zip"), 1, "set.zip: train/dog/004.png: expected a readable image"),
    "empty_class": (lambda d: folder_of(d, {**SPLITS, "train/emu": 0}), 1, "set: train/emu: expected at least one image"),
    "climbing_name": (lambda d: tar_of(d / "x.tar", {"../x.png": b"x"}), 1, "leads out of the archive"),
    "absolute_name": (lambda d: tar_of(d / "x.tar", {"/x.png": b"x"}), 1, "leads out of the archive"),
    "no_images": (lambda d: folder_of(d, {"train": 0}), 1, "found no images"),
    "class_only_in_test": (lambda d: folder_of(d, {**SPLITS, "test/emu": 1}), 1, "test/emu: expected only classes that train has"),
    "single_class": (lambda d: folder_of(d, {"train/cat": 3}), 1, "expected at least two classes, found one: cat"),
    "short_records": (short_records, 1, "test_batch.bin: expected a whole number of records of 3073 bytes, found 3072"),
    "nothing_there": (lambda d: d / "nowhere", 2, "found no such file or folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, code, text = BAD[case]
    path = make(tmp_path)
    assert run(["data", "info", str(path), "--json"]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("read ")]  # progress
    assert len(lines) == 1 and text in lines[0] and lines[0].startswith("error: ")
    assert json.loads(captured.out)["error"]["exit_code"] == code
    assert [left.name for left in own_cache.glob("decoded/*") if left.suffix != ".lock"] == []


def test_misspelt_name_ends_with_2_and_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "fetch", "cifar-10"]) == 2
    assert "did you mean 'cifar10'?" in capsys.readouterr().err


def loaded_by(code: str, *modules: str) -> str:
    """Which of `modules` a fresh interpreter has after running `code`."""
    code = f"import sys\n{code}\nprint('loaded', sorted({set(modules)} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return told.stdout.splitlines()[-1]


def test_installed_command_runs(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", SPLITS)
    command = [sys.executable, "-m", "vitedge", "data", "info", str(tmp_path / "pets"), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["counts"]["test"] == 5


def test_help_loads_nothing_heavy() -> None:
    code = "from vitedge.cli.main import run; run(['data', 'fetch', '--help'])"
    assert loaded_by(code, "numpy", "PIL", "pooch", "pydantic", "torch") == "loaded []"


def test_reading_data_loads_neither_torch_nor_an_engine() -> None:
    heavy = ("torch", "onnxruntime", "onnx", "openvino", "pooch", "filelock", "requests")
    assert loaded_by("import vitedge.data", *heavy) == "loaded []"
