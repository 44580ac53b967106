from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import tiny
from tests.compress import made
from tests.quantize.made import job, quantize
from vitedge import plugins
from vitedge.artifact import Artifact
from vitedge.errors import UnavailableError
from vitedge.evaluate import parity
from vitedge.export import INPUT, PASSES, to_onnx
from vitedge.graph._run import run_passes
from vitedge.host import isa_flags, tool_versions
from vitedge.model_file import open_artifact
from vitedge.quantize._alone import logits
from vitedge.runtimes import Target
from vitedge.runtimes import openvino as engine
from vitedge.runtimes._openvino_import import import_quietly

pytestmark = pytest.mark.skipif(not tool_versions(["openvino", "nncf"]), reason="the [openvino] extra is not installed")
needs_bf16 = pytest.mark.skipif(not {"avx512_bf16", "amx_bf16"} & set(isa_flags()), reason="this processor has no bf16")


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize(job(tmp_path_factory.mktemp("int4"), "openvino", "int4_weights"), "openvino")


def test_weights_are_within_half_a_step_of_float_per_channel(tmp_path: Path) -> None:
    artifact = quantize(job(tmp_path, "openvino", "int8_weights", symmetric=True), "openvino")
    model = import_quietly("openvino").Core().read_model(str(artifact.path))
    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    (codes_NK,) = (op.data for op in constants if op.get_element_type().get_type_name() == "i8" and op.data.shape[0] == tiny.HIDDEN)
    (scale_N1,) = (op.data for op in constants if op.get_element_type().get_type_name() == "f16" and op.data.size == tiny.HIDDEN)
    scale_N1 = scale_N1.reshape(-1, 1).astype(np.float64)
    weight_NK = tiny.weights()["fc1_weight"].T
    # Half a step of rounding, a whole one where code 128 would be needed, and what 128 steps of a scale in fp16 are off by.
    steps = np.where(codes_NK == 127, 1, 0.5) + 128 * 2**-11
    assert (np.abs(codes_NK * scale_N1 - weight_NK) <= np.abs(scale_N1) * steps).all()
    assert codes_NK.min() == -128  # the weight farthest from zero, whichever its sign


def test_the_file_says_whether_activations_may_be_rounded(int4: Artifact, tmp_path: Path) -> None:
    """Left alone, OpenVINO rounds them to int8 in a session that asks for fp32."""
    facts = engine.load(int4, Target("CPU")).facts
    assert (facts.precision, facts.float_precision) == ("fp32", "fp32")
    rounding = quantize(job(tmp_path, "openvino", "int4_weights", arithmetic="int8"), "openvino")
    facts = engine.load(rounding, Target("CPU")).facts
    assert (facts.precision, facts.float_precision) == ("int8", "fp32")
    assert int4.files[1].read_bytes() == rounding.files[1].read_bytes()  # the same weights


def test_packed_weights_are_counted_whatever_they_multiply_in(int4: Artifact) -> None:
    for batch_size in (None, 1):
        counts = engine.load(int4, Target("CPU", batch_size=batch_size)).facts.node_counts
        assert counts == {"int8": 0, "float": 0, "quantize_left": 0, "int4_weights": 3, "int8_weights": 1}


@needs_bf16
def test_the_rest_runs_in_the_float_precision_asked_for(int4: Artifact) -> None:
    facts = engine.load(int4, Target("CPU", "bf16")).facts
    assert facts.precision == facts.float_precision == "bf16"


def test_a_group_that_does_not_divide_the_channels_shrinks_and_is_said(int4: Artifact, tmp_path: Path) -> None:
    # 48 and 16 input channels take groups of 16 in place of 32; the last product is left in int8 by NNCF.
    assert int4.notes["settings"]["group_size"] == 32
    assert int4.notes["bytes"]["products"] == {"u4 by 16": 2, "u4 by 32": 1, "u8 by channel": 1}
    everything = quantize(job(tmp_path, "openvino", "int4_weights", all_layers=True, symmetric=True), "openvino")
    assert everything.notes["node_counts"]["int4_weights"] == 4
    assert everything.notes["bytes"]["products"] == {"i4 by 16": 3, "i4 by 32": 1}


