from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from tests.compress import reducing
from tests.quantize.made import initializers, job, quantize
from vitedge.artifact import Artifact
from vitedge.compress import tome
from vitedge.errors import InputError
from vitedge.evaluate import parity
from vitedge.export import INPUT, PASSES, to_onnx
from vitedge.graph._run import run_passes
from vitedge.model_file import open_artifact
from vitedge.progress import silent
from vitedge.quantize._alone import logits
from vitedge.quantize._calibrate import activation_ranges
from vitedge.quantize._source import batches
from vitedge.quantize.onnxruntime import Int8Static
from vitedge.runtimes import Target
from vitedge.runtimes import onnxruntime as engine


def test_weights_are_within_half_a_step_of_float_per_channel(tmp_path: Path) -> None:
    for scheme in ("int8_dynamic", "int8_static"):
        made = initializers(quantize(job(tmp_path, "onnxruntime", scheme), "onnxruntime").path)
        for name, weight in tiny.weights().items():
            if name not in ("fc1_weight", "fc2_weight"):
                continue
            q, scale, zero = (made[f"{name}_{suffix}"].astype(np.float64) for suffix in ("quantized", "scale", "zero_point"))
            assert scale.shape == (weight.shape[1],) and not zero.any()
            assert (np.abs(weight - q * scale) <= scale / 2 * (1 + 1e-6)).all()


def test_settings_and_rules_reach_the_file(tmp_path: Path) -> None:
    per_tensor = initializers(quantize(job(tmp_path, "onnxruntime", "int8_static", per_channel=False), "onnxruntime").path)
    assert per_tensor["fc1_weight_scale"].size == 1
    # Where 8-bit products saturate, weights keep to 7 bits.
    narrow = initializers(quantize(job(tmp_path, "onnxruntime", "int8_static", reduce_range=True), "onnxruntime").path)
    assert np.abs(narrow["fc1_weight_quantized"].astype(int)).max() == 64
    wide = initializers(quantize(job(tmp_path, "onnxruntime", "int8_static"), "onnxruntime").path)
    assert np.abs(wide["fc1_weight_quantized"].astype(int)).max() == 127
    assert wide["normed_zero_point"].dtype == np.uint8 and wide["normed_zero_point"] != 0
    signed = initializers(quantize(job(tmp_path, "onnxruntime", "int8_static", activation_type="int8"), "onnxruntime").path)
    assert signed["normed_zero_point"].dtype == np.int8 and signed["normed_zero_point"] == 0


def test_outputs_of_products_and_everything_else_stay_float(tmp_path: Path) -> None:
    artifact = quantize(job(tmp_path, "onnxruntime", "int8_static"), "onnxruntime")
    model = onnx.load(artifact.path)
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert len(quantized) == 4 and {"normed", "activated", "pooled"} < quantized
    onnx.checker.check_model(model, full_check=True)  # sorted, typed, complete


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
def test_products_are_int8_whether_or_not_the_session_fixes_the_batch(scheme: str, batch_size: int | None, tmp_path: Path) -> None:
    artifact = quantize(job(tmp_path, "onnxruntime", scheme), "onnxruntime")
    counts = engine.load(artifact, Target(engine.CPU, threads=1, batch_size=batch_size)).facts.node_counts
    assert counts["int8"] == 4 and counts["float"] == 0


def test_convolution_can_be_kept_as_one(tmp_path: Path) -> None:
    artifact = quantize(job(tmp_path, "onnxruntime", "int8_static", exclude=("/patch_embed/Conv",)), "onnxruntime")
    kinds = [node.op_type for node in onnx.load(artifact.path).graph.node]
    assert kinds.count("Conv") == 1 and artifact.notes["node_counts"] | {"quantize_left": 0} == {"int8": 3, "float": 1, "quantize_left": 0}


def test_only_gemm(tmp_path: Path) -> None:
    artifact = quantize(job(tmp_path, "onnxruntime", "int8_dynamic", op_types=("Gemm",)), "onnxruntime")
    assert artifact.notes["node_counts"]["int8"] == 1 and artifact.notes["nodes_chosen"] == 1


def test_an_int8_file_is_not_quantized_again(tmp_path: Path) -> None:
    artifact = quantize(job(tmp_path, "onnxruntime", "int8_static"), "onnxruntime")
    again = tmp_path / "again"
    again.mkdir()
    (again / "source.onnx").write_bytes(artifact.path.read_bytes())
    with pytest.raises(InputError, match="none left to quantize"):
        quantize(job(again, "onnxruntime", "int8_static"), "onnxruntime")
    assert not (again / "out").exists()


