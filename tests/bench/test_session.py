"""Summing rounds up, stability, and a row that fails among rows that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.made import CONDITIONS, tiny_row
from vitedge.bench import session
from vitedge.bench.conditions import Settings, commit, gather, read_governor
from vitedge.bench.cost import Cost
from vitedge.bench.records import Row
from vitedge.bench.rows import Candidate, PlannedRow
from vitedge.bench.session import summarize, time_rows, why_unstable
from vitedge.bench.timing import TimingSettings
from vitedge.device import Device
from vitedge.host import probe_host

FACTS = {
    "runtime": "onnxruntime",
    "version": "1.0",
    "provider": "CPUExecutionProvider",
    "precision": "fp32",
    "float_precision": "fp32",
    "threads": 1,
    "node_counts": {"int8": 0},
}


def turn(samples_ms: list[float], **changes: Any) -> dict[str, Any]:
    samples_ns = [round(ms * 1e6) for ms in samples_ms]
    made = {"batch_size": 2, "load_ms": 5.0, "first_inference_ms": 30.0, "warmup_iterations": 9, "settled": True, "samples_ns": samples_ns}
    return {**made, "elapsed_ns": sum(samples_ns), "peak_rss_mib": 50.0, "facts": FACTS, **changes}


def test_summary_is_over_rounds_in_closed_form(tmp_path: Path):
    row = tiny_row(tmp_path)
    planned = PlannedRow(Candidate(row.artifact), row, (2,))
    turns = [
        turn([10.0] * 4),
        turn([11.0] * 4, load_ms=7.0, facts=None),
        turn([12.5] * 4, peak_rss_mib=60.0, first_inference_ms=10.0, facts=None),
    ]
    m = summarize(planned, turns, Cost(1_500_000, 2_000_000_000), CONDITIONS)
    assert m.iterations_per_s == pytest.approx(1000 / 11)
    assert m.images_per_s == pytest.approx(2000 / 11)
    assert m.latency_ms.mean == pytest.approx((10 + 11 + 12.5) / 3)
    assert m.latency_ms.p50 == pytest.approx(11.0)
    assert m.latency_ms.p90 is None
    assert (m.load_ms, m.first_inference_ms, m.peak_rss_mib) == (5.0, 30.0, 60.0)
    assert (m.params_m, m.macs_g) == (1.5, 2.0)
    assert m.samples_ms == [[10.0] * 4, [11.0] * 4, [12.5] * 4]
    assert [one["iterations_per_s"] for one in m.rounds] == pytest.approx([100.0, 1000 / 11, 80.0])
    assert "differ by 23 %" in m.unstable
    assert not m.emulated
    assert m.conditions["engine_version"] == "1.0"
    assert m.size_bytes == row.artifact.path.stat().st_size


def test_emulated_by_environment_or_mismatch(tmp_path: Path):
    row = tiny_row(tmp_path)
    planned = PlannedRow(Candidate(row.artifact), row, (2,))
    for changes in ({"environment": {"A": "1"}}, {"mismatches": ["arch: aarch64, x86_64"]}):
        assert summarize(planned, [turn([1.0])], Cost(1, None), {**CONDITIONS, **changes}).emulated


def test_unstable_says_why():
    assert why_unstable([1.0, 1.05, 1.09], [True] * 3) == ""
    assert why_unstable([1.0, 1.2, 1.1], [True] * 3) == "the rounds' medians differ by 18 %"
    assert why_unstable([1.0, 1.0, 1.0], [True, False, False]) == "the warm-up did not settle in 2 of 3 rounds"


def test_a_row_that_fails_is_listed_and_the_others_go_on(tmp_path: Path):
    good = tiny_row(tmp_path)
    absent = replace(good, provider="CUDAExecutionProvider")
    broken_file = tmp_path / "broken.onnx"
    broken_file.write_bytes(good.artifact.path.read_bytes()[:-400])
    broken = replace(good, artifact=replace(good.artifact, name="broken.onnx", files=(broken_file,)))
    planned = [PlannedRow(Candidate(row.artifact), row, (1,)) for row in (good, absent, broken)]
    seen: list[tuple[float, float]] = []
    settings = Settings(rounds=2, timing=TimingSettings(3, 0.01, 0.2))
    timings = time_rows(planned, settings, CONDITIONS, lambda done, total, text="": seen.append((done, total)))
    assert [(one.row.artifact.name, len(ms)) for one, ms in timings.measurements] == [("model.fp32.onnx", 1)]
    assert len(timings.measurements[0][1][0].rounds) == 2
    assert [(one.artifact, one.failed) for one in timings.skipped] == [("model.fp32.onnx", False), ("broken.onnx", True)]
    assert len(timings.errors) == 2
    assert seen[-1] == (6, 6)


def test_rows_are_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What hits the host for a while hits every row: A B A B and not A A B B, whatever the rows are."""
    started: list[str] = []
    timed = session.time_in_worker

    def noted(row: Row, *rest: Any, **more: Any) -> Any:
        started.append(row.artifact.name)
        return timed(row, *rest, **more)

    monkeypatch.setattr(session, "time_in_worker", noted)
    row = tiny_row(tmp_path)
    rows = [replace(row, artifact=replace(row.artifact, name=name)) for name in ("a", "b")]
    planned = [PlannedRow(Candidate(one.artifact), one, (1,)) for one in rows]
    time_rows(planned, Settings(rounds=3, timing=TimingSettings(3, 0.01, 0.1)), CONDITIONS)
    assert started == ["a", "b"] * 3


def test_conditions_hold_what_a_figure_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("ORT_DISABLE_TELEMETRY", "OMPANY", "PATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("LD_PRELOAD", "")
    profile = {
        "name": "board",
        "runtimes": [{"runtime": "onnxruntime", "provider": "CPUExecutionProvider"}],
        "source": {"runtimes": "test"},
    }
    host = probe_host()
    found = gather(Device.model_validate(profile), host, Settings(threads=3, seed=7), ["x"])
    assert found["device"] == "board"
    assert found["mismatches"] == ["x"]
    assert (found["threads"], found["seed"], found["rounds"], found["seconds"]) == (3, 7, 5, 0.5)
    assert (found["cpu"], found["gpus"]) == (host.cpu, list(host.gpus))
    assert found["inherited"].items() >= {"ONEDNN_MAX_CPU_ISA": "AVX2", "LD_PRELOAD": ""}.items()
    assert not {"ORT_DISABLE_TELEMETRY", "OMPANY", "PATH"} & set(found["inherited"])
    assert {"vitedge", "python", "onnxruntime", "numpy"} <= set(found["versions"])
    assert found["date"].endswith("+00:00")
    assert len(found["load_average"]) == 3


def test_governor_and_commit(tmp_path: Path):
    assert read_governor(tmp_path / "absent") is None
    (tmp_path / "governor").write_text("performance\n")
    assert read_governor(tmp_path / "governor") == "performance"
    assert commit()