def test_a_ratio_keeps_some_in_int8_and_is_nearer_to_float(int4: Artifact, tmp_path: Path) -> None:
    half = quantize(job(tmp_path, "openvino", "int4_weights", ratio=0.5), "openvino")
    counts = half.notes["node_counts"]
    assert counts["int4_weights"] in (1, 2) and counts["int4_weights"] + counts["int8_weights"] == 4
    x = tiny.images(16)
    fine, coarse = (parity(tiny.logits(x), logits(artifact, x, threads=1)).sqnr_db for artifact in (half, int4))
    assert fine > coarse


def test_where_the_bytes_went(int4: Artifact) -> None:
    found = int4.notes["bytes"]
    kept = {name: weight for name, weight in tiny.weights().items() if weight.ndim == 1}
    assert sum(weight.nbytes for weight in kept.values()) <= found["float_bytes"] <= sum(weight.nbytes for weight in kept.values()) + 64
    assert found["largest_in_float"][0] == {"tensor": "input of /mlp/fc1/Add", "bytes": 4 * tiny.HIDDEN}
    codes = (48 * 16 + 16 * 32 + 32 * 16) // 2 + 16 * 4
    assert codes < found["packed_bytes"] < codes * 1.2  # and zero points
    assert found["packed_bytes"] + found["scale_bytes"] + found["float_bytes"] <= int4.files[1].stat().st_size


def test_without_the_packages_the_error_names_the_scheme_and_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UnavailableError, match=r"openvino\.int4_weights.*pip install 'vitedge\[openvino\]'"):
        plugins.load("quantize", "openvino").quantize(job(tmp_path, "openvino", "int4_weights"))


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A ViT of two blocks whose three matrices are each used as they are and transposed, as an ONNX file that stores each once."""
    import torch

    from vitedge.compress import shared_vit

    config = shared_vit.Config(start="project")
    model = shared_vit.apply(made.student(token=False), config, made.context(Path())).model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    proto = to_onnx(model, 8, 18)
    run_passes(proto, PASSES, {INPUT: made.sample(4)[0]})
    path = tmp_path_factory.mktemp("sharing") / "model.fp32.onnx"
    onnx.save(proto, path)
    return open_artifact(path)


@pytest.mark.parametrize(("scheme", "size"), [("int8_weights", 1.0), ("int4_weights", 0.5)])
def test_a_matrix_that_is_used_twice_is_packed_for_each_use_and_that_is_said(
    scheme: str, size: float, sharing: Artifact, tmp_path: Path
) -> None:
    """The float file stores six matrices, this one twelve; with patch embedding and classifier that are fourteen products."""
    graph = onnx.load(sharing.path).graph
    stored = [t.name for t in graph.initializer if list(t.dims) in ([16, 16], [16, 64], [64, 16])]
    turned = [node for node in graph.node if node.op_type == "Reshape" and node.input[0] in stored]
    assert len(stored) == 6
    artifact = quantize(replace(job(tmp_path, "openvino", scheme), source=sharing), "openvino")
    found = artifact.notes["bytes"]
    assert found["written_out"] == len(turned) >= 6 and sum(found["products"].values()) == 14
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert matrices * size < found["packed_bytes"] < (matrices + 48 * 16 + 16 * 4) * size * 1.5  # and zero points
    x_BCHW = made.sample(made.IMAGES)[0]
    files = [logits(each, x_BCHW, threads=1) for each in (sharing, artifact)]
    assert parity(*files).sqnr_db > (25 if scheme == "int8_weights" else 8)


def test_a_file_that_shares_nothing_has_nothing_written_out(int4: Artifact) -> None:
    assert int4.notes["bytes"]["written_out"] == 0
