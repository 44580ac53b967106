"""report.json: exact field names, merging, and refusal of a damaged one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.made import CONDITIONS, make_measurement
from vitedge.bench.records import Difference, Skipped
from vitedge.errors import InputError
from vitedge.report.json_file import dump, merge_report, read_report, to_plain

# What programs that read the JSON rely on.
PROMISED = {
    "artifact",
    "runtime",
    "provider",
    "precision",
    "batch_size",
    "params_m",
    "macs_g",
    "size_bytes",
    "iterations_per_s",
    "images_per_s",
    "latency_ms",
    "load_ms",
    "first_inference_ms",
    "peak_rss_mib",
    "top1",
    "top5",
    "top1_interval",
    "top1_agreement",
    "verdict",
    "conditions",
}


def test_every_promised_field_is_there():
    plain = json.loads(dump(to_plain([make_measurement()], [Skipped("a", "b", "c", "why")])))
    assert plain["schema_version"] == 1
    assert set(plain["measurements"][0]) >= PROMISED
    assert set(plain["measurements"][0]["latency_ms"]) == {"mean", "p50", "p90", "p99"}
    assert plain["skipped"][0]["reason"] == "why"


def test_newest_of_a_row_stays_and_other_rows_are_kept(tmp_path: Path):
    other_device = make_measurement(conditions={**CONDITIONS, "device": "another"})
    merge_report(tmp_path, [make_measurement(), make_measurement("int8"), make_measurement(batch_size=8), other_device])
    newer = replace(make_measurement(), iterations_per_s=7.0, top1_drop=Difference(0.1, -0.1, 0.3, "fp32"))
    merge_report(tmp_path, [newer])
    kept = read_report(tmp_path)
    assert len(kept) == 4
    rates = {(m["artifact"], m["batch_size"], m["conditions"]["device"]): m["iterations_per_s"] for m in kept}
    assert rates[("model.fp32.onnx", 1, "board")] == 7.0
    assert rates[("model.fp32.onnx", 1, "another")] == 100.0
    assert next(m for m in kept if m["top1_drop"])["top1_drop"]["points"] == 0.1


def test_no_report_is_no_measurements(tmp_path: Path):
    assert read_report(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2, "measurements": []}', '{"schema_version": 1}'])
def test_damaged_report_is_refused_and_left_alone(tmp_path: Path, text: str):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        merge_report(tmp_path, [make_measurement()])
    assert "report.json" in str(caught.value)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@given(
    st.recursive(
        st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_dump_is_json_of_the_same_content(content):
    assert json.loads(dump(content)) == content


def test_samples_are_one_line_a_round():
    lines = dump({"samples_ms": [[1.0, 2.5e-7, 3], [-4.0]], "name": "[ 1 ]"}).splitlines()
    assert "    [1.0, 2.5e-07, 3]," in lines
    assert "    [-4.0]" in lines
    assert '  "name": "[ 1 ]",' in lines


def test_an_int8_file_over_fp32_and_over_bf16_are_two_rows(tmp_path: Path) -> None:
    rows = [make_measurement("int8", precision="int8", float_precision=kind) for kind in ("fp32", "bf16")]
    merge_report(tmp_path, rows)
    assert sorted(plain["float_precision"] for plain in read_report(tmp_path)) == ["bf16", "fp32"]


def test_a_row_that_lacks_what_is_known_today_stays(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"schema_version": 1, "measurements": [{"artifact": "old"}]}))
    merge_report(tmp_path, [make_measurement()])
    assert [plain["artifact"] for plain in read_report(tmp_path)] == ["model.fp32.onnx", "old"]
