"""Opening model files: what is read from good ones, and the one line that each kind of bad one gets."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from vitedge.artifact import hash_files
from vitedge.errors import InputError, UsageError, VitedgeError
from vitedge.host import tool_versions
from vitedge.model_file import input_spec, open_artifact, write_contract
from vitedge.model_file.onnx_wire import batch_symbol
from vitedge.preprocess import LABELS_KEY, METADATA_KEY, Preprocessing
from vitedge.runtimes._openvino_import import import_quietly

IR = """<?xml version="1.0"?>
<net name="net" version="11">
  <layers>
    <layer id="0" name="pixels" type="Parameter" version="opset1"><data shape="{shape}" element_type="{dtype}"/>
      <output><port id="0"><dim>-1</dim></port></output></layer>
    <layer id="1" name="w" type="Const" version="opset1"><data element_type="{weights}" shape="4, 16" offset="0" size="{size}"/></layer>
    {extra}
    <layer id="9" name="logits" type="Result" version="opset1"><input><port id="0"><dim>-1</dim><dim>4</dim></port></input></layer>
  </layers>
  <edges/>
  <rt_info>{info}</rt_info>
</net>
"""


def _ir(folder: Path, bin_bytes: int | None = 256, name: str = "model.xml", **fields: str) -> Path:
    values = {"shape": "?,3,8,8", "dtype": "f32", "weights": "f32", "size": "256", "extra": "", "info": "", **fields}
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(IR.format(**values))
    if bin_bytes is not None:
        path.with_suffix(".bin").write_bytes(bytes(bin_bytes))
    return path


def _safetensors(path: Path, metadata: dict[str, str] | None, body: bytes = bytes(16)) -> Path:
    header: dict[str, object] = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def _checkpoint_header() -> dict[str, str]:
    meta = {
        "arch": "test_vit",
        "img_size": 8,
        "patch_size": 4,
        "num_classes": 4,
        "preprocessing": tiny.CONTRACT.to_json(),
        "labels": ["a", "b"],
    }
    return {"vitedge": json.dumps(meta)}


def _model(**changes: object) -> onnx.ModelProto:
    """A one-node model whose ends can be changed."""
    values = {"dtype": TensorProto.FLOAT, "shape": ["batch", 3, 8, 8], "out": ["batch", 4], "nodes": [], "weights": [], **changes}
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["pixels"], ["logits"]), *values["nodes"]],
        "g",
        [helper.make_tensor_value_info("pixels", values["dtype"], values["shape"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, values["out"])],
        values["weights"],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def _with_external(folder: Path, location: str, offset: int = 0, length: int = 64) -> Path:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    return _save(folder / "m.onnx", _model(weights=[weight]))


# --- good files -------------------------------------------------------------------------------


def test_an_onnx_file_tells_its_contract_labels_and_size(tmp_path: Path) -> None:
    path = tiny.write_tiny_onnx(tmp_path / "a.onnx")
    artifact = open_artifact(path)
    assert (artifact.name, artifact.format, artifact.scheme) == ("a.onnx", "onnx", "fp32")
    assert artifact.contract() == tiny.CONTRACT
    assert artifact.labels == tiny.LABELS
    assert artifact.size_bytes == path.stat().st_size
    assert artifact.sha256 == hash_files([path])
    assert artifact.notes["opset"] == tiny.OPSET
    assert input_spec(artifact).shape == (None, 3, 8, 8)


def test_a_foreign_file_has_no_contract(tmp_path: Path) -> None:
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "a.onnx", preprocessing=False))
    assert artifact.preprocessing is None
    assert artifact.labels == ()


def test_external_weights_are_counted_and_hashed(tmp_path: Path) -> None:
    onnx.save(
        tiny.tiny_model(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0, convert_attribute=False
    )
    artifact = open_artifact(tmp_path / "m.onnx")
    assert [file.name for file in artifact.files] == ["m.onnx", "m.data"]
    assert artifact.size_bytes == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.data"))
    (tmp_path / "m.data").write_bytes((tmp_path / "m.data").read_bytes()[::-1])
    assert open_artifact(tmp_path / "m.onnx").sha256 != artifact.sha256


def test_free_sides_come_from_the_contract(tmp_path: Path) -> None:
    model = _model(shape=["b", "c", "h", "w"])
    assert input_spec(open_artifact(_save(tmp_path / "free.onnx", model))).shape == (None, None, None, None)
    write_contract(model, tiny.CONTRACT, ())
    assert input_spec(open_artifact(_save(tmp_path / "m.onnx", model))).shape == (None, None, 8, 8)


def test_channels_last_is_recognized(tmp_path: Path) -> None:
    spec = input_spec(open_artifact(_save(tmp_path / "m.onnx", _model(shape=[1, 8, 9, 3]))))
    assert (spec.layout, spec.height_width, spec.batch_size) == ("NHWC", (8, 9), 1)


def test_weights_listed_as_inputs_are_not_inputs(tmp_path: Path) -> None:
    model = _model(weights=[numpy_helper.from_array(np.zeros(4, np.float32), "w")])
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))  # as IR versions before 4 do
    assert input_spec(open_artifact(_save(tmp_path / "m.onnx", model))).name == "pixels"


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        (["QuantizeLinear", "DequantizeLinear"], "int8_static"),
        (["QLinearMatMul"], "int8_static"),
        (["DequantizeLinear"], "int8_weights"),
        (["DynamicQuantizeLinear", "MatMulInteger"], "int8_dynamic"),
        (["MatMulNBits"], "int4_weights"),
        (["QuantizeLinear", "MatMulNBits"], "int4"),
    ],
)
def test_the_scheme_is_read_off_the_operators(tmp_path: Path, operators: list[str], expected: str) -> None:
    nodes = [helper.make_node(name, ["x"], [name], **({"bits": 4} if name == "MatMulNBits" else {})) for name in operators]
    assert open_artifact(_save(tmp_path / "m.onnx", _model(nodes=nodes))).scheme == expected


def test_the_scheme_of_half_precision_weights_is_fp16(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.zeros(64, np.float16), "h"), numpy_helper.from_array(np.zeros(4, np.float32), "f")]
    assert open_artifact(_save(tmp_path / "m.onnx", _model(weights=weights))).scheme == "fp16"


def test_operators_inside_branches_count(tmp_path: Path) -> None:
    branch = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["c"])], "then", [], [])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    assert open_artifact(_save(tmp_path / "m.onnx", _model(nodes=[node]))).scheme == "int8_dynamic"


def test_an_ir_tells_its_contract_labels_and_both_files(tmp_path: Path) -> None:
    quoted = tiny.CONTRACT.to_json().replace('"', "&quot;")
    info = f'<vitedge><preprocessing value="{quoted}"/><labels value="[&quot;a&quot;, &quot;b&quot;]"/></vitedge>'
    path = _ir(tmp_path / "openvino.int8_static", info=info, extra='<layer id="2" name="fq" type="FakeQuantize"/>')
    for given_path in (path, path.parent):
        artifact = open_artifact(given_path)
        assert (artifact.name, artifact.format, artifact.scheme) == ("openvino.int8_static", "openvino", "int8_static")
        assert artifact.contract() == tiny.CONTRACT
        assert artifact.labels == ("a", "b")
        assert [file.name for file in artifact.files] == ["model.xml", "model.bin"]
        assert artifact.size_bytes == path.stat().st_size + 256
    assert input_spec(artifact).shape == (None, 3, 8, 8)


@pytest.mark.parametrize(("weights", "expected"), [("f32", "fp32"), ("f16", "fp16"), ("i8", "int8_weights"), ("u4", "int4_weights")])
def test_the_scheme_of_an_ir_is_read_off_its_weights(tmp_path: Path, weights: str, expected: str) -> None:
    assert open_artifact(_ir(tmp_path, weights=weights)).scheme == expected


def test_an_ir_written_by_openvino_is_read_the_same(tmp_path: Path) -> None:
    if not tool_versions(["openvino"]):
        pytest.skip("the [openvino] extra is not installed")
    openvino = import_quietly("openvino")
    model = openvino.Core().read_model(tiny.write_tiny_onnx(tmp_path / "t.onnx"))
    model.set_rt_info(tiny.CONTRACT.to_json(), ["vitedge", "preprocessing"])
    model.set_rt_info(json.dumps(["ä<&'\"", "b"]), ["vitedge", "labels"])
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    artifact = open_artifact(tmp_path / "model.xml")
    assert artifact.contract() == tiny.CONTRACT
    assert artifact.labels == ("ä<&'\"", "b")
    assert artifact.scheme == "fp32"
    assert input_spec(artifact).shape == (None, 3, 8, 8)


def test_a_checkpoint_tells_its_contract_without_torch(tmp_path: Path) -> None:
    artifact = open_artifact(_safetensors(tmp_path / "c.safetensors", _checkpoint_header()))
    assert (artifact.format, artifact.scheme, artifact.labels) == ("checkpoint", "fp32", ("a", "b"))
    assert artifact.contract() == tiny.CONTRACT
    assert input_spec(artifact).shape == (None, 3, 8, 8)


# --- the contract in the metadata -------------------------------------------------------------

_contracts = st.builds(
    Preprocessing,
    size=st.integers(1, 1024),
    crop=st.sampled_from(["squash", "center"]),
    crop_fraction=st.floats(0.01, 1),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 1)] * 3),
    color_order=st.sampled_from(["RGB", "BGR"]),
    layout=st.sampled_from(["NCHW", "NHWC"]),
)


@settings(max_examples=30, deadline=None)
@given(contract=_contracts, labels=st.lists(st.text(max_size=12), max_size=5).map(tuple))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, contract: Preprocessing, labels: tuple[str, ...]) -> None:
    model = _model()
    write_contract(model, contract, labels)
    artifact = open_artifact(_save(tmp_path_factory.mktemp("m") / "m.onnx", model))
    assert artifact.contract() == contract
    assert artifact.labels == labels


def test_writing_the_contract_again_replaces_it_and_keeps_the_rest() -> None:
    model = tiny.tiny_model()
    model.metadata_props.add(key="other", value="kept")
    write_contract(model, Preprocessing(size=9), ("x",))
    entries = [(entry.key, entry.value) for entry in model.metadata_props]
    assert sorted(key for key, _ in entries) == sorted([METADATA_KEY, LABELS_KEY, "other"])
    assert dict(entries)["other"] == "kept"
    assert json.loads(dict(entries)[LABELS_KEY]) == ["x"]


# --- bad files --------------------------------------------------------------------------------


def _bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _onnx(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: _save(folder / "m.onnx", _model(**changes))


def _truncated(folder: Path) -> Path:
    path = tiny.write_tiny_onnx(folder / "m.onnx")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _two_inputs(folder: Path) -> Path:
    model = _model()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    return _save(folder / "m.onnx", model)


def _metadata(key: str, value: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = tiny.tiny_model(preprocessing=False)
        model.metadata_props.add(key=key, value=value)
        return _save(folder / "m.onnx", model)

    return make


def _outside(folder: Path) -> Path:
    (folder / "secret").write_bytes(bytes(64))
    (folder / "inner").mkdir()
    return _with_external(folder / "inner", "../secret")


def _outside_by_link(folder: Path) -> Path:
    (folder / "secret").write_bytes(bytes(64))
    (folder / "inner").mkdir()
    (folder / "inner" / "w.data").symlink_to(folder / "secret")
    return _with_external(folder / "inner", "w.data")


def _short_external(folder: Path) -> Path:
    (folder / "w.data").write_bytes(bytes(70))
    return _with_external(folder, "w.data", offset=32)


def _doctype(folder: Path) -> Path:
    path = _ir(folder)
    bomb = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    path.write_text(path.read_text().replace("<net", f"{bomb}<net", 1).replace('name="net"', 'name="&b;"'))
    return path


BAD = {
    "text named onnx": (_bytes("m.onnx", b"hello, this is no model"), "an ONNX model"),
    "an empty onnx file": (_bytes("m.onnx", b""), "without a graph"),
    "an onnx file cut in half": (_truncated, "an ONNX model"),
    "images of rank 3": (_onnx(shape=[3, 8, 8]), "rank 3: 3 x 8 x 8"),
    "images of one channel": (_onnx(shape=["b", 1, 8, 8]), "free x 1 x 8 x 8"),
    "images of integers": (_onnx(dtype=TensorProto.UINT8), "uint8"),
    "images of half precision": (_onnx(dtype=TensorProto.FLOAT16), "float16"),
    "two inputs": (_two_inputs, "2 inputs (pixels, mask)"),
    "feature maps instead of logits": (_onnx(out=["b", 4, 8, 8]), "of rank 4"),
    "external weights missing": (lambda f: _with_external(f, "gone.data"), "'gone.data' beside it, found no such file"),
    "external weights outside": (_outside, "'../secret', which lies outside"),
    "external weights outside by a link": (_outside_by_link, "lies outside"),
    "external weights by an absolute path": (lambda f: _with_external(f, "/etc/passwd"), "lies outside"),
    "external weights cut short": (_short_external, "at least 96 bytes of weights in 'w.data', found 70 bytes"),
    "a damaged contract": (_metadata(METADATA_KEY, '{"size": -1}'), "size must be a positive whole number"),
    "a contract with an unknown field": (_metadata(METADATA_KEY, '{"size": 8, "gamma": 2}'), "gamma"),
    "labels that are no list": (_metadata(LABELS_KEY, '{"0": "cat"}'), "a JSON list of class names"),
    "an unknown suffix": (_bytes("m.pth", b"x"), "the suffix '.pth'"),
    "text named xml": (_bytes("m.xml", b"not xml"), "an OpenVINO IR"),
    "another kind of xml": (_bytes("m.xml", b"<svg/>"), "no <net>"),
    "xml with a document type": (_doctype, "a document type declaration"),
    "an IR without its bin": (lambda f: _ir(f, bin_bytes=None), "'model.bin' beside it"),
    "an IR with a short bin": (lambda f: _ir(f, bin_bytes=255), "at least 256 bytes"),
    "an IR of rank 2": (lambda f: _ir(f, shape="?,3"), "rank 2"),
    "an IR of integers": (lambda f: _ir(f, dtype="u8"), "u8"),
    "an IR with a wrong offset": (lambda f: _ir(f, size="many"), "layer 'w'"),
    "bytes named safetensors": (_bytes("c.safetensors", b"\xff" * 32), "a safetensors file"),
    "an empty safetensors file": (_bytes("c.safetensors", b""), "a safetensors file"),
    "safetensors cut short": (lambda f: _safetensors(f / "c.safetensors", _checkpoint_header(), body=bytes(8)), "bytes where its header"),
    "safetensors of another program": (lambda f: _safetensors(f / "c.safetensors", None), "without it"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    make, says = BAD[case]
    path = make(tmp_path)
    with pytest.raises(InputError) as caught:
        open_artifact(path)
    text = str(caught.value)
    assert says in text
    assert str(path) in text
    assert "\n" not in text


@pytest.mark.parametrize("make", [lambda f: f / "none.onnx", lambda f: f], ids=["no file", "a folder without a model"])
def test_a_path_that_leads_nowhere_is_a_usage_error(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(UsageError, match="a model file"):
        open_artifact(make(tmp_path))


# --- the batch symbol, read off the wire ------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(["batch", 3, 8, 8], "batch"), ([1, 3, 8, 8], ""), ([None, 3, 8, 8], ""), (["größe", "c", "h", "w"], "größe"), (["n", 3], "")],
)
def test_the_batch_symbol_is_what_protobuf_reads(tmp_path: Path, shape: list[object], expected: str) -> None:
    model = _model(shape=shape, weights=[numpy_helper.from_array(np.arange(500, dtype=np.float32), "w")])
    assert batch_symbol(_save(tmp_path / "m.onnx", model)) == expected


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200), cut=st.integers(0, 2000))
def test_damage_never_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes, cut: int) -> None:
    whole = tiny.tiny_model().SerializeToString()
    path = tmp_path_factory.mktemp("wire") / "m.onnx"
    for damaged in (content, whole[:cut], whole[:cut] + content):
        path.write_bytes(damaged)
        assert isinstance(batch_symbol(path), str)
        try:
            open_artifact(path)
        except VitedgeError as error:
            assert isinstance(error, InputError)
