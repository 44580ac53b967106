"""The table: what it says, what it admits, and that it fits."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from tests.bench.made import CONDITIONS, make_measurement
from vitedge.bench.records import Difference, Latency, Skipped, Verdict
from vitedge.report.records import precision_of
from vitedge.report.table import notes, print_table, rows, verdict

FP32 = make_measurement(
    verdict=Verdict("baseline", 1.0), top1=91.42, top1_interval=(90.86, 91.95), top1_images="10,000 test images of CIFAR-10"
)
INT8 = make_measurement(
    "openvino.int8_static",
    runtime="openvino",
    precision="int8",
    float_precision="bf16",
    verdict=Verdict("faster", 2.314, 2.201, 2.433, "model.fp32.onnx fp32"),
    top1=91.3,
    top1_interval=(90.7, 91.8),
    top1_drop=Difference(0.12, -0.05, 0.29, "model.fp32.onnx in openvino fp32"),
)


def printed(measurements, skipped=(), **options) -> str:
    stream = io.StringIO()
    print_table(Console(file=stream, highlight=False, **{"width": 100, **options}), measurements, skipped)
    return stream.getvalue()


def test_one_row_for_all_batch_sizes_of_a_file_in_a_runtime():
    eight = replace(FP32, batch_size=8, images_per_s=640.0, latency_ms=Latency(12.5, 12.5, None, None))
    (cells,) = rows([FP32, eight], [1, 8])
    assert cells[0] == "model.fp32.onnx\n  onnxruntime fp32"
    assert cells[2] == "100\n10.0"
    assert cells[3] == "640\n12.5"
    assert cells[4] == "91.42\n90.9-92.0"
    assert cells[-2:] == ["baseline", "baseline"]


def test_one_file_over_two_float_precisions_is_two_rows():
    over_fp32 = replace(INT8, float_precision="fp32")
    assert [cells[0].split("\n")[1] for cells in rows([INT8, over_fp32], [1])] == ["  openvino int8+bf16", "  openvino int8"]


def test_verdict_has_ratio_and_interval():
    assert verdict(INT8.verdict) == "faster x2.31\n2.20-2.43"
    assert verdict(Verdict("unknown", 1.5)) == "? x1.50"
    assert verdict(Verdict("unknown")) == "-"


def test_what_stays_in_float_is_named():
    assert precision_of(INT8) == "int8+bf16"
    assert precision_of(FP32) == "fp32"


def test_unstable_and_missing_are_marked():
    shaky = replace(FP32, unstable="the rounds' medians differ by 30 %", top1=None, top1_interval=None, top1_reason="no data; run X")
    (cells,) = rows([shaky], [1])
    assert cells[2].startswith("100!")
    assert cells[3] == "-"
    text = "\n".join(notes([shaky], [Skipped("m", "openvino", "bf16", "no bf16 here", 8)]))
    assert "medians differ by 30 %" in text
    assert "top-1 not measured: no data; run X" in text
    assert "not measured: m in openvino bf16 b8: no bf16 here" in text


def test_conditions_are_under_every_table():
    text = "\n".join(notes([FP32], []))
    for word in ("A processor", "2 threads of 2", "load 0.10", "3 rounds", "seed 0", "commit abc", "2026-01-01", "10,000 test images"):
        assert word in text
    busy = replace(
        FP32,
        emulated=True,
        conditions={
            **CONDITIONS,
            "load_average": [5.0, 1, 1],
            "environment": {"ISA": "AVX2"},
            "inherited": {"OMP_NUM_THREADS": "1"},
            "mismatches": ["arch: a, b"],
            "gpus": ["NVIDIA T4"],
        },
    )
    text = "\n".join(notes([busy], []))
    for word in ("EMULATED", "busy before", "under ISA=AVX2", "arch: a, b", "own OMP_NUM_THREADS=1", "NVIDIA T4, governor"):
        assert word in text


def test_fits_100_columns_with_nothing_cut():
    measurements = [
        replace(m, batch_size=b, recipe="deit_tiny_int8") for m in (replace(FP32, artifact="model.int8_dynamic.onnx"), INT8) for b in (1, 8)
    ]
    text = printed(measurements)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    for word in (
        "deit_tiny_int8",
        "model.int8_dynamic.onnx",
        "openvino.int8_static",
        "openvino int8+bf16",
        "faster x2.31",
        "2.20-2.43",
        "90.9-92.0",
        "same 0.12",
        "-0.05~0.29",
    ):
        assert word in text
    assert "…" not in text


def test_the_widest_interval_of_a_drop_fits_too():
    assert INT8.top1_drop is not None
    gained = replace(INT8, top1_drop=replace(INT8.top1_drop, points=-0.2, low=-0.38, high=-0.02), images_per_s=1234.0)
    fp32 = replace(FP32, artifact="model.int8_dynamic.onnx")
    text = printed([replace(m, batch_size=b) for m in (fp32, gained) for b in (1, 8)])
    assert "-0.38~-0.02" in text and "…" not in text
    assert text.count("faster x2.31") == 2


def test_many_batch_sizes_are_tables_of_two():
    text = printed([replace(INT8, batch_size=b) for b in (1, 2, 4, 8, 16)])
    assert "…" not in text
    assert [f"vs fp32, b{b}" in text for b in (1, 2, 4, 8, 16)] == [True] * 5
    assert text.count("faster x2.31") == 5


def test_square_brackets_in_names_are_text():
    assert "[bold]x.onnx" in printed([replace(FP32, artifact="[bold]x.onnx")], [Skipped("a", "", "", "see [torch]")])
    assert "see [torch]" in printed([FP32], [Skipped("a", "", "", "see [torch]")])


def test_no_colour_codes_when_colour_is_off():
    assert "\x1b" not in printed([FP32, INT8], no_color=True, force_terminal=True).replace("\x1b[1m", "").replace("\x1b[0m", "").replace(
        "\x1b[3m", ""
    )
