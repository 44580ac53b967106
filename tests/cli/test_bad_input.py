"""Bad input: one line that says what was expected, found and to do, the right exit code, no traceback, nothing left behind.

Cases of single commands (data, bundles, runtimes) are tested beside their rooms too; these go through the command line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save_file

from tests.recipes_for_tests import write_recipe
from tests.tiny import write_tiny_onnx
from vitedge.cli.main import run
from vitedge.device import load_device


def _recipe(folder: Path, text: str) -> list[str]:
    (folder / "r.yaml").write_text(text)
    return ["export", "--recipe", str(folder / "r.yaml"), "-o", str(folder / "out")]


def _with(folder: Path, colours: Path, **changes: object) -> list[str]:
    return ["export", "--recipe", str(write_recipe(folder, colours, **changes)), "-o", str(folder / "out")]


def misspelt_key(folder: Path, colours: Path) -> list[str]:
    return _recipe(folder, "modell: {}\n")


def wrong_type(folder: Path, colours: Path) -> list[str]:
    return _recipe(folder, "model: {img_size: large}\n")


def broken_yaml(folder: Path, colours: Path) -> list[str]:
    return _recipe(folder, "model: {img_size: 32\n")


def unknown_recipe(folder: Path, colours: Path) -> list[str]:
    return ["export", "--recipe", "deit_tinny_int8", "-o", str(folder / "out")]


def unknown_model(folder: Path, colours: Path) -> list[str]:
    return _with(folder, colours, model={"arch": "deit_tiny", "img_size": 16, "weights": "none"})


def patches_for_a_convnet(folder: Path, colours: Path) -> list[str]:
    return _with(folder, colours, model={"arch": "resnet18", "img_size": 16, "patch_size": 4, "weights": "none"})


def small_stem_for_a_vit(folder: Path, colours: Path) -> list[str]:
    return _with(folder, colours, model={"arch": "test_vit", "img_size": 16, "patch_size": 8, "stem": "small", "weights": "none"})


def views_beside_mixup(folder: Path, colours: Path) -> list[str]:
    return _with(folder, colours, steps=[{"train": {"steps": 1, "views": 2, "mixup": 0.8}}])


def teacher_that_is_not_there(folder: Path, colours: Path) -> list[str]:
    return _with(folder, colours, steps=[{"distill": {"teacher": "teacher_resnet14_32"}}, {"train": {"steps": 1}}])


def technique_that_is_unknown(folder: Path, colours: Path) -> list[str]:
    return _with(folder, colours, steps=[{"distil": {"teacher": "teacher_resnet14_32"}}, {"train": {"steps": 1}}])


def unknown_scheme(folder: Path, colours: Path) -> list[str]:
    return _with(folder, colours, quantize={"schemes": ["onnxruntime.int3"]})


def unknown_device(folder: Path, colours: Path) -> list[str]:
    return [*_with(folder, colours), "--device", "cpuu"]


def _device(folder: Path, **changes: object) -> str:
    facts = {"runtimes": [{"runtime": "onnxruntime", "provider": "CPUExecutionProvider"}], **changes}
    (folder / "board.yaml").write_text(yaml.safe_dump({**facts, "source": dict.fromkeys(facts, "a test")}))
    return str(folder / "board.yaml")


def device_with_an_unknown_runtime(folder: Path, colours: Path) -> list[str]:
    return [*_with(folder, colours), "--device", _device(folder, runtimes=[{"runtime": "tflite", "provider": "CPU"}])]


def device_fact_without_source(folder: Path, colours: Path) -> list[str]:
    (folder / "board.yaml").write_text("runtimes: [{runtime: onnxruntime, provider: CPUExecutionProvider}]\nsource: {}\n")
    return [*_with(folder, colours), "--device", str(folder / "board.yaml")]


def gpu_that_is_not_there_to_be_timed(folder: Path, colours: Path) -> list[str]:
    return [*_with(folder, colours, steps=[{"prune": {"target": {"latency_ms": 3.0}}}]), "--device", "cuda"]


def weights_that_are_not_there(folder: Path, colours: Path) -> list[str]:
    return [*_with(folder, colours), "--weights", str(folder / "absent.safetensors")]


def weights_of_another_model(folder: Path, colours: Path) -> list[str]:
    save_file({"conv1.weight": np.zeros((2, 2), np.float32)}, folder / "resnet.safetensors")
    return [*_with(folder, colours), "--weights", str(folder / "resnet.safetensors")]


def weights_that_are_no_weights(folder: Path, colours: Path) -> list[str]:
    (folder / "w.safetensors").write_bytes(b"\x00" * 40)
    return [*_with(folder, colours), "--weights", str(folder / "w.safetensors")]


def data_that_is_not_there(folder: Path, colours: Path) -> list[str]:
    return [*_with(folder, colours), "--data", str(folder / "absent.tar")]


def truncated_archive(folder: Path, colours: Path) -> list[str]:
    with tarfile.open(folder / "whole.tar", "w") as archive:
        archive.add(colours, "colours")
    content = (folder / "whole.tar").read_bytes()
    (folder / "cut.tar").write_bytes(content[: len(content) // 2])
    (folder / "whole.tar").unlink()
    return [*_with(folder, colours), "--data", str(folder / "cut.tar")]


def corrupt_image(folder: Path, colours: Path) -> list[str]:
    shutil.copytree(colours, folder / "photos")
    next((folder / "photos" / "train" / "red").iterdir()).write_bytes(b"\x89PNG not really")
    return [*_with(folder, colours), "--data", str(folder / "photos")]


def empty_class_folder(folder: Path, colours: Path) -> list[str]:
    shutil.copytree(colours, folder / "photos")
    (folder / "photos" / "train" / "yellow").mkdir()
    return [*_with(folder, colours), "--data", str(folder / "photos")]


def class_only_in_test(folder: Path, colours: Path) -> list[str]:
    shutil.copytree(colours, folder / "photos")
    (folder / "photos" / "test" / "yellow").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "photos" / "test" / "yellow" / "1.png")
    return [*_with(folder, colours), "--data", str(folder / "photos")]


def unknown_data_set(folder: Path, colours: Path) -> list[str]:
    return ["data", "info", "cifar11"]


def output_is_a_file(folder: Path, colours: Path) -> list[str]:
    (folder / "out").write_text("mine")
    return _with(folder, colours)


def output_below_a_file(folder: Path, colours: Path) -> list[str]:
    (folder / "file").write_text("mine")
    return [*_with(folder, colours)[:-1], str(folder / "file" / "out")]


def damaged_manifest(folder: Path, colours: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "manifest.json").write_text('{"schema_version": 1')
    return _with(folder, colours)


def nothing_built(folder: Path, colours: Path) -> list[str]:
    return ["bench", "--build", str(folder / "build")]


def bench_of_what_is_not_there(folder: Path, colours: Path) -> list[str]:
    return ["bench", str(folder / "absent.onnx")]


def not_onnx(folder: Path, colours: Path) -> list[str]:
    (folder / "m.onnx").write_bytes(b"this is a text file, not a protobuf")
    return ["bench", str(folder / "m.onnx"), "--no-top1"]


def empty_onnx(folder: Path, colours: Path) -> list[str]:
    (folder / "m.onnx").write_bytes(b"")
    return ["bench", str(folder / "m.onnx"), "--no-top1"]


def truncated_onnx(folder: Path, colours: Path) -> list[str]:
    content = write_tiny_onnx(folder / "m.onnx").read_bytes()
    (folder / "m.onnx").write_bytes(content[: len(content) // 2])
    return ["bench", str(folder / "m.onnx"), "--no-top1"]


def onnx_of_wrong_rank(folder: Path, colours: Path) -> list[str]:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 7]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "m.onnx")
    return ["bench", str(folder / "m.onnx"), "--no-top1"]


def onnx_without_its_external_data(folder: Path, colours: Path) -> list[str]:
    model = onnx.load(write_tiny_onnx(folder / "small.onnx"))
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]), model.graph.initializer[0].name)
    )
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (folder / "m.data").unlink()
    (folder / "small.onnx").unlink()
    return ["bench", str(folder / "m.onnx"), "--no-top1"]


def openvino_without_its_weights(folder: Path, colours: Path) -> list[str]:
    (folder / "m.xml").write_text('<?xml version="1.0"?><net name="m" version="11"><layers/></net>')
    return ["bench", str(folder / "m.xml"), "--no-top1"]


def quantize_onto_its_input(folder: Path, colours: Path) -> list[str]:
    write_tiny_onnx(folder / "m.onnx")
    return ["quantize", str(folder / "m.onnx"), "-o", str(folder / "m.onnx")]


def package_of_no_build(folder: Path, colours: Path) -> list[str]:
    return ["package", str(folder / "nowhere"), "--device", "cpu", "-o", str(folder / "b.zip")]


def verify_of_no_zip(folder: Path, colours: Path) -> list[str]:
    (folder / "b.zip").write_bytes(b"PK but not really")
    return ["verify", str(folder / "b.zip")]


def verify_of_nothing(folder: Path, colours: Path) -> list[str]:
    return ["verify", str(folder / "absent.zip")]


def unknown_command(folder: Path, colours: Path) -> list[str]:
    return ["benhc"]


def unknown_option(folder: Path, colours: Path) -> list[str]:
    return ["bench", "--secconds", "3"]


def option_out_of_range(folder: Path, colours: Path) -> list[str]:
    return ["bench", "--rounds", "0"]


CASES: dict[Callable[[Path, Path], list[str]], tuple[int, str]] = {
    misspelt_key: (2, "did you mean 'model'?"),
    wrong_type: (2, "model.img_size"),
    broken_yaml: (2, "valid YAML"),
    unknown_recipe: (2, "did you mean 'deit_tiny_int8'?"),
    unknown_model: (2, "a name timm knows"),
    patches_for_a_convnet: (2, "a model that takes patch_size"),
    small_stem_for_a_vit: (2, "a ResNet whose stem is one convolution"),
    views_beside_mixup: (2, "views: 0 beside mixup or cutmix"),
    teacher_that_is_not_there: (2, "run: vitedge train --recipe teacher_resnet14_32"),
    technique_that_is_unknown: (2, "did you mean 'distill'?"),
    unknown_scheme: (2, "onnxruntime.int8_static"),
    unknown_device: (2, "did you mean 'cpu'?"),
    device_with_an_unknown_runtime: (2, "a runtime out of"),
    device_fact_without_source: (2, "source"),
    gpu_that_is_not_there_to_be_timed: (4, "cuda"),
    weights_that_are_not_there: (2, "no file"),
    weights_of_another_model: (1, "conv1.weight"),
    weights_that_are_no_weights: (1, "a safetensors file"),
    data_that_is_not_there: (2, "absent.tar"),
    truncated_archive: (1, "cut.tar"),
    corrupt_image: (1, "red"),
    empty_class_folder: (1, "yellow"),
    class_only_in_test: (1, "yellow"),
    unknown_data_set: (2, "did you mean 'cifar10"),
    output_is_a_file: (2, "a folder to build in"),
    output_below_a_file: (1, "a place that can be written"),
    damaged_manifest: (1, "a JSON file"),
    nothing_built: (2, "vitedge export --recipe deit_tiny_int8"),
    bench_of_what_is_not_there: (2, "absent.onnx"),
    not_onnx: (1, "an ONNX model"),
    empty_onnx: (1, "an ONNX model"),
    truncated_onnx: (1, "an ONNX model"),
    onnx_of_wrong_rank: (1, "rank"),
    onnx_without_its_external_data: (1, "m.data"),
    openvino_without_its_weights: (1, "m."),
    quantize_onto_its_input: (2, "-o"),
    package_of_no_build: (2, "nowhere"),
    verify_of_no_zip: (1, "b.zip"),
    verify_of_nothing: (2, "absent.zip"),
    unknown_command: (2, "did you mean 'bench'?"),
    unknown_option: (2, "--seconds"),
    option_out_of_range: (2, "--rounds"),
}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_one_line(
    case: Callable[[Path, Path], list[str]],
    tmp_path: Path,
    colours: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    args = case(tmp_path, colours)
    if "cuda" in args:
        import torch

        assert load_device("cuda").accelerator == "cuda"
        if torch.cuda.is_available():
            pytest.skip("this host has a GPU")
    before = _files(tmp_path)
    code = run(args)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    expected_code, part = CASES[case]
    assert (code, len(errors)) == (expected_code, 1), captured.err
    assert part in errors[0]
    assert "Traceback" not in captured.err and captured.out == ""
    after = {name: content for name, content in _files(tmp_path).items() if not name.startswith("out/recipe.yaml")}
    assert after == before


def test_json_errors_are_json_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import json

    assert run(["bench", str(tmp_path / "absent.onnx"), "--json"]) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["exit_code"] == 2 and error["message"] in captured.err


@pytest.mark.parametrize(("options", "expected"), [("size=200k", "free some space"), ("size=4m,ro", "another output folder")])
def test_a_full_or_read_only_disk(tmp_path: Path, colours: Path, options: str, expected: str) -> None:
    """A real file system of 200 KB, or one mounted read-only, in a mount name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    recipe = write_recipe(tmp_path, colours, quantize={}, steps=[{"train": {"steps": 1, "precision": "fp32"}}])
    command = f"{sys.executable} -m vitedge export --recipe {recipe} -o {disk}/out"
    script = f"mount -t tmpfs -o {options} none {disk} && {command}; code=$?; find {disk} -type f; exit $code"
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"this host gives no mount name space: {probe.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120, env={**os.environ, "CI": "1"}
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert expected in errors[0] and "Traceback" not in done.stderr
    left = [Path(line).name for line in done.stdout.splitlines()]
    assert not [name for name in left if name.endswith((".part", ".safetensors", ".onnx"))], left
