"""Which rows a bench has, by files, profile and what the host can do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.bench.made import make_build, write_profile
from vitedge.artifact import Artifact, Manifest
from vitedge.bench.rows import Candidate, check_runtimes, choose_uses, find_candidates, one_row, plan_rows
from vitedge.device import RuntimeUse, load_device
from vitedge.errors import InputError, UnavailableError, UsageError
from vitedge.host import probe_host
from vitedge.model_file import open_artifact

ORT = RuntimeUse(runtime="onnxruntime", provider="CPUExecutionProvider")
OV = RuntimeUse(runtime="openvino", provider="CPU", precisions=("fp32", "bf16"))
USES = [(ORT, "fp32", ""), (OV, "fp32", ""), (OV, "bf16", "")]


def chosen(artifact: Artifact, uses=USES) -> list[tuple[str, str]]:
    return [(use.runtime, precision) for use, precision, _ in choose_uses(artifact, uses)]


def made(scheme: str, kind: str = "onnx", **notes: str) -> Artifact:
    return Artifact("a", kind, scheme, (Path("a"),), "sha", 1, notes=notes)


def test_float_files_run_everywhere_at_every_precision():
    assert chosen(made("fp32")) == [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]
    assert chosen(made("fp32", "openvino")) == [("openvino", "fp32"), ("openvino", "bf16")]
    assert chosen(made("fp32", "checkpoint")) == []


def test_quantized_files_run_where_they_were_made_with_the_last_usable_precision():
    assert chosen(made("int8_static", library="onnxruntime")) == [("onnxruntime", "fp32")]
    assert chosen(made("int8_static")) == [("onnxruntime", "fp32")]
    assert chosen(made("int8_static", "openvino", library="openvino")) == [("openvino", "bf16")]
    assert chosen(made("int8_static", library="nncf")) == [("openvino", "bf16")]
    without_bf16 = [USES[0], USES[1], (OV, "bf16", "no bf16 here")]
    assert chosen(made("int8_static", "openvino"), without_bf16) == [("openvino", "fp32")]
    none = [(OV, "fp32", "not installed"), (OV, "bf16", "not installed")]
    assert [use[2] for use in choose_uses(made("int8_static", "openvino"), none)] == ["not installed"]


def plan(tmp_path: Path, artifact: Artifact, uses=USES, sizes=(8, 1)):
    device = load_device(str(write_profile(tmp_path / "board.yaml")))
    return plan_rows([Candidate(artifact)], device, probe_host(), uses, 2, sizes)


def test_rows_that_cannot_run_are_listed_with_the_reason(tmp_path: Path):
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx"))
    rows, skipped = plan(tmp_path, artifact, [USES[0], (OV, "fp32", "openvino is not installed")])
    assert [(one.row.runtime, one.batch_sizes, one.row.threads) for one in rows] == [("onnxruntime", (1, 8), 2)]
    assert [(one.runtime, one.precision, one.reason) for one in skipped] == [("openvino", "fp32", "openvino is not installed")]


def test_fixed_batch_runs_at_its_own_and_lists_the_others(tmp_path: Path):
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx", batch=1))
    rows, skipped = plan(tmp_path, artifact, USES[:1])
    assert [one.batch_sizes for one in rows] == [(1,)]
    assert [(one.batch_size, one.reason) for one in skipped] == [(8, "its batch is fixed at 1")]


def test_file_of_a_format_nothing_opens_is_listed(tmp_path: Path):
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx"))
    rows, skipped = plan(tmp_path, replace(artifact, format="checkpoint"))
    assert rows == []
    assert "no runtime here that opens checkpoint files" in skipped[0].reason


def test_every_build_folder_without_twins(tmp_path: Path):
    make_build(tmp_path / "build" / "one")
    make_build(tmp_path / "build" / "two")
    candidates, skipped, _ = find_candidates([], tmp_path / "build")
    names = [(one.folder.name, one.artifact.name) for one in candidates if one.folder]
    assert names == [(f, n) for f in ("one", "two") for n in ("model.fp32.onnx", "model.int8_dynamic.onnx")]
    assert skipped == []


def test_named_twin_is_measured_and_keeps_its_manifest(tmp_path: Path):
    root = make_build(tmp_path / "one")
    candidates, _, _ = find_candidates([root / "model.fp32.batch1.onnx", root / "model.int8_dynamic.onnx"], tmp_path)
    assert [one.artifact.recipe for one in candidates] == ["one", "one"]
    assert candidates[1].artifact.notes == {"library": "onnxruntime"}
    assert {one.folder for one in candidates} == {root}


def test_the_same_file_twice_is_one_row(tmp_path: Path):
    root = make_build(tmp_path / "one")
    candidates, _, _ = find_candidates([root, root / "model.fp32.onnx", root / "model.fp32.onnx"], tmp_path)
    assert len(candidates) == 2


def test_missing_and_changed_files_are_listed(tmp_path: Path):
    root = make_build(tmp_path / "one")
    (root / "model.fp32.onnx").unlink()
    with (root / "model.int8_dynamic.onnx").open("ab") as stream:
        stream.write(b"x")
    candidates, skipped, errors = find_candidates([root], tmp_path)
    assert candidates == []
    assert ["missing" in one.reason for one in skipped] == [True, False]
    assert "changed since it was built" in skipped[1].reason
    assert all(one.failed for one in skipped)
    assert [error.exit_code for error in errors] == [1, 1]
    assert "export again" in str(errors[0])


def test_nothing_built_names_the_export_command(tmp_path: Path):
    with pytest.raises(UsageError) as caught:
        find_candidates([], tmp_path / "build")
    assert "vitedge export --recipe deit_tiny_int8" in str(caught.value)
    Manifest(tmp_path / "build" / "empty").save()
    with pytest.raises(UsageError):
        find_candidates([], tmp_path / "build")


def test_damaged_manifest_and_foreign_files_are_errors(tmp_path: Path):
    root = tmp_path / "build" / "one"
    root.mkdir(parents=True)
    (root / "manifest.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(InputError, match="manifest"):
        find_candidates([], tmp_path / "build")
    (tmp_path / "picture.onnx").write_bytes(b"\x89PNG")
    with pytest.raises(InputError):
        find_candidates([tmp_path / "picture.onnx"], tmp_path)


def test_runtime_must_be_the_profiles(tmp_path: Path):
    device = load_device(str(write_profile(tmp_path / "board.yaml")))
    check_runtimes(["onnxruntime"], device)
    with pytest.raises(UsageError) as caught:
        check_runtimes(["onnxruntme"], device)
    assert "did you mean 'onnxruntime'?" in str(caught.value)


def test_one_row_takes_the_first_way_or_says_why_not(tmp_path: Path):
    device = load_device(str(write_profile(tmp_path / "board.yaml")))
    candidate = Candidate(open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx")))
    assert one_row(candidate, device, USES, None, 2).runtime == "onnxruntime"
    assert one_row(candidate, device, USES, "bf16", 2).runtime == "openvino"
    with pytest.raises(UnavailableError, match="fp16"):
        one_row(candidate, device, USES, "fp16", 2)
    with pytest.raises(UnavailableError, match="too old"):
        one_row(candidate, device, [(ORT, "fp32", "too old")], None, 2)
