from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests import tiny
from vitedge.cli.main import run
from vitedge.model_file import open_artifact, write_contract

DYNAMIC, STATIC, OPENVINO = "onnxruntime.int8_dynamic", "onnxruntime.int8_static", "openvino.int8_static"
PACKED = ("onnxruntime.int8_weights", "onnxruntime.int4_weights")
PACKED_OPENVINO = ("openvino.int8_weights", "openvino.int4_weights")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model with a contract and no labels, so that any data set fits."""
    proto = tiny.tiny_model(preprocessing=False)
    write_contract(proto, tiny.CONTRACT, ())
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """The last command ended in one line that says these words."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    for word in words:
        assert word in lines[0]


def test_builds_all_schemes_and_reports_them(model: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["quantize", str(model), "--data", str(colours), "--images", "16", "-o", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema_version"] == 1 and result["not_built"] == [] and result["device"] == "cpu"
    assert [row["scheme"] for row in result["artifacts"]] == [DYNAMIC, STATIC, *PACKED, OPENVINO, *PACKED_OPENVINO]
    for row in result["artifacts"]:
        made = open_artifact(row["path"])
        assert made.sha256 == row["sha256"] and made.size_bytes == row["size_bytes"] and made.contract() == tiny.CONTRACT
        assert sum(row["node_counts"].get(kind, 0) for kind in ("int8", "int8_weights", "int4_weights")) == 4
        assert row["size_ratio"] == result["source"]["size_bytes"] / row["size_bytes"]
        # Twelve of the 120 train images are the validation part; calibration saw none of them.
        assert row["agreement_images"] == 12 and row["top1_agreement"] >= 75 and row["sqnr_db"] > 10
        assert (row["calibration"] or {}).get("images") == (16 if row["scheme"] in (STATIC, OPENVINO) else None)
    files = [f"model.{name.partition('.')[2]}.onnx" for name in (DYNAMIC, STATIC, *PACKED)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, OPENVINO, *PACKED_OPENVINO])


def test_prints_a_table_for_people(model: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(model), "--scheme", STATIC, "--method", "minmax", "--data", str(colours), "-o", str(tmp_path / "out")]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert STATIC in out and "integer nodes" in out and "12 held-out train images" in out
    assert run(arguments) == 2
    fails(capsys, "model.int8_static.onnx", "--overwrite")
    assert run([*arguments, "--overwrite", "--exclude", "/mlp/*"]) == 0


def test_seed_and_images_choose_the_calibration_set(model: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shas = []
    for index, (seed, images) in enumerate((("0", "8"), ("0", "8"), ("1", "8"), ("0", "40"))):
        out = str(tmp_path / str(index))
        options = ["--scheme", STATIC, "--seed", seed, "--images", images, "--data", str(colours)]
        assert run(["quantize", str(model), *options, "-o", out, "--json"]) == 0
        shas.append(json.loads(capsys.readouterr().out)["artifacts"][0]["sha256"])
    assert shas[0] == shas[1] and len(set(shas)) == 3


def test_without_data_builds_what_needs_none_and_says_the_rest(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(model), "-o", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [row["scheme"] for row in result["artifacts"]] == [DYNAMIC, *PACKED, *PACKED_OPENVINO]
    assert result["artifacts"][0]["top1_agreement"] is None and "--data" in result["artifacts"][0]["agreement_reason"]
    assert [entry["scheme"] for entry in result["not_built"]] == [STATIC, OPENVINO]
    assert all("--data" in entry["reason"] for entry in result["not_built"])
    assert captured.err.count("not built: ") == 2
    # Asked for by name, it is an error.
    assert run(["quantize", str(model), "--scheme", STATIC, "-o", str(tmp_path / "other")]) == 2
    fails(capsys, "--data")
    assert not (tmp_path / "other").exists()


def test_a_foreign_file_takes_its_contract_from_a_recipe(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tiny.write_tiny_onnx(tmp_path / "foreign.onnx", preprocessing=False)
    options = ["quantize", str(foreign), "--scheme", STATIC, "-o", str(tmp_path / "out")]
    assert run([*options, "--data", str(colours)]) == 2
    fails(capsys, "preprocessing contract", "--recipe")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: {{img_size: 8, patch_size: 4}}\ndata: {{name: '{colours}'}}\npreprocess: {{interpolation: box}}\n", encoding="utf-8"
    )
    assert run([*options, "--recipe", str(recipe)]) == 0
    made = open_artifact(tmp_path / "out" / "model.int8_static.onnx").contract()
    assert made is not None and (made.size, made.interpolation) == (8, "box")


def test_a_recipe_that_contradicts_the_file_is_refused(
    model: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {{img_size: 8, patch_size: 4}}\ndata: {{name: '{colours}'}}\n", encoding="utf-8")
    assert run(["quantize", str(model), "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 1
    fails(capsys, "recipe mine", "mean: (0.5, 0.5, 0.5)")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--scheme", "onnxruntime.int8"], 2, ["did you mean 'onnxruntime.int8_"]),
        (["--scheme", DYNAMIC, "--method", "minmax"], 2, ["--method", DYNAMIC]),
        (["--scheme", DYNAMIC, "--smooth-quant-alpha", "0.5"], 2, ["--smooth-quant-alpha"]),
        (["--scheme", DYNAMIC, "--exclude", "/mpl/*"], 2, ["exclude '/mpl/*'"]),
        (["--scheme", DYNAMIC, "--data", "no/such/folder"], 2, ["no/such/folder"]),
        (["--scheme", DYNAMIC, "--device", "cpuu"], 2, ["did you mean 'cpu'"]),
        (["--images", "0"], 2, ["--images"]),
        (["--smooth-quant-alpha", "2"], 2, ["--smooth-quant-alpha"]),
    ],
)
def test_wrong_options(
    arguments: list[str], code: int, words: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(model), *arguments, "-o", str(tmp_path / "out")]) == code
    fails(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_wrong_outputs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    assert run(["quantize", str(model), "--scheme", DYNAMIC, "-o", str(model), "--overwrite"]) == 2
    fails(capsys, "another place than the input")
    named_so = tmp_path / "model.int8_dynamic.onnx"
    named_so.write_bytes(before)
    assert run(["quantize", str(named_so), "--scheme", DYNAMIC, "-o", str(tmp_path), "--overwrite"]) == 2
    fails(capsys, "another place than the input")
    assert named_so.read_bytes() == before
    other = tmp_path / "file"
    other.write_text("mine", encoding="utf-8")
    assert run(["quantize", str(model), "--scheme", DYNAMIC, "-o", str(other), "--overwrite"]) == 2
    fails(capsys, "a file of that name")
    assert other.read_text(encoding="utf-8") == "mine"
    assert run(["quantize", str(model), "--scheme", DYNAMIC, "-o", str(other / "below")]) == 1
    fails(capsys, "a place that can be written")


def test_wrong_files(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    text = tmp_path / "text.onnx"
    text.write_text("not a model", encoding="utf-8")
    assert run(["quantize", str(text), "-o", out]) == 1
    fails(capsys, "text.onnx")
    assert run(["quantize", str(tmp_path / "absent.onnx"), "-o", out]) == 2
    fails(capsys, "no such file")
    labelled = tiny.write_tiny_onnx(tmp_path / "labelled.onnx")
    assert run(["quantize", str(labelled), "--data", str(colours), "-o", out]) == 1
    fails(capsys, "4 classes of labelled.onnx", "3 classes")
    assert run(["quantize", str(labelled), "--scheme", DYNAMIC, "-o", str(tmp_path / "int8")]) == 0
    capsys.readouterr()
    assert run(["quantize", str(tmp_path / "int8" / "model.int8_dynamic.onnx"), "-o", out]) == 1
    fails(capsys, "an ONNX file in fp32", "int8_dynamic")
    assert not Path(out).exists()


def test_missing_extra(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import vitedge.host

    real = vitedge.host.tool_versions
    monkeypatch.setattr(vitedge.host, "tool_versions", lambda names: {k: v for k, v in real(names).items() if k != "nncf"})
    assert run(["quantize", str(model), "--scheme", OPENVINO, "-o", str(tmp_path / "out")]) == 4
    fails(capsys, "pip install 'vitedge[openvino]'")
    assert run(["quantize", str(model), "-o", str(tmp_path / "out")]) == 0
    assert "pip install 'vitedge[openvino]'" in capsys.readouterr().err
