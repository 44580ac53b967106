"""Static int8 from activation ranges kept with a checkpoint: the same file as from images, or a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from tests.quantize.made import initializers, job, quantize
from vitedge.artifact import hash_files
from vitedge.errors import InputError, UsageError
from vitedge.models.weights import BUILTIN, BUILTIN_RANGES
from vitedge.quantize import _ranges
from vitedge.quantize._ranges import StoredRanges
from vitedge.quantize.onnxruntime import Int8Static
from vitedge.recipe import Recipe, load_recipe, recipe_from_plain

SHA = "0" * 64
RECIPE = Recipe(name="r")


def stored(ranges: list[dict[str, Any]], config: Int8Static | None = None) -> StoredRanges:
    """A file's content with these ranges."""
    return StoredRanges(
        checkpoint_sha256=SHA,
        made_with=_ranges.asked(RECIPE, config or Int8Static()),
        calibration=_ranges.Calibration(images=16, seed=0, data="tiny", split="train"),
        data_sha256=SHA,
        tools={"onnxruntime": "1"},
        ranges=tuple(_ranges.ProductRange.model_validate(entry) for entry in ranges),
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ranges of the tiny model, read off its images."""
    ranges: list[dict[str, Any]] = quantize(job(tmp_path_factory.mktemp("measured"), "onnxruntime", "int8_static"), "onnxruntime").notes[
        "ranges"
    ]
    return ranges


@pytest.mark.parametrize("rules", [{}, {"reduce_range": True}, {"activation_type": "int8"}, {"per_channel": False}])
def test_the_file_is_the_one_that_images_give_whatever_the_device_wants(
    rules: dict[str, Any], measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    from_images = quantize(job(tmp_path / "images", "onnxruntime", "int8_static", **rules), "onnxruntime")
    without = replace(job(tmp_path / "stored", "onnxruntime", "int8_static", **rules), calibration=None, ranges=stored(measured))
    from_ranges = quantize(without, "onnxruntime")
    a, b = initializers(from_images.path), initializers(from_ranges.path)
    scales = [name for name in a if name.endswith(("_scale", "_zero_point"))]
    assert len(scales) >= 16 and a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a)
    assert from_images.sha256 == from_ranges.sha256 and from_images.notes == from_ranges.notes


def test_other_ranges_give_another_file(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    """The stored values are what decides: twice the range, twice the step."""
    doubled = [{**entry, "low": 2 * entry["low"], "high": 2 * entry["high"]} for entry in measured]
    scales = []
    for name, ranges in (("as", measured), ("twice", doubled)):
        made = quantize(replace(job(tmp_path / name, "onnxruntime", "int8_static"), calibration=None, ranges=stored(ranges)), "onnxruntime")
        scales.append(initializers(made.path)["normed_scale"])
    assert scales[1] == pytest.approx(2 * scales[0], rel=1e-6)


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model as another exporter writes it: every name another, and the head's weight transposed."""
    for node in model.graph.node:
        node.name = f"n_{node.name}"
        for side in (node.input, node.output):
            for index, name in enumerate(side):
                side[index] = f"t_{name}"
        if node.op_type == "Gemm":
            node.attribute.append(helper.make_attribute("transB", 1))
    for tensor in model.graph.initializer:
        if tensor.name == "head_weight":
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor).T), tensor.name))
        tensor.name = f"t_{tensor.name}"
    for port in (*model.graph.input, *model.graph.output):
        port.name = f"t_{port.name}"
    onnx.checker.check_model(model, full_check=True)
    return model


