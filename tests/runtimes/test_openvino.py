"""What OpenVINO really runs: precision held, read back, and counted in the compiled graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.homes import watched
from tests.runtimes import files
from vitedge.artifact import Artifact
from vitedge.errors import InputError, UnavailableError
from vitedge.host import isa_flags, tool_versions
from vitedge.model_file import open_artifact
from vitedge.runtimes import Target, openvino

pytestmark = pytest.mark.skipif(not tool_versions(["openvino"]), reason="the [openvino] extra is not installed")
has_bf16 = bool({"avx512_bf16", "amx_bf16"} & set(isa_flags()))
needs_bf16 = pytest.mark.skipif(not has_bf16, reason="this processor has no bf16")


@pytest.fixture(scope="module")
def float_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(tiny.write_tiny_onnx(tmp_path_factory.mktemp("ov") / "m.onnx"))


@pytest.fixture(scope="module", params=[True, False], ids=["int8 constants", "fake-quantized weights"])
def int8_artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("ov8") / "model.xml"
    return open_artifact(files.write_quantized_ir(path, int8_constants=request.param))


@needs_bf16
def test_bf16_is_really_less_exact_and_fp32_is_not(float_artifact: Artifact) -> None:
    x_BCHW = tiny.images(4)
    expected = tiny.logits(x_BCHW)
    errors = {}
    for precision in ("fp32", "bf16"):
        session = openvino.load(float_artifact, Target("CPU", precision))
        errors[precision] = np.abs(session(x_BCHW) - expected).max()
        assert session.facts.precision == session.facts.float_precision == precision
        assert session.facts.node_counts == {"int8": 0, "float": 4, "quantize_left": 0}
    assert errors["fp32"] < 1e-5
    assert 1e-4 < errors["bf16"] < 5e-2  # bf16 keeps 8 bits: one part in 256 of values near one


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_int8_products_are_counted_however_they_are_fused(int8_artifact: Artifact, batch_size: int | None, precision: str) -> None:
    """With a fixed batch OpenVINO fuses the whole model into one layer, and says f32 of it."""
    facts = openvino.load(int8_artifact, Target("CPU", precision, batch_size=batch_size)).facts
    assert (facts.precision, facts.float_precision) == ("int8", precision)
    assert (facts.node_counts["int8"], facts.node_counts["float"]) == (2, 0)


def test_auto_says_which_device_it_took(float_artifact: Artifact) -> None:
    session = openvino.load(float_artifact, Target("AUTO", threads=1))
    x_BCHW = tiny.images(2)
    np.testing.assert_allclose(session(x_BCHW), tiny.logits(x_BCHW), atol=1e-4)
    assert session.facts.provider.startswith("AUTO:")
    assert session.facts.precision == "fp32"


@pytest.mark.parametrize("device", ["GPU", "NPU"])
def test_a_device_that_is_not_there_is_refused(float_artifact: Artifact, device: str) -> None:
    if device in openvino.available().providers:
        pytest.skip(f"this host has a {device}")
    with pytest.raises(UnavailableError, match=f"OpenVINO finds no {device}"):
        openvino.load(float_artifact, Target(device))


def test_bf16_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    offered = openvino._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert openvino.refusal("CPU", "fp32", ()) == ""
    assert openvino.refusal("CPU", "bf16", ("avx2", "avx512_vnni"))
    if "BF16" in offered:
        assert openvino.refusal("CPU", "bf16", ("amx_bf16",)) == ""
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        assert "ONEDNN_MAX_CPU_ISA=AVX2" in openvino.refusal("CPU", "bf16", ("amx_bf16",))


def test_a_precision_that_openvino_changed_is_refused(float_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone on a processor with AMX, OpenVINO takes bf16; an ignored hint must not pass for what was asked."""
    monkeypatch.setitem(openvino._HINTS, "fp32", "bf16" if has_bf16 else "f16")
    with pytest.raises(UnavailableError, match="expected fp32 on CPU, found OpenVINO chose"):
        openvino.load(float_artifact, Target("CPU", "fp32"))


def test_a_broken_graph_is_an_input_error_on_one_line(int8_artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text(int8_artifact.path.read_text().replace('type="MatMul"', 'type="NoSuchOperation"'))
    path.with_suffix(".bin").write_bytes(int8_artifact.files[1].read_bytes())
    with pytest.raises(InputError) as caught:
        openvino.load(open_artifact(path), Target("CPU"))
    assert "NoSuchOperation" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Exception from" not in str(caught.value)


def test_it_writes_nothing_to_the_home_folder_and_starts_no_telemetry(float_artifact: Artifact, tmp_path: Path) -> None:
    """A plain `import openvino` reports itself over the network and leaves an identifier in the home folder."""
    code = (
        "import sys; from vitedge.model_file import open_artifact; from vitedge.runtimes import Target, openvino\n"
        "openvino.load(open_artifact(sys.argv[1]), Target('CPU')).facts\n"
        "assert 'openvino' in sys.modules and not [name for name in sys.modules if name.startswith('openvino_telemetry')]"
    )
    subprocess.run([sys.executable, "-c", code, str(float_artifact.path)], check=True, env=watched(tmp_path / "home"))
    assert list((tmp_path / "home").iterdir()) == []