def _product(folder: Path, weight: np.ndarray) -> Path:
    """y = x W for x of rank 4 (the quantizers want images), W square."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["t"], name="product"),
        helper.make_node("ReduceMean", ["t", "axes"], ["y"], keepdims=0),
    ]
    made = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([1, 2], np.int64), "axes")],
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "source.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_static_answer_equals_the_closed_form(tmp_path: Path) -> None:
    """The engine's int8 product is the float product of the dequantized input and weight (quanto's reference)."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((4, 4)).astype(np.float32)
    _product(tmp_path, weight)
    x = rng.uniform(-1, 2, (8, 3, 4, 4)).astype(np.float32)
    artifact = quantize(job(tmp_path, "onnxruntime", "int8_static", images=x, method="minmax"), "onnxruntime")
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    x_hat = (np.clip(np.round(x.astype(np.float64) / scale) + zero, 0, 255) - zero) * scale
    w_scale = np.abs(weight.astype(np.float64)).max(axis=0) / 127
    w_hat = np.round(weight / w_scale) * w_scale
    expected = (x_hat @ w_hat).mean(axis=(1, 2))
    found = engine.load(artifact, Target(engine.CPU, threads=1))(x)
    # One rounding of x that falls on the other side of a half moves a mean of 12 by a twelfth of a step.
    assert np.abs(found - expected).max() < scale * np.abs(w_hat).max() / 12 + 1e-5
    assert np.abs(found - (x.astype(np.float64) @ weight).mean(axis=(1, 2))).max() > 1e-5


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_ranges_are_those_of_numpy_and_do_not_depend_on_the_chunks(method: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = _product(tmp_path, np.eye(4, dtype=np.float32))
    x = rng.standard_normal((64, 3, 4, 4)).astype(np.float32)
    x[0] *= 4  # the largest values come first, so that histograms need no growing and merging is exact
    found = {}
    for size in (1, 8, 64):
        folder = tmp_path / f"{method}{size}"
        folder.mkdir()
        (folder / "float.onnx").write_bytes(path.read_bytes())
        seen: list[float] = []
        ranges = activation_ranges(
            folder / "float.onnx", ["x"], batches(x, size), method, 99.0, lambda done, total, text="", seen=seen: seen.append(done)
        )
        low, high = ranges["x"]
        found[size] = (low, high)
        assert seen == sorted(seen) and seen[-1] == 64 / size
    low, high = found[1]
    assert found[8] == pytest.approx(found[1], rel=1e-5)
    assert found[64] == pytest.approx(found[1], rel=1e-5)
    if method == "minmax":
        assert (low, high) == (x.min(), x.max())
    if method == "percentile":
        # Half a percent is cut on each side, to within the two bins of 2048 that hold the thresholds.
        width = 2 * float(np.abs(x).max()) / 2048
        for outside in ((x < low - width).mean(), (x > high + width).mean()):
            assert outside <= 0.005
        for outside in ((x < low + width).mean(), (x > high - width).mean()):
            assert outside >= 0.005 - 1 / x.size
    if method == "entropy":
        assert x.min() <= low < 0 < high <= x.max()


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    path = _product(tmp_path, np.eye(4, dtype=np.float32))
    x = np.full((2, 3, 4, 4), np.inf, np.float32)
    with pytest.raises(InputError, match="finite range"):
        activation_ranges(path, ["x"], [x], "minmax", 99.0, silent)


def test_percentile_is_a_share_in_percent() -> None:
    with pytest.raises(ValueError, match="greater than 50"):
        Int8Static(percentile=0.999)


def test_library_failure_is_one_line_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime.quantization as library

    from vitedge.errors import VitedgeError

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel\nfor that")

    monkeypatch.setattr(library, "quantize_dynamic", fail)
    with pytest.raises(VitedgeError, match=r"source\.onnx: expected .* RuntimeError: no kernel for that") as error:
        quantize(job(tmp_path, "onnxruntime", "int8_dynamic"), "onnxruntime")
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_metadata_of_others_is_kept(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    model.metadata_props.add(key="names", value="{0: 'ant'}")
    onnx.save(model, tmp_path / "source.onnx")
    artifact: Artifact = quantize(job(tmp_path, "onnxruntime", "int8_static"), "onnxruntime")
    keys = {entry.key for entry in onnx.load(artifact.path).metadata_props}
    assert keys == {"vitedge.preprocessing", "vitedge.labels", "names"}


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A ViT that merges the tokens that are alike, image by image, as an ONNX file."""
    model = tome.apply(reducing.vit(), tome.Config(r=3), reducing.context()).model.eval()
    proto = to_onnx(model, reducing.SIZE, 18)
    run_passes(proto, PASSES, {INPUT: reducing.images(4).numpy()})
    path = tmp_path_factory.mktemp("choosing") / "model.fp32.onnx"
    onnx.save(proto, path)
    return open_artifact(path)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weights"])
def test_a_file_that_chooses_tokens_still_does(scheme: str, choosing: Artifact, tmp_path: Path) -> None:
    artifact = quantize(replace(job(tmp_path, "onnxruntime", scheme), source=choosing), "onnxruntime")
    operators = [[node.op_type for node in onnx.load(each.path).graph.node] for each in (choosing, artifact)]
    assert operators[0].count("TopK") == operators[1].count("TopK") > 0
    assert operators[0].count("ArgMax") == operators[1].count("ArgMax") > 0
    x_BCHW = reducing.images().numpy()
    files = [logits(each, x_BCHW, threads=1) for each in (choosing, artifact)]
    # Rounding moves scores, and so may choose other tokens: what is left is the same answers, by and large.
    assert parity(*files).top1_agreement > 60