def test_products_are_found_by_their_weights_whatever_the_names(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    usual = quantize(job(tmp_path / "usual", "onnxruntime", "int8_static"), "onnxruntime")
    (tmp_path / "other").mkdir()
    onnx.save(renamed(tiny.tiny_model()), tmp_path / "other" / "source.onnx")
    foreign = replace(job(tmp_path / "other", "onnxruntime", "int8_static"), calibration=None, ranges=stored(list(reversed(measured))))
    made = quantize(foreign, "onnxruntime")
    a, b = initializers(usual.path), initializers(made.path)
    for name in ("normed", "activated", "pooled"):
        for suffix in ("scale", "zero_point"):
            assert a[f"{name}_{suffix}"].tobytes() == b[f"t_{name}_{suffix}"].tobytes()


def test_equal_weights_are_told_apart_by_order() -> None:
    weight = np.eye(2, dtype=np.float32) * 3
    nodes = [helper.make_node("MatMul", [a, "w"], [b], name=b) for a, b in (("x", "y"), ("y", "z"))]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")]))
    ranges = {"x": (-1.0, 1.0), "y": (-3.0, 3.0)}
    assert stored(_ranges.describe(model, ["y", "z"], ranges)).match(model, ["y", "z"], "m") == ranges


@pytest.mark.parametrize(
    ("damage", "settings", "said"),
    [
        (lambda ranges: [*ranges[:3], {**ranges[3], "weight_sha256": SHA}], {}, "Gemm '/head/Gemm' .*: no stored range has its weight"),
        (lambda ranges: [*ranges, {**ranges[0], "weight_sha256": SHA}], {}, "no product for 1 of 5 ranges"),
        (lambda ranges: ranges, {"exclude": ("/mlp/fc1/MatMul",)}, "no product for 1 of 4 ranges, such as that of 'normed'"),
    ],
)
def test_another_models_ranges_are_refused_and_nothing_is_left(
    damage: Any, settings: dict[str, Any], said: str, measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    other = replace(job(tmp_path, "onnxruntime", "int8_static", **settings), calibration=None, ranges=stored(damage(measured)))
    with pytest.raises(InputError, match=said) as error:
        quantize(other, "onnxruntime")
    assert "\n" not in str(error.value) and "--data" in str(error.value) and error.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_convolutions_and_products_of_activations_are_refused(measured: list[dict[str, Any]]) -> None:
    model = tiny.tiny_model()
    with pytest.raises(InputError, match="Conv '/patch_embed/Conv', which is no product with a constant matrix"):
        stored(measured).match(model, ["/patch_embed/Conv"], "m")


def test_a_scheme_that_takes_no_ranges_still_wants_images(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibration images"):
        quantize(replace(job(tmp_path, "openvino", "int8_static"), calibration=None, ranges=stored(measured)), "openvino")


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FLOATS, FLOATS).map(sorted), min_size=1, max_size=4))
def test_a_file_reads_back_to_the_same_float32(tmp_path_factory: pytest.TempPathFactory, ends: list[list[float]]) -> None:
    size = len(ends)
    weights = [numpy_helper.from_array(np.full((2, 2), i, np.float32), f"w{i}") for i in range(size)]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"n{i}") for i in range(size)]
    ports = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [1, 2]) for i in (0, size)]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], weights))
    names = [node.name for node in nodes]
    ranges = {f"x{i}": (low, high) for i, (low, high) in enumerate(ends)}
    path = tmp_path_factory.mktemp("written") / "a.ranges.json"
    content = stored(_ranges.describe(model, names, ranges))
    _ranges.write(path, content)
    again = _ranges.load(path, SHA)
    assert again == content
    found = {name: tuple(np.array(pair, np.float32).tobytes() for pair in pairs) for name, pairs in again.match(model, names, "m").items()}
    assert found == {name: tuple(np.array(pair, np.float32).tobytes() for pair in pairs) for name, pairs in ranges.items()}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-40], "in JSON"),
        (lambda text: "[]", "the file"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version"),
        (lambda text: text.replace('"split": "train"', '"split": "test"'), "calibration.split"),
        (lambda text: text.replace('"op"', '"operator"', 1), "ranges.0"),
        (lambda text: text.replace('"low": -', '"low": 1e9, "was": -', 1), "ranges.0"),
        (lambda text: text.replace('"high": ', '"high": NaN, "was": ', 1), "ranges.0"),
        (lambda text: text.replace('"high": ', '"high": -1e9, "tensor": ', 1), "ranges.0"),
        (lambda text: text.replace(SHA, "1" * 64, 1), "ranges of the checkpoint beside it, 000000000000"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(damage: Any, said: str, measured: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "a.ranges.json"
    _ranges.write(path, stored(measured))
    text = path.read_text(encoding="utf-8")
    assert damage(text) != text
    path.write_text(damage(text), encoding="utf-8")
    with pytest.raises(InputError, match=said) as error:
        _ranges.load(path, SHA)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and "reinstall vitedge" in str(error.value)


def test_an_absent_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reinstall vitedge"):
        _ranges.load(tmp_path / "absent.json", SHA)


@pytest.mark.parametrize(
    ("recipe", "config", "said"),
    [
        ({}, {"percentile": 99.9}, ["percentile: 99.999, 99.9"]),
        ({}, {"method": "minmax"}, ["method: percentile, minmax"]),
        ({}, {"attention": True}, ["attention: False, True"]),
        ({"quantize": {"calibration": {"images": 512, "seed": 3}}}, {}, ["images: 256, 512", "seed: 0, 3"]),
        ({"data": {"name": "cifar100"}}, {}, ["data: cifar10, cifar100"]),
        ({}, {"per_channel": False, "activation_type": "int8"}, []),
    ],
)
def test_ranges_apply_to_what_they_were_measured_for_only(recipe: dict[str, Any], config: dict[str, Any], said: list[str]) -> None:
    content = _ranges.load(BUILTIN_RANGES, hash_files([BUILTIN]))
    embedded = load_recipe("deit_tiny_int8").to_plain()
    changed = recipe_from_plain({**embedded, **{k: {**embedded[k], **v} for k, v in recipe.items()}}, "r")
    assert content.differences(changed, Int8Static(**config)) == said


def test_the_shipped_file_is_small_and_can_be_read_by_people() -> None:
    text = BUILTIN_RANGES.read_text(encoding="utf-8")
    content = _ranges.load(BUILTIN_RANGES, hash_files([BUILTIN]))
    assert len(text) < 20_000 and len(text.splitlines()) < 120
    assert len({entry.weight_sha256 for entry in content.ranges}) == len(content.ranges) >= 50
    assert content.made_with == json.loads(text)["made_with"] and content.calibration.images == 256
