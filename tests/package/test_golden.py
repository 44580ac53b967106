from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.package.building import artifact_of
from tests.tiny import CONTRACT, write_tiny_onnx
from vitedge.device import Device
from vitedge.errors import InputError
from vitedge.host import architecture
from vitedge.package.choosing import chooses_tokens
from vitedge.package.golden import synthetic_pictures, tolerance, train_pictures, write_golden
from vitedge.package.isa import BF16, VNNI, needed_isa
from vitedge.runtimes import Facts, Session

FACTS = Facts("onnxruntime", "1.0", "CPUExecutionProvider", "fp32", "fp32", 1)


def test_synthetic_pictures_are_the_same_everywhere_and_differ_from_each_other() -> None:
    pictures = synthetic_pictures(6, 32).images
    assert all(picture.shape == (40, 40, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 6
    # By hand from the definition: picture 0 is a ramp to the right, 40 outside its disc, stripes along x + y of width 5.
    assert pictures[0][0, 39].tolist() == [255, 40, 255]
    assert pictures[0][0, 0].tolist() == [0, 40, 0]
    assert pictures[0][20, 20].tolist() == [20 * 255 // 39, 220, 0]


def test_train_pictures_are_evenly_spaced() -> None:
    images = [np.full((4, 4, 3), index, np.uint8) for index in range(10)]
    assert [int(picture[0, 0, 0]) for picture in train_pictures(images, 4, "x").images] == [0, 2, 5, 7]
    assert len(train_pictures(images, 50, "x").images) == 10


@pytest.mark.parametrize(
    ("precision", "rest", "share"), [("fp32", "fp32", 2**-13), ("bf16", "bf16", 2**-5), ("int8", "fp32", 2**-6), ("int8", "bf16", 2**-5)]
)
def test_the_tolerance_is_a_share_of_the_largest_logit(precision: str, rest: str, share: float) -> None:
    allowed, derivation = tolerance(np.array([[1.0, -8.0], [2.0, 3.0]]), precision, rest)
    assert allowed == 8 * share
    assert "8" in derivation


@pytest.mark.parametrize("answer", [np.zeros((1, 4)), np.full((1, 4), np.nan), np.zeros(4), np.ones((1, 2, 2))])
def test_logits_that_prove_nothing_are_refused(answer: np.ndarray, tmp_path: Path) -> None:
    artifact = artifact_of(tmp_path, write_tiny_onnx(tmp_path / "model.onnx"))
    session = Session(lambda: FACTS, (1, 3, 8, 8), lambda x_BCHW: answer)
    folder = tmp_path / "staging"
    folder.mkdir()
    with pytest.raises(InputError):
        write_golden(folder, synthetic_pictures(1, 8), CONTRACT, session, artifact)


def profile(arch: str) -> Device:
    facts = {"arch": arch, "runtimes": [{"runtime": "onnxruntime", "provider": "CPUExecutionProvider"}]}
    return Device.model_validate({"name": "board", **facts, "source": dict.fromkeys(facts, "made for a test")})


@pytest.mark.parametrize(
    ("arch", "provider", "precisions", "notes", "reduce_range", "expected"),
    [
        ("x86_64", "CPUExecutionProvider", ("fp32", "fp32"), {}, False, ()),
        ("x86_64", "CPUExecutionProvider", ("int8", "fp32"), {}, False, (VNNI,)),
        ("x86_64", "CPUExecutionProvider", ("int8", "fp32"), {}, True, ()),
        ("x86_64", "CPUExecutionProvider", ("int8", "fp32"), {"settings": {"reduce_range": True}}, False, ()),
        ("x86_64", "CPUExecutionProvider", ("int8", "fp32"), {"settings": {"reduce_range": False}}, True, (VNNI,)),
        ("x86_64", "CPUExecutionProvider", ("int8", "fp32"), {"settings": {"reduce_range": None}}, True, ()),
        ("x86_64", "CPUExecutionProvider", ("int8", "fp32"), {"library": "vitedge"}, True, (VNNI,)),
        ("x86_64", "CPU", ("bf16", "bf16"), {}, False, (BF16,)),
        ("x86_64", "CPU", ("int8", "bf16"), {}, False, (VNNI, BF16)),
        ("x86_64", "CUDAExecutionProvider", ("int8", "fp16"), {}, False, ()),
        ("aarch64", "CPUExecutionProvider", ("int8", "fp32"), {}, False, ()),
    ],
)
def test_instruction_sets_follow_from_what_runs(
    arch: str,
    provider: str,
    precisions: tuple[str, str],
    notes: dict[str, object],
    reduce_range: bool,
    expected: tuple[object, ...],
    tmp_path: Path,
) -> None:
    artifact = artifact_of(tmp_path, write_tiny_onnx(tmp_path / "model.onnx"), notes=notes)
    isa = needed_isa(artifact, profile(arch), provider, precisions, reduce_range)
    assert isa.needed == expected
    assert isa.arch == arch


def test_a_profile_of_any_processor_follows_this_one(tmp_path: Path) -> None:
    artifact = artifact_of(tmp_path, write_tiny_onnx(tmp_path / "model.onnx"))
    isa = needed_isa(artifact, profile("any"), "CPUExecutionProvider", ("int8", "fp32"), reduce_range=False)
    assert isa.needed == ((VNNI,) if architecture() == "x86_64" else ())


def with_top_k(path: Path, position: int) -> Path:
    """The tiny model, its logits reordered so that TopK's values (0) or positions (1) are read; either is the same logits, sorted."""
    proto = onnx.load(path)
    output = proto.graph.output[0].name
    (last,) = [node for node in proto.graph.node if output in node.output]
    last.output[list(last.output).index(output)] = "unsorted"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([4], np.int64), "all_of_them"))
    names = ["best", "where"] if position else [output, ""]
    proto.graph.node.append(onnx.helper.make_node("TopK", ["unsorted", "all_of_them"], names))
    if position:
        proto.graph.node.append(onnx.helper.make_node("GatherElements", ["unsorted", "where"], [output], axis=1))
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize(("position", "precision", "close"), [(1, "int8", 1), (1, "fp32", None), (0, "int8", None)])
def test_only_a_file_that_chooses_tokens_and_rounds_is_held_to_less(
    position: int, precision: str, close: int | None, tmp_path: Path
) -> None:
    artifact = artifact_of(tmp_path, with_top_k(write_tiny_onnx(tmp_path / "model.onnx"), position))
    logits_BC = np.array([[1.0, -8.0, 2.0, 0.0]], np.float32)
    session = Session(lambda: replace(FACTS, precision=precision), (1, 3, 8, 8), lambda x_BCHW: logits_BC)
    folder = tmp_path / "staging"
    folder.mkdir()
    golden, _ = write_golden(folder, synthetic_pictures(4, 8), CONTRACT, session, artifact)
    assert (golden.close, golden.choice_abs_err) == (close, 2.0 if close else None)
    assert golden.max_abs_err == 8 * (2**-6 if precision == "int8" else 2**-13)
    assert ("for 1 of 4 pictures" in golden.tolerance) == bool(close)


def test_an_openvino_file_that_chooses_tokens_is_known(tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    for position in (0, 1):
        source = tmp_path / f"{position}.onnx"
        model = ov.Core().read_model(with_top_k(write_tiny_onnx(source), position))
        ov.save_model(model, tmp_path / str(position) / "model.xml")
        artifact = artifact_of(tmp_path, tmp_path / str(position) / "model.xml", format="openvino")
        assert chooses_tokens(artifact) == bool(position)
