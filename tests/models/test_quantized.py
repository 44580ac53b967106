"""Quantized modules: against float layers of what their integers stand for, through state dicts, and built again from plain data."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from vitedge import packing
from vitedge.errors import UsageError
from vitedge.models.attention import open_attention
from vitedge.models.quantized import (
    ActivationQuantizer,
    IntegerWeight,
    QuantizedLinear,
    QuantizedPatchEmbedding,
    describe,
    is_quantized,
    quantized_layer,
    rebuild,
    storage,
)
from vitedge.numerics import Grid

WIDTHS = st.tuples(st.integers(2, 16), st.booleans())


def filled(weight: IntegerWeight, seed: int = 0) -> IntegerWeight:
    """With random integers of its grid, its lowest and highest among them, scales, and zero points where it has no sign."""
    generator, grid = np.random.default_rng(seed), Grid(weight.bits, weight.signed)
    values_IO = generator.integers(grid.lowest, grid.highest + 1, (weight.in_features, weight.out_features))
    values_IO.flat[0], values_IO.flat[-1] = grid.lowest, grid.highest
    scale = generator.uniform(0.01, 0.02, tuple(weight.scale.shape))
    zero_point = None if weight.signed else torch.from_numpy(generator.integers(0, grid.highest + 1, tuple(weight.scale.shape)))
    return weight.set(torch.from_numpy(values_IO), torch.from_numpy(scale), zero_point)


def meaning(weight: IntegerWeight) -> np.ndarray:
    """The float64 weight (I, O): s (q - z), each scale over its group of rows."""
    scale, zero = weight.scale.double().numpy(), weight.zero_point.to(torch.int64).numpy()
    if weight.group is not None:
        rows = np.arange(weight.in_features) // weight.group
        scale, zero = scale[rows], zero[rows]
    found: np.ndarray = scale * (weight.values.to(torch.int64).numpy() - zero)
    return found


@given(WIDTHS, st.integers(1, 9), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 10)), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_weight_comes_back_from_its_packed_bytes(width: tuple[int, bool], rows: int, columns: int, group: int | None, seed: int) -> None:
    weight = filled(IntegerWeight(rows, columns, *width, group), seed)
    state = weight.state_dict()
    assert set(state) == {"packed", "scale"} | (set() if width[1] else {"zero_point"})
    assert state["packed"].dtype == torch.uint8 and state["packed"].numel() == packing.packed_bytes(rows * columns, width[0])
    again = IntegerWeight(rows, columns, **weight.describe())
    again.load_state_dict(state)
    for name in ("values", "scale", "zero_point"):
        assert torch.equal(getattr(again, name), getattr(weight, name))
    np.testing.assert_allclose(again().numpy(), meaning(weight), rtol=1e-6, atol=1e-9)
    assert again().dtype == torch.float32 and again().shape == (rows, columns)


def test_a_state_without_the_bytes_is_refused_by_name() -> None:
    layer = QuantizedLinear(filled(IntegerWeight(4, 3, 4)), None)
    state = layer.state_dict()
    del state["weight.packed"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight.packed"):
        layer.load_state_dict(state)


@given(st.sampled_from(((2, True), (4, False), (8, True), (8, False), (12, False), (16, True))), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_activations_become_the_nearest_of_their_grid(width: tuple[int, bool], per_channel: bool, seed: int) -> None:
    generator, grid = np.random.default_rng(seed), Grid(*width)
    x = generator.normal(0, 1, (2, 3, 5)).astype(np.float32)
    scale = generator.uniform(0.01, 1, 5 if per_channel else ()).astype(np.float32)
    zero = generator.integers(grid.lowest, grid.highest + 1, 5 if per_channel else ())
    rounds = ActivationQuantizer(*width, 5 if per_channel else None).set(torch.as_tensor(scale), torch.as_tensor(zero))
    q = np.clip(np.round(x / scale) + zero, grid.lowest, grid.highest)
    np.testing.assert_allclose(rounds(torch.from_numpy(x)).numpy(), (q - zero) * scale, rtol=1e-6, atol=0)
    assert rounds.zero_point.dtype == storage(*width)
    assert rounds(torch.from_numpy(x).bfloat16()).dtype == torch.bfloat16
    again = ActivationQuantizer(**json.loads(json.dumps(rounds.describe())))
    again.load_state_dict(rounds.state_dict())
    assert torch.equal(again(torch.from_numpy(x)), rounds(torch.from_numpy(x)))


def test_the_operators_are_what_the_exporter_expects() -> None:
    """Their shapes and types without computing them, as tracing asks for them, are those of the computed ones."""
    weight = filled(IntegerWeight(6, 4, 4, False, 2))
    x, scale, zero = torch.randn(2, 5), torch.tensor(0.1), torch.tensor(7, dtype=torch.uint8)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vitedge.quantize_dequantize.default, (x, scale, zero, 1, 4, False), test_utils=tests)
    arguments = (weight.values, weight.scale, weight.zero_point, 2)
    torch.library.opcheck(torch.ops.vitedge.dequantize_weight.default, arguments, test_utils=tests)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("rounds", [True, False])
def test_a_linear_layer_is_the_float_layer_of_what_its_integers_stand_for(bias: bool, group: int | None, rounds: bool) -> None:
    plain = nn.Linear(10, 6, bias=bias)
    inputs = ActivationQuantizer(8, False).set(torch.tensor(0.02), torch.tensor(100)) if rounds else None
    layer: Any = quantized_layer(plain, {"bits": 4, "signed": True, "group": group}, inputs)
    filled(layer.weight)
    with torch.no_grad():
        plain.weight.copy_(torch.from_numpy(meaning(layer.weight)).T)
        x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), plain(inputs(x) if inputs is not None else x))
    assert (layer.bias is None) == (not bias) and (layer.bias is None or layer.bias is not plain.bias)


@pytest.mark.parametrize(("weight_bits", "signed"), [(8, True), (4, True), (4, False)])
def test_sums_are_those_of_the_integers_scaled_once(weight_bits: int, signed: bool) -> None:
    """To the bit, whatever the order of the sum: 768 products of the largest 8-bit activations and random weights."""
    layer: Any = quantized_layer(nn.Linear(768, 6), {"bits": weight_bits, "signed": signed, "group": None}, ActivationQuantizer(8, False))
    filled(layer.weight)
    layer.inputs.set(torch.tensor(0.0173), torch.tensor(100))
    x = torch.randn(5, 768, generator=torch.Generator().manual_seed(0)) * 2
    with torch.no_grad():
        quantized = torch.clamp(torch.round(x / layer.inputs.scale) + 100, 0, 255).long() - 100
        integers = quantized @ (layer.weight.values.long() - layer.weight.zero_point.long())
        assert int(integers.abs().max()) < 2**24
        expected = integers.float() * (layer.inputs.scale * layer.weight.scale) + layer.bias
        assert torch.equal(layer(x), expected)
        assert not torch.equal(layer.inputs(x) @ layer.weight() + layer.bias, expected)  # why it is not computed so
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), expected, rtol=0.1, atol=1.0, check_dtype=False)


@pytest.mark.parametrize("patch", [(4, 4), (2, 4)])
def test_a_patch_embedding_is_the_convolution_of_what_its_integers_stand_for(patch: tuple[int, int]) -> None:
    plain = nn.Conv2d(3, 5, patch, patch)
    layer: Any = quantized_layer(plain, {"bits": 8}, None)
    assert isinstance(layer, QuantizedPatchEmbedding)
    filled(layer.linear.weight)
    with torch.no_grad():
        plain.weight.copy_(torch.from_numpy(meaning(layer.linear.weight)).T.reshape(plain.weight.shape))
        x_BCHW = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x_BCHW), plain(x_BCHW), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2, 2, padding=1), nn.Conv2d(4, 4, 2, 2, groups=2), nn.LayerNorm(4)],
    ids=["stride", "padding", "groups", "norm"],
)
def test_other_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match="expected a linear layer or a patch embedding"):
        quantized_layer(layer, {"bits": 8}, None)


def quantized_student() -> nn.Module:
    """A layer of every kind: the patch embedding, one linear layer with rounded inputs, one in groups without, one slot of attention."""
    model = made.student(False).eval()
    assert not is_quantized(model)
    open_attention(model)
    rounds = ActivationQuantizer(8, False).set(torch.tensor(0.02), torch.tensor(128))
    model.patch_embed.proj = quantized_layer(model.patch_embed.proj, {"bits": 8}, rounds)
    fc1, fc2 = model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2
    inputs = ActivationQuantizer(4, False, 16).set(torch.full((16,), 0.2), torch.full((16,), 7))
    model.blocks[0].mlp.fc1 = quantized_layer(fc1, {"bits": 4}, inputs)
    model.blocks[0].mlp.fc2 = quantized_layer(fc2, {"bits": 3, "signed": False, "group": 16}, None)
    model.blocks[1].attn.on_value = ActivationQuantizer(8, True).set(torch.tensor(0.01), torch.tensor(0))
    for seed, module in enumerate(module for module in model.modules() if isinstance(module, IntegerWeight)):
        filled(module, seed)
    assert is_quantized(model)
    return model


def test_a_model_is_built_again_from_plain_data_and_its_state() -> None:
    model = quantized_student()
    described = describe(model)
    assert set(described) == {"patch_embed.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.attn.on_value"}
    again = rebuild(made.student(False, seed=9).eval(), json.loads(json.dumps(described)))
    again.load_state_dict(model.state_dict())
    x_BCHW = made.batch().x_BCHW
    with torch.no_grad():
        assert torch.equal(again(x_BCHW), model(x_BCHW)) and model(x_BCHW).isfinite().all()
    assert describe(again) == described


def test_what_was_described_of_another_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a layer blocks\.7\.mlp\.fc1"):
        rebuild(made.student(False), {"blocks.7.mlp.fc1": {"weight": {"bits": 8}, "inputs": None}})
    with pytest.raises(UsageError, match="found LayerNorm"):
        rebuild(made.student(False), {"blocks.0.norm1": {"weight": {"bits": 8}, "inputs": None}})
