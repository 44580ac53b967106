"""A bundle holds what it says, twice the same bytes, and only what was asked for and measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.homes import watched
from tests.package.building import artifact_of, make_build, row, write_profile, write_report
from tests.tiny import CONTRACT, LABELS, logits
from vitedge.artifact import Artifact, Manifest
from vitedge.device import load_device
from vitedge.errors import InputError, OutputError, UnavailableError, UsageError
from vitedge.host import isa_flags
from vitedge.model_file import open_artifact
from vitedge.package.bundle import Bundle, package
from vitedge.package.ports import read_ports
from vitedge.package.verify import verify
from vitedge.preprocess import Preprocessing
from vitedge.runtimes import Target
from vitedge.runtimes.onnxruntime import providers


def make(build: Path, profile: Path, output: Path, **options: Any) -> Bundle:
    return package(build, load_device(str(profile)), output, **options)


def test_members_and_manifest(build: Path, profile: Path, tmp_path: Path) -> None:
    bundle = make(build, profile, tmp_path / "out.zip", golden=2)
    assert bundle.sha256 == hashlib.sha256(bundle.path.read_bytes()).hexdigest()
    with zipfile.ZipFile(bundle.path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        assert archive.namelist() == sorted(members)
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o100644}
    manifest = json.loads(members["manifest.json"])
    golden = ["golden/00.png", "golden/01.png", "golden/expected.npy"]
    assert sorted(members) == sorted([*golden, "README.txt", "labels.txt", "manifest.json", "model.onnx", "preprocess.py", "run.py"])
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in members.items()
        if name != "manifest.json"
    }
    assert members["model.onnx"] == (build / "model.fp32.onnx").read_bytes()
    assert members["labels.txt"].decode().splitlines() == list(LABELS)
    assert manifest["preprocessing"] == json.loads(CONTRACT.to_json())
    assert manifest["input"] == {"name": "pixels", "shape": ["batch", 3, 8, 8]}
    assert manifest["output"] == {"name": "logits", "shape": ["batch", 4]}
    assert (manifest["runtime"], manifest["provider"], manifest["precision"]) == ("onnxruntime", "CPUExecutionProvider", "fp32")
    assert manifest["measured"]["iterations_per_s"] == 100.0 and "samples_ms" not in manifest["measured"]
    assert manifest["measured"]["conditions"]["cpu"] == "made up"
    assert manifest["isa"]["packaged_on"] == sorted(isa_flags())
    assert "synthetic" in manifest["golden"]["source"] and "no_such_data" in manifest["golden"]["source"]
    assert manifest["pip"] in members["README.txt"].decode()
    wanted = importlib.metadata.metadata(manifest["runtime"])["Requires-Python"]
    assert f"Install (Python {wanted}):" in members["README.txt"].decode() and manifest["python"] == wanted


def test_golden_logits_are_the_float64_references(build: Path, profile: Path, tmp_path: Path) -> None:
    bundle = make(build, profile, tmp_path / "out.zip")
    with zipfile.ZipFile(bundle.path) as archive:
        expected = np.load(io.BytesIO(archive.read("golden/expected.npy")), allow_pickle=False)
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in bundle.manifest.golden.images]
        reference = logits(CONTRACT(pictures))
    np.testing.assert_allclose(expected, reference, atol=1e-5)
    assert bundle.manifest.golden.max_abs_err == pytest.approx(2**-13 * np.abs(reference).max(), rel=1e-4)


def test_the_same_inputs_give_the_same_bytes(build: Path, profile: Path, tmp_path: Path) -> None:
    first, second = make(build, profile, tmp_path / "a.zip"), make(build, profile, tmp_path / "b.zip")
    assert first.path.read_bytes() == second.path.read_bytes()


def test_golden_pictures_are_train_images_where_there_are_any(build: Path, profile: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = {}
    for split in ("train", "test"):
        for label in LABELS:
            folder = tmp_path / "own" / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                image = (
                    rng.integers(0, 256, (600, 300, 3), dtype=np.uint8) if index == 0 else rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                )
                Image.fromarray(image).save(folder / f"{index}.png")
                colours[image.tobytes()] = split
    bundle = make(build, profile, tmp_path / "out.zip", data_option=str(tmp_path / "own"))
    assert bundle.manifest.golden.source.startswith("train images of ")
    with zipfile.ZipFile(bundle.path) as archive:
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in bundle.manifest.golden.images]
    assert max(max(picture.shape) for picture in pictures) <= 256
    small = [picture.tobytes() for picture in pictures if picture.shape == (9, 9, 3)]
    assert small and {colours[picture] for picture in small} == {"train"}


def test_data_that_was_named_and_is_not_there_is_an_error(build: Path, profile: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        make(build, profile, tmp_path / "out.zip", data_option=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out.zip").exists()


def second_artifact(build: Path, **changes: Any) -> Artifact:
    """Another model in the build folder: the same network, other bytes."""
    import onnx

    model = onnx.load(build / "model.fp32.onnx")
    model.doc_string = "another file"
    onnx.save(model, build / "model.other.onnx")
    artifact = artifact_of(build, build / "model.other.onnx", **changes)
    manifest = Manifest.load(build)
    manifest.artifacts[artifact.name] = artifact
    manifest.save()
    return artifact


def test_a_named_artifact_is_shipped_though_it_misses_the_limit_and_says_so(build: Path, profile: Path, tmp_path: Path) -> None:
    other = second_artifact(build)
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    write_report(
        build, [row(fp32.name, fp32.sha256), row(other.name, other.sha256, iterations_per_s=300.0, top1=80.0, top1_drop={"points": 10.0})]
    )
    assert make(build, profile, tmp_path / "a.zip").manifest.artifact.name == "model.fp32.onnx"
    named = make(build, profile, tmp_path / "b.zip", artifact_name=other.name).manifest
    assert named.artifact.name == other.name
    assert any("top-1 drop 10.00 > 0.50 points" in remark for remark in named.remarks)


def test_a_named_artifact_that_was_never_measured_says_so(tmp_path: Path, profile: Path) -> None:
    manifest = make(make_build(tmp_path / "tiny", rows=[]), profile, tmp_path / "a.zip", artifact_name="model.fp32.onnx").manifest
    assert manifest.measured is None and manifest.runtime == "onnxruntime"
    assert any("vitedge bench --device board" in remark for remark in manifest.remarks)


def test_no_top1_unstable_and_emulated_are_said_plainly(build: Path, profile: Path, tmp_path: Path) -> None:
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    write_report(build, [row(fp32.name, fp32.sha256, top1=None, top1_reason="no data", unstable="spread 30 %", emulated=True)])
    remarks = " / ".join(make(build, profile, tmp_path / "a.zip").manifest.remarks)
    assert "top-1 was not measured (no data)" in remarks and "spread 30 %" in remarks and "emulated" in remarks


def test_an_interval_that_reaches_beyond_the_limit_is_said_plainly(build: Path, profile: Path, tmp_path: Path) -> None:
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    write_report(build, [row(fp32.name, fp32.sha256, top1_drop={"points": 0.4, "low": -0.1, "high": 0.9})])
    assert make(build, profile, tmp_path / "a.zip").manifest.remarks == (
        "on these images the drop may be up to 0.90 points (95 %), beyond the limit of 0.50",
    )


def test_a_figure_of_other_precision_than_the_session_is_refused(build: Path, profile: Path, tmp_path: Path) -> None:
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    write_report(build, [row(fp32.name, fp32.sha256, precision="int8", top1_drop={"points": 0.0})])
    with pytest.raises(InputError, match="expected int8, as measured, found fp32 here"):
        make(build, profile, tmp_path / "a.zip")


def test_labels_must_fit_the_outputs(build: Path, profile: Path, tmp_path: Path) -> None:
    other = second_artifact(build, labels=("only", "two"))
    with pytest.raises(InputError, match="4 class names"):
        make(build, profile, tmp_path / "a.zip", artifact_name=other.name)
    other = second_artifact(build, labels=("a", "b\nc", "d", "e"))
    with pytest.raises(InputError, match="line break"):
        make(build, profile, tmp_path / "a.zip", artifact_name=other.name)


def test_without_labels_classes_are_numbered(build: Path, profile: Path, tmp_path: Path) -> None:
    other = second_artifact(build, labels=())
    bundle = make(build, profile, tmp_path / "a.zip", artifact_name=other.name)
    with zipfile.ZipFile(bundle.path) as archive:
        assert archive.read("labels.txt") == b"0\n1\n2\n3\n"


def test_a_contract_that_differs_from_the_files_is_refused(build: Path, profile: Path, tmp_path: Path) -> None:
    other = second_artifact(build, preprocessing=Preprocessing(size=8, interpolation="nearest").to_json())
    with pytest.raises(InputError, match="interpolation: nearest, bicubic"):
        make(build, profile, tmp_path / "a.zip", artifact_name=other.name)


def test_a_runtime_or_isa_of_the_profile_reaches_the_manifest(build: Path, tmp_path: Path) -> None:
    if not isa_flags():
        pytest.skip("this processor lists no known instruction set")
    profile = write_profile(tmp_path / "board.yaml", isa=[isa_flags()[0]], threads=2)
    bundle = make(build, profile, tmp_path / "a.zip")
    assert bundle.manifest.isa.needed == ((isa_flags()[0],),)
    assert bundle.manifest.threads.asked == 2
    assert any(isa_flags()[0] in check.detail for check in verify(bundle.path).checks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_runs_in_the_precision_that_was_measured(precision: str, build: Path, profile: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    if precision == "bf16" and not {"avx512_bf16", "amx_bf16"} & set(isa_flags()):
        pytest.skip("this processor has no bf16")
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    ran = {"runtime": "openvino", "provider": "CPU", "precision": precision, "float_precision": precision, "top1_drop": {"points": 0.0}}
    write_report(build, [row(fp32.name, fp32.sha256, **ran)])
    bundle = make(build, profile, tmp_path / "a.zip")
    assert (bundle.manifest.runtime, bundle.manifest.precision, bundle.manifest.float_precision) == ("openvino", precision, precision)
    assert bundle.manifest.pip.startswith("pip install numpy Pillow openvino==")
    assert [check.name for check in verify(bundle.path).checks] == ["archive", "hashes", "contents", "processor", "golden"]
    with zipfile.ZipFile(bundle.path) as archive:
        expected = np.load(io.BytesIO(archive.read("golden/expected.npy")), allow_pickle=False)
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in bundle.manifest.golden.images]
        reference = logits(CONTRACT(pictures))
    error = np.abs(expected - reference).max()
    # bf16 keeps 8 bits: an fp32 result would be far closer to the reference than that.
    assert error < 1e-5 if precision == "fp32" else 1e-4 < error < 0.1


@pytest.mark.parametrize(("runtime", "provider"), [("onnxruntime", "CPUExecutionProvider"), ("openvino", "CPU")])
def test_an_engine_in_a_bundle_reports_nothing(runtime: str, provider: str, build: Path, profile: Path, tmp_path: Path) -> None:
    """Imported plainly, both report themselves over the network and leave an identifier in the home folder."""
    pytest.importorskip(runtime)
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    write_report(build, [row(fp32.name, fp32.sha256, runtime=runtime, provider=provider, top1_drop={"points": 0.0})])
    bundle = make(build, profile, tmp_path / "a.zip")
    with zipfile.ZipFile(bundle.path) as archive:
        archive.extractall(tmp_path / "own")
    environment = watched(tmp_path / "home")
    command = [sys.executable, str(tmp_path / "own" / "run.py"), "--selftest"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert f"in {runtime} fp32" in done.stdout, done.stderr
    assert list((tmp_path / "home").iterdir()) == []


def test_openvino_ir_travels_as_two_files(build: Path, profile: Path, tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    model = ov.convert_model(build / "model.fp32.onnx")
    model.set_rt_info(CONTRACT.to_json(), ["vitedge", "preprocessing"])
    model.set_rt_info(json.dumps(list(LABELS)), ["vitedge", "labels"])
    (build / "openvino.fp32").mkdir()
    ov.save_model(model, build / "openvino.fp32" / "model.xml", compress_to_fp16=False)
    opened = open_artifact(build / "openvino.fp32" / "model.xml")
    artifact = artifact_of(build, opened.path, name="openvino.fp32", format="openvino", files=opened.files, sha256=opened.sha256)
    source, sink = read_ports(artifact)
    assert (source.name, source.shape, sink.name, sink.shape) == ("pixels", ("batch", 3, 8, 8), "logits", ("batch", 4))
    manifest = Manifest.load(build)
    manifest.artifacts[artifact.name] = artifact
    manifest.save()
    bundle = make(build, profile, tmp_path / "a.zip", artifact_name="openvino.fp32")
    assert {"model.xml", "model.bin"} < set(bundle.manifest.files)
    assert verify(bundle.path).checks[-1].name == "golden"


def test_an_absent_provider_is_unavailable(build: Path, profile: Path, tmp_path: Path) -> None:
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    write_report(build, [row(fp32.name, fp32.sha256, provider="AbacusExecutionProvider")])
    with pytest.raises(UnavailableError):
        make(build, profile, tmp_path / "a.zip")
    assert not list(tmp_path.glob("*.zip"))


def test_a_changed_artifact_is_refused(build: Path, profile: Path, tmp_path: Path) -> None:
    with (build / "model.fp32.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(InputError, match="other contents"):
        make(build, profile, tmp_path / "a.zip")


def test_external_data_is_refused(build: Path, profile: Path, tmp_path: Path) -> None:
    (build / "weights.data").write_bytes(b"1")
    path = build / "model.fp32.onnx"
    manifest = Manifest.load(build)
    from vitedge.artifact import hash_files

    files = (path, build / "weights.data")
    manifest.artifacts = {"model.fp32.onnx": artifact_of(build, path, files=files, sha256=hash_files(files))}
    manifest.save()
    with pytest.raises(InputError, match="external data"):
        make(build, profile, tmp_path / "a.zip", artifact_name="model.fp32.onnx")


def test_a_full_disk_leaves_nothing(build: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from vitedge.package import bundle as module

    def full(path: Path, *rest: object) -> None:
        path.write_bytes(b"half a zip")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_zip", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="free some space"):
        make(build, profile, tmp_path / "a.zip")
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before


def test_a_file_that_a_technique_quantized_is_shipped_unmeasured_too(tmp_path: Path, profile: Path) -> None:
    root = make_build(tmp_path / "tiny", rows=[])
    manifest = Manifest.load(root)
    manifest.artifacts["model.fp32.onnx"] = replace(manifest.artifacts["model.fp32.onnx"], notes={"library": "vitedge"})
    manifest.save()
    assert make(root, profile, tmp_path / "a.zip", artifact_name="model.fp32.onnx").manifest.runtime == "onnxruntime"


def test_what_auto_chose_is_what_is_shipped(build: Path, tmp_path: Path) -> None:
    fp32 = Manifest.load(build).artifacts["model.fp32.onnx"]
    board = write_profile(tmp_path / "board.yaml", runtimes=[{"runtime": "openvino", "provider": "AUTO", "precisions": ["fp32"]}])
    write_report(build, [row(fp32.name, fp32.sha256, runtime="openvino", provider="AUTO:CPU")])
    bundle = make(build, board, tmp_path / "a.zip")
    assert bundle.manifest.provider == "CPU" and bundle.manifest.providers == ()
    assert verify(bundle.path).checks[-1].name == "golden"


def test_the_bundle_runs_with_the_options_that_were_measured(build: Path, profile: Path, tmp_path: Path) -> None:
    made = make(build, profile, tmp_path / "a.zip").manifest
    assert made.providers == (("CPUExecutionProvider", {}),)
    # TF32 would answer otherwise than the golden pictures; TensorRT without its option runs fp32.
    chain = dict(providers(Target("TensorrtExecutionProvider", "fp16"), "fp32"))
    assert list(chain) == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert chain["TensorrtExecutionProvider"] == {"trt_fp16_enable": "1"} and chain["CUDAExecutionProvider"] == {"use_tf32": "0"}
