"""Top-1 through a real worker against the model's float64 twin, kept, and compared in pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import tiny
from tests.bench.made import expected_top1, make_images, make_measurement, tiny_row, turn_logits_at_batch_1
from vitedge.bench import quality
from vitedge.bench.quality import Judged, find_images, find_reference, judge, try_judge, with_top1
from vitedge.bench.worker import choose_images
from vitedge.errors import InputError, UsageError
from vitedge.evaluate import summarize
from vitedge.model_file import open_artifact


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "insects")


def no_worker(*args: object, **kwargs: object) -> object:
    raise AssertionError("a worker was started")


def test_top1_is_the_independent_models_and_is_computed_once(tmp_path: Path, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    row = tiny_row(tmp_path)
    asked = find_images(None, str(images))
    found, label = judge(row, asked)
    assert found.images == 24
    assert math.isclose(found.top1, expected_top1(images))
    assert found.top5 is None
    assert "24 test images of insects" in label
    monkeypatch.setattr(quality, "run_worker", no_worker)
    again, label_again = judge(row, find_images(None, str(images)))
    assert (again.top1, label_again) == (found.top1, label)
    assert np.array_equal(again.predictions, found.predictions)
    for changed in (replace(row, precision="bf16"), replace(row, environment={"A": "1"})):
        with pytest.raises(AssertionError, match="worker"):
            judge(changed, asked)
    with pytest.raises(AssertionError, match="worker"):
        judge(row, replace(asked, samples=4))


def test_damaged_cache_is_measured_anew(tmp_path: Path, images: Path, cache: Path):
    row = tiny_row(tmp_path)
    first, _ = judge(row, find_images(None, str(images)))
    (kept,) = (cache / "quality").glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    again, _ = judge(row, find_images(None, str(images)))
    assert again.top1 == first.top1
    assert kept.stat().st_size > 100


def test_a_file_that_answers_otherwise_at_batch_1_is_refused(tmp_path: Path, images: Path):
    row = tiny_row(tmp_path)
    proto = onnx.load(row.artifact.path)
    turn_logits_at_batch_1(proto)
    path = tmp_path / "turned.onnx"
    onnx.save(proto, path)
    wrong = replace(row, artifact=open_artifact(path))
    with pytest.raises(InputError, match=r"turned.onnx in onnxruntime fp32: expected the classes .* another class for 24 of 24 images"):
        judge(wrong, find_images(None, str(images)))
    judged = try_judge(wrong, None, str(images), None)
    assert "batch 1" in judged.reason and judged.error is not None
    assert try_judge(wrong, None, "absent", None).error is None  # no images are no fault of the file


def test_sample_is_random_and_labelled(tmp_path: Path, images: Path):
    found, label = judge(tiny_row(tmp_path), find_images(None, str(images), samples=7))
    assert found.images == 7
    assert "7 randomly chosen test images" in label


def test_sample_is_spread_over_a_split_sorted_by_class():
    labels = np.repeat(np.arange(10), 100)
    chosen, truth = choose_images(np.arange(1000), labels, 200, 0)
    assert len(set(truth.tolist())) == 10
    assert len(set(chosen)) == 200
    assert np.array_equal(labels[np.array(chosen)], truth)
    assert choose_images([1, 2], np.array([0, 1]), 5, 0)[0] == [1, 2]


def test_no_data_and_no_contract_are_reasons_with_a_command(tmp_path: Path, images: Path):
    row = tiny_row(tmp_path)
    assert "--data NAME|PATH" in try_judge(row, None, None, None).reason
    missing = try_judge(row, None, "absent", None)
    assert missing.quality is None
    assert "vitedge bench" in missing.reason
    foreign = replace(row, artifact=replace(row.artifact, preprocessing=None))
    assert "no preprocessing contract" in try_judge(foreign, None, str(images), None).reason


def test_classes_in_another_order_are_refused(tmp_path: Path, images: Path):
    row = tiny_row(tmp_path)
    turned = replace(row, artifact=replace(row.artifact, labels=tuple(reversed(tiny.LABELS))))
    judged = try_judge(turned, None, str(images), None)
    assert judged.quality is None
    assert "dog, cat, bee" in judged.reason
    assert "ant, bee, cat" in judged.reason


def test_nothing_is_downloaded_for_a_measurement():
    with pytest.raises(UsageError):
        find_images(None, "cifar10")


def judged(correct: list[bool], predictions: list[int]) -> Judged:
    row = make_measurement()
    return Judged(row, quality=summarize(np.array(correct), np.array(predictions), None), label="4 test images of x")  # type: ignore[arg-type]


def test_drop_is_points_lost_on_the_same_images():
    fp32, int8 = judged([True, True, True, False], [0, 1, 2, 0]), judged([True, False, True, False], [0, 0, 2, 0])
    filled = with_top1(make_measurement("int8"), int8, ("model.fp32.onnx", fp32))
    assert filled.top1 == 50.0
    assert filled.top1_agreement == 75.0
    assert filled.top1_drop is not None
    assert filled.top1_drop.points == 25.0
    assert filled.top1_drop.low < 25.0 < filled.top1_drop.high
    assert filled.top1_drop.reference == "model.fp32.onnx"
    own = with_top1(make_measurement(), fp32, ("model.fp32.onnx", fp32))
    assert own.top1_drop is None
    assert own.top1_agreement == 100.0


def test_other_images_are_not_compared():
    fp32, int8 = judged([True], [0]), judged([True, False], [0, 0])
    elsewhere = replace(fp32, images=find_label())
    filled = with_top1(make_measurement(), int8, ("fp32", elsewhere))
    assert filled.top1 == 50.0
    assert filled.top1_drop is None


def find_label() -> quality.Images:
    from vitedge.data import Source
    from vitedge.recipe import DataSpec

    return quality.Images(Source("x", Path("x"), "image_folder"), "d", DataSpec.model_validate({"name": "x"}))


def test_reference_is_fp32_of_the_same_runtime_else_of_onnxruntime():
    ort, openvino = make_measurement(), make_measurement(runtime="openvino", provider="CPU")
    int8 = make_measurement("int8", runtime="openvino", provider="CPU", precision="int8")
    schemes = {"model.fp32.onnx": "fp32", "int8": "int8_static", "other": "fp32"}
    assert find_reference(int8, [ort, openvino, int8], schemes) is openvino
    assert find_reference(int8, [ort, int8], schemes) is ort
    assert find_reference(int8, [int8], schemes) is None
    assert find_reference(int8, [ort, make_measurement("other"), int8], schemes) is None
    assert find_reference(int8, [replace(ort, recipe="another"), int8], schemes) is None
