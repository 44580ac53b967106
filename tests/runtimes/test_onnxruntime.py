"""What ONNX Runtime really runs, counted in files whose answer is known by construction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from tests.homes import watched
from tests.runtimes import files
from vitedge.errors import InputError, UnavailableError, WorkerError
from vitedge.host import gpus
from vitedge.model_file import open_artifact
from vitedge.runtimes import Target, onnxruntime

CPU = onnxruntime.CPU
pytestmark = pytest.mark.usefixtures("profiled_elsewhere")
no_gpu = pytest.mark.skipif(bool(gpus()), reason="this host has a GPU")


def test_qdq_layers_become_int8_kernels(tmp_path: Path) -> None:
    artifact = open_artifact(files.write_qdq(tmp_path / "m.onnx"))
    session = onnxruntime.load(artifact, Target(CPU))
    x_BCHW = tiny.images(3)
    expected = np.clip(np.round(x_BCHW.reshape(3, -1) / files.SCALE), -128, 127) * files.SCALE
    first, second = (weight * files.SCALE for weight in files.int8_weights())
    hidden = np.clip(np.round(expected @ first / files.SCALE), -128, 127) * files.SCALE
    np.testing.assert_allclose(session(x_BCHW), hidden @ second, atol=1e-3)
    facts = session.facts
    assert (facts.precision, facts.float_precision) == ("int8", "fp32")
    assert facts.node_counts["int8"] == 2
    assert facts.node_counts["float"] == 0


def test_qdq_around_float_weights_stays_float_and_says_so(tmp_path: Path) -> None:
    artifact = open_artifact(files.write_qdq(tmp_path / "m.onnx", quantized_weights=False))
    assert artifact.scheme == "int8_static"
    facts = onnxruntime.load(artifact, Target(CPU)).facts
    assert facts.precision == "fp32"
    assert facts.node_counts == {"int8": 0, "float": 2, "quantize_left": 4}


def test_dynamic_int8_is_int8(tmp_path: Path) -> None:
    facts = onnxruntime.load(open_artifact(files.write_dynamic(tmp_path / "m.onnx")), Target(CPU)).facts
    assert facts.precision == "int8"
    assert facts.node_counts == {"int8": 1, "float": 0, "quantize_left": 0}


def test_it_writes_nothing_to_the_home_folder_and_reports_nothing(tmp_path: Path) -> None:
    """The official builds report to a server and leave an identifier in the home folder, unless they are told not to before they load."""
    path = files.write_dynamic(tmp_path / "m.onnx")
    code = (
        "import sys; from vitedge.model_file import open_artifact; from vitedge.runtimes import Target, onnxruntime\n"
        "onnxruntime.load(open_artifact(sys.argv[1]), Target('CPUExecutionProvider')).facts"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=watched(tmp_path / "home"))
    assert list((tmp_path / "home").iterdir()) == []


def test_a_file_in_the_users_folder_is_not_imported_by_the_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(files.write_dynamic(tmp_path / "m.onnx"))
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert onnxruntime.load(artifact, Target(CPU)).facts.precision == "int8"


def test_a_half_precision_file_runs_in_fp32_on_the_cpu(tmp_path: Path) -> None:
    artifact = open_artifact(files.write_half(tmp_path / "m.onnx"))
    assert artifact.scheme == "fp16"
    facts = onnxruntime.load(artifact, Target(CPU)).facts
    assert (facts.precision, facts.float_precision) == ("fp32", "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_cpu_provider_has_no_half_precision(tmp_path: Path, precision: str) -> None:
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx"))
    with pytest.raises(UnavailableError, match=f"{precision} on CPUExecutionProvider"):
        onnxruntime.load(artifact, Target(CPU, precision))


@no_gpu
@pytest.mark.parametrize("provider", [onnxruntime.CUDA, onnxruntime.TENSORRT])
def test_a_gpu_provider_without_a_gpu_is_refused(tmp_path: Path, provider: str) -> None:
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx"))
    with pytest.raises(UnavailableError, match="no NVIDIA GPU") as caught:
        onnxruntime.load(artifact, Target(provider))
    assert caught.value.exit_code == 4


def test_a_provider_that_fell_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU build of ONNX Runtime lists CUDA and gives a CPU session where CUDA's libraries are missing."""
    import onnxruntime as engine

    real = engine.InferenceSession
    monkeypatch.setattr(engine, "InferenceSession", lambda path, options, providers: real(path, options, providers=[CPU]))
    monkeypatch.setattr(onnxruntime, "available", lambda: onnxruntime.Availability("1", (CPU, onnxruntime.CUDA)))
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx"))
    with pytest.raises(UnavailableError, match="fell back to CPUExecutionProvider"):
        onnxruntime.load(artifact, Target(onnxruntime.CUDA))


def test_products_left_to_another_provider_are_refused() -> None:
    nodes = [("MatMul", onnxruntime.CUDA), ("Gather", CPU), ("Shape", CPU)]
    onnxruntime._refuse_elsewhere(nodes, Target(onnxruntime.CUDA))
    with pytest.raises(UnavailableError, match="2 MatMulInteger on CPUExecutionProvider"):
        onnxruntime._refuse_elsewhere([*nodes, *[("MatMulInteger", CPU)] * 2], Target(onnxruntime.CUDA))


def test_a_fixed_batch_specializes_a_named_dimension(tmp_path: Path) -> None:
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx", batch="any_name"))
    assert onnxruntime.load(artifact, Target(CPU, batch_size=3)).input_shape == (3, 3, 8, 8)
    assert onnxruntime.load(artifact, Target(CPU)).input_shape == (None, 3, 8, 8)


def test_an_operator_no_engine_has_is_an_input_error(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    model.graph.node[1].op_type = "NoSuchOperator"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="NoSuchOperator") as caught:
        onnxruntime.load(open_artifact(tmp_path / "m.onnx"), Target(CPU))
    assert "\n" not in str(caught.value)


def test_facts_of_a_file_that_is_gone_are_an_error_not_a_guess(tmp_path: Path) -> None:
    path = tiny.write_tiny_onnx(tmp_path / "m.onnx")
    session = onnxruntime.load(open_artifact(path), Target(CPU))
    path.unlink()
    with pytest.raises(WorkerError, match="exit code 1"):
        _ = session.facts


def test_asking_for_the_facts_costs_this_process_no_memory(tmp_path: Path) -> None:
    """Peak memory is measured in the process that holds the session: a second one beside it would be counted."""
    weight = np.zeros((files.FEATURES, 30_000), np.float32)  # 23 MB
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["pixels"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "big",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 30_000])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "big.onnx")
    code = (
        "import resource, sys; from vitedge.model_file import open_artifact; from vitedge.runtimes import Target, onnxruntime as r\n"
        "a = open_artifact(sys.argv[1]); s = r.load(a, Target(r.CPU)); x = __import__('numpy').zeros((1, 3, 8, 8), 'float32'); s(x)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; s.facts; s(x)\n"
        "sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big.onnx")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5_000, "KiB more than before"
