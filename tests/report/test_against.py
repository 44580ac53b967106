"""Every row beside its references: which row of a label is meant, and what is said where there is none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.made import BF16, FP32, INT8, made_table, other_conditions, row, study, write_bench, write_study
from vitedge.bench.records import Measurement
from vitedge.errors import UsageError
from vitedge.report.against import is_quantized
from vitedge.report.methods import methods
from vitedge.report.records import Against, Table


def beside(table: Table, label: str, which: str = "baseline") -> list[Against | None]:
    return [getattr(r, f"against_{which}") for r in table.rows if r.label == label]


def test_speed_goes_against_the_fastest_and_answers_against_fp32(tmp_path: Path):
    table = made_table(write_study(tmp_path))
    (dynamic,) = beside(table, "dynamic")
    assert dynamic is not None
    assert dynamic.speed.relation == "slower" and math.isclose(dynamic.speed.ratio or 0, 0.75)
    assert (dynamic.flips.relation, dynamic.flips.broken, dynamic.flips.repaired) == ("same", 4, 0)
    assert dynamic.size_ratio == 0.25
    fp32, bf16 = beside(table, "untouched")
    assert fp32 is not None and bf16 is not None
    assert (fp32.speed.relation, bf16.speed.relation) == ("slower", "baseline")
    assert (fp32.flips.relation, bf16.flips.relation) == ("baseline", "same")
    assert beside(table, "pruned") == [None]
    assert table.baselines() == ["untouched"]


def test_a_whole_name_means_that_row_at_each_batch_size(tmp_path: Path):
    batches = [replace(one, batch_size=b) for b in (1, 8) for one in (FP32, INT8)]
    name = "tiny: model.fp32.onnx in onnxruntime fp32"
    table = made_table(write_bench(tmp_path / "a.json", batches), name)
    said = [r.against_baseline.speed.relation if r.against_baseline else "" for r in table.rows]
    assert said == ["baseline", "faster", "baseline", "faster"]
    assert [r.against_baseline.flips.relation for r in table.rows if r.against_baseline] == ["baseline", "same"] * 2


def test_without_a_study_the_first_fp32_row_is_the_baseline(tmp_path: Path):
    table = made_table(write_bench(tmp_path / "a.json", [INT8, BF16, FP32]))
    assert table.baselines() == ["tiny: model.fp32.onnx in onnxruntime fp32"]
    assert made_table(write_bench(tmp_path / "b.json", [INT8])).baselines() == ["tiny: model.int8_dynamic.onnx in onnxruntime int8"]


def test_the_option_wins_over_the_study(tmp_path: Path):
    table = made_table(write_study(tmp_path), "dynamic")
    assert table.baselines() == ["dynamic"]
    (_, bf16) = beside(table, "untouched")
    assert bf16 is not None and bf16.speed.relation == "faster"


def test_a_baseline_that_no_row_has_is_refused_with_the_nearest(tmp_path: Path):
    with pytest.raises(UsageError, match="did you mean 'dynamic'"):
        made_table(write_study(tmp_path), "dynamik")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conditions": other_conditions(device="phone")}, "untouched was not measured on phone"),
        ({"batch_size": 4}, "untouched was not measured at batch size 4"),
        ({"conditions": other_conditions(date="2026-03-03T00:00:00+00:00")}, "another run"),
    ],
)
def test_where_the_reference_is_missing_it_is_said_and_not_replaced(tmp_path: Path, changes: dict[str, object], reason: str):
    rows = [row("untouched", [FP32]), row("dynamic", [replace(INT8, **changes)])]  # type: ignore[arg-type]
    (dynamic,) = beside(made_table(write_study(tmp_path, study(rows=rows))), "dynamic")
    assert dynamic is not None
    assert (dynamic.speed.relation, dynamic.speed.ratio) == ("not comparable", None)
    assert reason in dynamic.speed.reason


def test_a_recipe_measured_twice_is_compared_inside_each_run(tmp_path: Path):
    later = other_conditions(date="2026-03-03T00:00:00+00:00")
    again = [replace(FP32, conditions=later, images_per_s=500.0), replace(INT8, conditions=later)]
    write_bench(tmp_path / "runs" / "a.json", [FP32, INT8])
    write_bench(tmp_path / "runs" / "b.json", again)
    table = made_table(tmp_path / "runs")
    assert [r.against_baseline.speed.relation for r in table.rows if r.against_baseline] == ["baseline", "faster"] * 2
    assert [bool(r.warnings) for r in table.rows] == [False, False, True, True]  # of another run than the first


def test_untouched_and_continued_are_references_of_their_own(tmp_path: Path):
    rows = [
        row("untouched", [FP32]),
        row("longer", [replace(FP32, sha256="longer", answers=INT8.answers, top1=86.0)], untouched="untouched"),
        row("dynamic", [INT8], untouched="untouched", continued="longer"),
    ]
    table = made_table(write_study(tmp_path, study(rows=rows)))
    (against_untouched,), (against_continued,) = beside(table, "dynamic", "untouched"), beside(table, "dynamic", "continued")
    assert against_untouched is not None and against_continued is not None
    assert (against_untouched.flips.change, against_continued.flips.change) == (-4.0, 0.0)
    assert beside(table, "longer", "continued") == [None]


def test_packed_weights_that_run_in_float_are_quantized():
    assert is_quantized(INT8)
    assert is_quantized(replace(FP32, artifact="openvino.int4_weights"))
    assert not is_quantized(FP32)
    assert not is_quantized(replace(FP32, artifact="model.internal.onnx"))


def test_one_line_per_method_beside_the_paper(tmp_path: Path):
    untouched, dynamic, pruned = methods(made_table(write_study(tmp_path)))
    assert untouched.cpu is not None and untouched.cpu.measurement is not None
    assert untouched.cpu.measurement.precision == "bf16"  # its fastest, in any runtime and precision
    assert untouched.gpu is None and untouched.paper_change is None
    assert dynamic.paper_change is not None and math.isclose(dynamic.paper_change, -0.21)
    assert dynamic.paper_ratio("cpu_it_s") == 0.062 / 0.05
    assert dynamic.paper_ratio("gpu_it_s") is None
    assert pruned.main is None and pruned.failures == ("board: expected a ratio below 1, found 1",)


def test_a_method_that_quantizes_is_its_quantized_file(tmp_path: Path):
    rows = [row("static", [BF16, INT8, replace(INT8, batch_size=8, images_per_s=900.0)])]
    (method,) = methods(made_table(write_study(tmp_path, study(rows=rows, baseline="static"))))
    assert method.cpu is not None and method.cpu.measurement == INT8


def test_a_gpu_row_has_its_own_column(tmp_path: Path):
    gpu = replace(FP32, provider="CUDAExecutionProvider", conditions=other_conditions(device="cuda"), images_per_s=900.0)
    (method,) = methods(made_table(write_study(tmp_path, study(rows=[row("untouched", [FP32, gpu])]))))
    assert method.gpu is not None and method.gpu.measurement == gpu
    assert method.cpu is not None and method.cpu.measurement == FP32 and method.main is method.cpu


def test_each_device_has_a_baseline_of_its_own_where_no_study_names_one(tmp_path: Path):
    cuda = other_conditions(device="cuda")
    torch = replace(FP32, artifact="checkpoint.safetensors", runtime="pytorch", provider="cuda", conditions=cuda)
    gpu = [
        replace(FP32, provider=f"{name}ExecutionProvider", conditions=cuda, images_per_s=rate)
        for name, rate in (("CUDA", 100), ("Tensorrt", 300))
    ]
    table = made_table(write_bench(tmp_path / "a.json", [torch, *gpu, FP32, INT8]))
    assert table.baselines() == [
        "tiny: model.fp32.onnx in onnxruntime CUDAExecutionProvider fp32",
        "tiny: model.fp32.onnx in onnxruntime fp32",
    ]
    said = [r.against_baseline.speed.relation for r in table.rows if r.against_baseline]
    assert said.count("baseline") == 2 and "not comparable" not in said  # of two providers one is the baseline, and the other is compared


def test_answers_are_held_against_a_run_that_has_them(tmp_path: Path):
    write_bench(tmp_path / "a.json", [replace(FP32, top1=None, top1_interval=None, answers=None)])
    write_bench(tmp_path / "b.json", [replace(m, conditions=other_conditions(date="2026-03-03T00:00:00+00:00")) for m in (FP32, INT8)])
    (int8,) = [r for r in made_table(tmp_path).rows if r.measurement and r.measurement.precision == "int8"]
    assert int8.against_baseline is not None and int8.against_baseline.flips.change == -4.0


def test_every_cpu_has_a_line_of_its_own(tmp_path: Path):
    def on(device: str, rate: float, **changes: object) -> list[Measurement]:
        return [replace(m, conditions=other_conditions(device=device), images_per_s=m.images_per_s * rate, **changes) for m in (FP32, INT8)]  # type: ignore[arg-type]

    fp32, int8 = ([a, b] for a, b in zip(on("board", 1.0), on("weak", 0.2, emulated=True), strict=True))
    rows = [row("untouched", fp32), row("dynamic", int8, untouched="untouched")]
    lines = methods(made_table(write_study(tmp_path, study(rows=rows))))
    assert [(line.label, line.places) for line in lines] == [
        ("untouched", "board"),
        ("untouched", "weak (emulated)"),
        ("dynamic", "board"),
        ("dynamic", "weak (emulated)"),
    ]
    # A method that one of them has not stands on no line of the other.
    rows = [row("untouched", fp32), row("dynamic", int8[1:], untouched="untouched")]
    lines = methods(made_table(write_study(tmp_path, study(rows=rows))))
    assert [(line.label, line.places) for line in lines][2:] == [("dynamic", "weak (emulated)")]
    ratios = [line.cpu.against_untouched.speed.ratio for line in lines if line.cpu and line.cpu.against_untouched]
    assert [round(ratio or 0, 2) for ratio in ratios] == [1.5]
