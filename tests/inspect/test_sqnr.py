"""SQNR of each product against its float parent: by hand, and between files whose error is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import tiny
from tests.inspect import made
from vitedge.errors import UsageError
from vitedge.inspect.onnx_file import open_onnx
from vitedge.inspect.onnx_layers import find_layers, module_of, name_nodes
from vitedge.inspect.sources import BATCH_SIZE
from vitedge.inspect.sqnr import Comparison, Noise, compare, pair_by_layer, pair_by_node
from vitedge.model_file import open_artifact
from vitedge.progress import silent

PRODUCTS = ["patch_embed.proj", *(f"blocks.0.attn.{name}" for name in ("q", "k", "v", "scores", "values", "proj")), "head"]


def against(reference: Path, other: Path, images: int = 6) -> Comparison:
    (here, ours), (there, theirs) = open_onnx(open_artifact(reference), 1), open_onnx(open_artifact(other), 1)
    return compare(here, there, *pair_by_layer(ours, theirs), tiny.images(images), silent)


def test_by_hand() -> None:
    noise = Noise()
    noise.add(np.array([3.0, 0.0]), np.array([3.0, 0.5]))
    noise.add(np.array([[4.0]]), np.array([[4.0]]))
    assert noise.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert noise.values == 3
    assert Noise(1.0, 0.0, 1).sqnr_db == math.inf and Noise(0.0, 1.0, 1).sqnr_db == -math.inf


def test_an_error_of_one_product_is_found_there_and_nowhere_before(tmp_path: Path) -> None:
    found = against(made.write_vit(tmp_path / "a.onnx"), made.write_vit(tmp_path / "b.onnx", head=1.1))
    plain = found.to_plain()
    assert plain["nodes"][0]["layer"] == "head"
    assert plain["nodes"][0]["sqnr_db"] == pytest.approx(20.0, abs=1e-3)  # 1.1 of a value is 20 dB away from it
    assert [row["noise_rms"] for row in plain["nodes"][1:]] == [0.0] * 7
    assert [row["sqnr_db"] for row in plain["nodes"][1:]] == [None] * 7
    assert sorted(row["layer"] for row in plain["nodes"]) == sorted(PRODUCTS)
    assert plain["logits"]["sqnr_db"] == pytest.approx(20.0, abs=1e-3)
    assert (plain["logits"]["top1_agreement"], plain["images"], plain["unmatched"]) == (100.0, 6, [])


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
def test_a_real_int8_file_meets_its_parent_at_every_product(tmp_path: Path, scheme: str) -> None:
    root = made.make_build(tmp_path / "build", None, scheme)
    found = against(root / "model.fp32.onnx", root / f"model.{scheme}.onnx")
    assert [pair.layer for pair, _ in found.nodes] == PRODUCTS
    assert found.unmatched == ()
    # Laid out otherwise (the convolution is a product of patches) or without its bias, a value would be a few dB away at most.
    assert all(20 < noise.sqnr_db < 70 for _, noise in found.nodes)
    # The same by hand for one product, from the files' own tensors.
    x_BCHW = tiny.images(6)
    values = []
    for name in ("model.fp32.onnx", f"model.{scheme}.onnx"):
        read = open_onnx(open_artifact(root / name), 1)[0].open(["proj_product"])
        parts = [read(part)["proj_product"] for part in (x_BCHW[:BATCH_SIZE], x_BCHW[BATCH_SIZE:])]
        values.append(np.concatenate(parts).astype(np.float64))
    wanted = 10 * np.log10((values[0] ** 2).sum() / ((values[0] - values[1]) ** 2).sum())
    (noise,) = (noise for pair, noise in found.nodes if pair.layer == "blocks.0.attn.proj")
    assert noise.sqnr_db == pytest.approx(wanted, abs=1e-3)


def test_modules_pair_what_names_would_mix_up(tmp_path: Path) -> None:
    """An exporter's counters mean nothing in another export: here q and v have changed their products' names."""
    model = made.vit()
    swap = {"q_product": "v_product", "v_product": "q_product", "mm_q": "mm_v", "mm_v": "mm_q"}
    for node in model.graph.node:
        node.name = swap.get(node.name, node.name)
        node.input[:] = [swap.get(name, name) for name in node.input]
        node.output[:] = [swap.get(name, name) for name in node.output]
    onnx.save(model, tmp_path / "b.onnx")
    found = against(made.write_vit(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert len(found.nodes) == 8 and all(noise.noise == 0.0 for _, noise in found.nodes)


def test_what_has_no_counterpart_is_listed_with_the_reason(tmp_path: Path) -> None:
    ours = find_layers(made.vit())
    other = onnx.ModelProto()
    other.CopyFrom(made.vit())
    for node in other.graph.node:
        node.input[:] = ["renamed.bias" if name == "blocks.0.attn.proj.bias" else name for name in node.input]
    next(tensor for tensor in other.graph.initializer if tensor.name == "blocks.0.attn.proj.bias").name = "renamed.bias"
    pairs, unmatched = pair_by_layer(ours, find_layers(other))
    assert [layer for layer, _ in unmatched] == ["blocks.0.attn.proj"] and len(pairs) == 7
    pairs, unmatched = pair_by_node(ours, frozenset({"mm_q", "add_k", "conv"}), ("logits", ""))
    assert [(pair.layer, pair.reference, pair.other) for pair in pairs] == [
        ("patch_embed.proj", "conv", "conv"),
        ("blocks.0.attn.q", "q_product", "mm_q"),
        ("blocks.0.attn.k", "k", "add_k"),
        ("head", "logits", ""),
    ]
    assert len(unmatched) == 4


def test_two_fixed_batches_cannot_be_compared(tmp_path: Path) -> None:
    for batch in (2, 3):
        tiny.write_tiny_onnx(tmp_path / f"{batch}.onnx", batch=batch)
    with pytest.raises(UsageError, match="2 and 3"):
        against(tmp_path / "2.onnx", tmp_path / "3.onnx")


def test_a_fixed_batch_takes_whole_batches_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.write_tiny_onnx(tmp_path / f"{name}.onnx", batch=4)
    found = against(tmp_path / "a.onnx", tmp_path / "b.onnx", images=6)
    assert found.to_plain()["images"] == 4


def test_modules_are_read_off_names() -> None:
    cases = {"blocks.0.attn.qkv.bias_rank3": "blocks.0.attn.qkv", "head.weight_quantized": "head", "fc1_weight": "fc1", "val_13": ""}
    assert {name: module_of([name]) for name in cases} == cases
    model = made.vit()
    for node in model.graph.node:
        node.name = ""
    name_nodes(model)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
