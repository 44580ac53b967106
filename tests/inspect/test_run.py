"""Which files belong to what is named, and which preprocessing they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.inspect import made
from tests.runtimes import files
from vitedge.artifact import Artifact, Manifest, hash_files
from vitedge.errors import InputError, UsageError
from vitedge.inspect.run import find_subject, with_contract


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make_build(tmp_path_factory.mktemp("run") / "made", None)


def names(path: Path, against: Path | None = None) -> tuple[str, list[tuple[str, str | None]]]:
    subject = find_subject(path, against)
    return subject.looked_at.name, [(file.name, parent.name if parent else None) for file, parent in subject.quantized]


def test_the_manifest_knows_the_parent(build: Path) -> None:
    fp32, int8 = "model.fp32.onnx", "model.int8_static.onnx"
    assert names(build) == (fp32, [(int8, fp32)])
    assert names(build / int8) == (int8, [(int8, fp32)])
    assert names(build / fp32) == (fp32, [])


def test_outside_of_a_build_the_parent_is_named(build: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.onnx"
    alone.write_bytes((build / "model.int8_static.onnx").read_bytes())
    assert names(alone) == ("alone.onnx", [("alone.onnx", None)])
    assert names(alone, build / "model.fp32.onnx") == ("alone.onnx", [("alone.onnx", "model.fp32.onnx")])
    with pytest.raises(InputError, match="int8_static"):
        find_subject(build / "model.fp32.onnx", alone)


def test_an_ir_is_looked_at_through_its_parent(tmp_path: Path) -> None:
    (tmp_path / "ir").mkdir()
    ir = files.write_quantized_ir(tmp_path / "ir" / "model.xml", int8_constants=True)
    assert names(ir) == ("model.xml", [("model.xml", None)])
    assert names(ir, made.write_vit(tmp_path / "fp32.onnx"))[0] == "fp32.onnx"


def test_a_file_that_was_changed_is_left_out_with_the_reason(tmp_path: Path) -> None:
    root = made.make_build(tmp_path / "made", None)
    made.write_vit(root / "model.fp32.onnx", head=2.0)
    subject = find_subject(root, None)
    assert (subject.looked_at.name, [parent for _, parent in subject.quantized]) == ("model.int8_static.onnx", [None])
    assert subject.left_out[0][0] == "model.fp32.onnx" and "changed" in subject.left_out[0][1]


def test_a_file_of_another_kind_is_left_out_with_the_reason(tmp_path: Path) -> None:
    root = made.make_build(tmp_path / "made", None)
    manifest = Manifest.load(root)
    (root / "model.packed").write_bytes(b"bits")
    packed = Artifact("model.packed", "packed", "w3", (root / "model.packed",), hash_files([root / "model.packed"]), 4)
    manifest.artifacts["model.packed"] = packed
    manifest.save()
    assert find_subject(root, None).left_out == (("model.packed", "vitedge inspect does not read the format packed"),)


def test_a_checkpoint_is_compared_with_nothing(tmp_path: Path) -> None:
    from tests.inspect.test_checkpoint import write

    checkpoint = write(tmp_path / "checkpoint.safetensors")
    assert names(checkpoint) == ("checkpoint.safetensors", [])
    with pytest.raises(UsageError, match="--against"):
        find_subject(checkpoint, made.write_vit(tmp_path / "fp32.onnx"))


def test_one_preprocessing_for_all(build: Path, tmp_path: Path) -> None:
    bare = find_subject(tiny.write_tiny_onnx(tmp_path / "m.onnx", preprocessing=False), None)
    assert with_contract(bare, None).looked_at.contract() is None
    assert with_contract(bare, tiny.CONTRACT).looked_at.contract() == tiny.CONTRACT
    other = replace(tiny.CONTRACT, interpolation="bilinear")
    with pytest.raises(InputError, match="interpolation"):
        with_contract(find_subject(build, None), other)
