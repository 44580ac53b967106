"""`vitedge bench` through its entry point, on a tiny model in real engines."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests import tiny
from tests.bench.made import expected_top1, make_build, make_images, turn_logits_at_batch_1, write_profile
from vitedge.cli.main import run

QUICK = ["--rounds", "2", "--seconds", "0.02", "--iterations", "7"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITEDGE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def board(tmp_path: Path) -> list[str]:
    return ["--device", str(write_profile(tmp_path / "board.yaml"))]


def test_whole_bench_of_a_build_folder(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    images = make_images(tmp_path / "insects")
    root = make_build(tmp_path / "build" / "tiny", data=images)
    assert run(["bench", *board, *QUICK, "--json", "-o", "out.json"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed["schema_version"] == 1
    assert printed == json.loads(Path("out.json").read_text())
    kept = json.loads((root / "report.json").read_text())
    assert sorted(m["artifact"] for m in kept["measurements"]) == sorted(m["artifact"] for m in printed["measurements"])
    rows = {(m["artifact"], m["batch_size"]): m for m in printed["measurements"]}
    assert set(rows) == {(name, batch) for name in ("model.fp32.onnx", "model.int8_dynamic.onnx") for batch in (1, 2)}
    fp32, int8 = rows[("model.fp32.onnx", 2)], rows[("model.int8_dynamic.onnx", 2)]
    assert (fp32["precision"], int8["precision"]) == ("fp32", "int8")
    assert math.isclose(fp32["top1"], expected_top1(images))
    assert fp32["top1_interval"][0] < fp32["top1"] < fp32["top1_interval"][1]
    assert fp32["top1_drop"] is None
    assert fp32["top1_agreement"] == 100.0
    assert fp32["verdict"]["relation"] == "baseline"
    assert int8["verdict"]["relation"] in ("faster", "same", "slower")
    assert int8["verdict"]["low"] < int8["verdict"]["ratio"] < int8["verdict"]["high"]
    assert math.isclose(int8["top1_drop"]["points"], fp32["top1"] - int8["top1"], abs_tol=1e-9)
    assert int8["node_counts"]["int8"] == 3  # both of the MLP, and the head: the quantizer turns Gemm into MatMul first
    assert fp32["params_m"] == int8["params_m"] == sum(w.size for w in tiny.weights().values()) / 1e6
    assert fp32["images_per_s"] == 2 * fp32["iterations_per_s"]
    assert all(len(m["samples_ms"]) == 2 and min(map(len, m["samples_ms"])) >= 7 for m in rows.values())
    assert fp32["conditions"]["device"] == "board"
    assert fp32["latency_ms"]["p50"] > 0
    assert "100 %" in captured.err


def test_foreign_file_is_timed_and_says_why_there_is_no_top1(board: list[str], capsys: pytest.CaptureFixture[str]):
    tiny.write_tiny_onnx(Path("foreign.onnx"), preprocessing=False)
    assert run(["bench", "foreign.onnx", *board, *QUICK, "--batch-size", "1", "--data", str(make_images(Path("insects")))]) == 0
    out = capsys.readouterr().out
    assert "foreign.onnx" in out
    assert "no preprocessing contract" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert not Path("report.json").exists()


def test_openvino_rows_share_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("openvino")
    uses = [
        {"runtime": "onnxruntime", "provider": "CPUExecutionProvider", "precisions": ["fp32", "fp16"]},
        {"runtime": "openvino", "provider": "CPU"},
    ]
    board = str(write_profile(tmp_path / "two.yaml", runtimes=uses))
    tiny.write_tiny_onnx(Path("m.onnx"))
    assert run(["bench", "m.onnx", "--device", board, "--no-top1", *QUICK, "--rounds", "1", "--batch-size", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(m["runtime"], m["precision"]) for m in result["measurements"]] == [("onnxruntime", "fp32"), ("openvino", "fp32")]
    assert [m["top1_reason"] for m in result["measurements"]] == ["not asked for (--no-top1)"] * 2
    assert [(s["runtime"], s["precision"]) for s in result["skipped"]] == [("onnxruntime", "fp16")]
    assert result["skipped"][0]["reason"]


def failing(capsys: pytest.CaptureFixture[str], args: list[str]) -> tuple[int, str]:
    code = run(["bench", *args])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return code, lines[0]


def test_nothing_built_exits_2_and_names_the_export_command(board: list[str], capsys: pytest.CaptureFixture[str]):
    code, line = failing(capsys, board)
    assert code == 2
    assert "vitedge export --recipe deit_tiny_int8" in line


def test_errors_before_anything_is_timed(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    Path("bad.onnx").write_text("hello")
    tiny.write_tiny_onnx(Path("m.onnx"))
    cuda = write_profile(
        tmp_path / "gpu.yaml", accelerator="cuda", runtimes=[{"runtime": "onnxruntime", "provider": "CUDAExecutionProvider"}]
    )
    elsewhere = write_profile(tmp_path / "gpu2.yaml", runtimes=[{"runtime": "onnxruntime", "provider": "CUDAExecutionProvider"}])
    cases = [
        (["bad.onnx", *board], 1, "bad.onnx"),
        (["absent.onnx", *board], 2, "absent.onnx"),
        (["m.onnx", *board, "--runtime", "openvin"], 2, "openvin"),
        (["m.onnx", *board, "--data", "./nowhere"], 2, "nowhere"),
        (["m.onnx", *board, "-o", "no/such/folder/out.json"], 1, "out.json"),
        (["m.onnx", "--device", "no_such_device"], 2, "no_such_device"),
        (["m.onnx", *board, "--rounds", "0"], 2, "rounds"),
    ]
    from vitedge.host import gpus

    if not gpus():
        cases += [(["m.onnx", "--device", str(cuda)], 4, "GPU"), (["m.onnx", "--device", str(elsewhere)], 4, "GPU")]
    before = set(tmp_path.rglob("*"))
    for args, want, word in cases:
        code, line = failing(capsys, args)
        assert (code, word in line) == (want, True), line
    assert set(tmp_path.rglob("*")) == before


def test_only_row_that_fails_is_the_commands_error(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    """Weights cut short: the header is whole, so it is the engine, in the worker, that finds out."""
    import onnx

    model = tiny.tiny_model()
    model.graph.node[5].input[1] = "norm_bias"  # shapes that do not add up
    onnx.save(model, "broken.onnx")
    code, line = failing(capsys, ["broken.onnx", *board, *QUICK, "--json"])
    assert code == 1
    assert "broken.onnx" in line


def test_json_holds_the_error_too(board: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(["bench", *board, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_require_stable_exits_5_after_printing(board: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    import vitedge.bench.session

    monkeypatch.setattr(vitedge.bench.session, "SPREAD_LIMIT", -1.0)  # no machine is that quiet
    tiny.write_tiny_onnx(Path("m.onnx"))
    assert run(["bench", "m.onnx", *board, *QUICK, "--no-top1", "--batch-size", "1", "--require-stable", "--json"]) == 5
    captured = capsys.readouterr()
    assert json.loads(captured.out)["measurements"][0]["unstable"]
    assert "error: m.onnx in onnxruntime b1" in captured.err


def test_profile_of_another_machine_is_labelled_emulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = write_profile(tmp_path / "other.yaml", environment={"VITEDGE_TEST": "1"}, threads=1)
    tiny.write_tiny_onnx(Path("m.onnx"))
    assert run(["bench", "m.onnx", "--device", str(other), "--no-top1", *QUICK, "--batch-size", "1"]) == 0
    out = capsys.readouterr().out
    assert "EMULATED" in out
    assert "VITEDGE_TEST=1" in out
    assert "1 threads of" in out


def test_help_loads_no_engine_and_stdout_is_json_in_a_real_process(tmp_path: Path, board: list[str]):
    code = (
        "import sys; from vitedge.cli.main import run; run([sys.argv[1], '--help'])\n"
        "print(sorted({'numpy', 'onnx', 'onnxruntime', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    for name in ("bench", "eval"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]"
    tiny.write_tiny_onnx(Path("m.onnx"))
    asked = ["bench", "m.onnx", *board, "--no-top1", *QUICK, "--rounds", "1", "--batch-size", "1", "--json"]
    done = subprocess.run([sys.executable, "-m", "vitedge", *asked], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measurements"][0]["artifact"] == "m.onnx"


def test_what_cannot_be_kept_is_printed_all_the_same(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    root = make_build(tmp_path / "build" / "tiny")
    (root / "report.json").write_text("{")
    assert run(["bench", *board, *QUICK, "--no-top1", "--batch-size", "1", "--json", "-o", "out.json"]) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["measurements"]) == 2 and json.loads(Path("out.json").read_text())
    assert "error: not kept: " in captured.err and "report.json" in captured.err
    assert (root / "report.json").read_text() == "{"


def test_a_damaged_file_is_the_commands_error(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    root = make_build(tmp_path / "build" / "tiny")
    (root / "model.int8_dynamic.onnx").unlink()
    assert run(["bench", *board, *QUICK, "--no-top1", "--batch-size", "1", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [m["artifact"] for m in printed["measurements"]] == ["model.fp32.onnx"] and printed["skipped"][0]["failed"]
    (root / "model.fp32.onnx").write_bytes(b"other")
    code, line = failing(capsys, [*board, *QUICK, "--json"])
    assert code == 1 and "export again" in line, line


def test_a_file_whose_answers_cannot_be_right_is_the_commands_error(board: list[str], capsys: pytest.CaptureFixture[str]):
    """Its speed would be a build server's green light for a file that is nonsense as it is shipped."""
    tiny.write_tiny_onnx(Path("turned.onnx"))
    proto = onnx.load("turned.onnx")
    turn_logits_at_batch_1(proto)
    onnx.save(proto, "turned.onnx")
    images = str(make_images(Path("insects")))
    assert run(["bench", "turned.onnx", *board, *QUICK, "--batch-size", "1", "--data", images, "--json"]) == 1
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)["measurements"]
    assert found["top1"] is None and "batch 1" in found["top1_reason"] and found["images_per_s"] > 0
    assert "error: 1 of the rows failed" in captured.err


def test_data_may_be_a_folder_of_data_sets(tmp_path: Path, board: list[str], capsys: pytest.CaptureFixture[str]):
    images = make_images(tmp_path / "sets" / "insects")
    make_build(tmp_path / "build" / "tiny", data=Path("insects"))
    assert run(["bench", *board, *QUICK, "--batch-size", "1", "--data", str(images.parent), "--json"]) == 0
    assert all(m["top1"] is not None for m in json.loads(capsys.readouterr().out)["measurements"])
