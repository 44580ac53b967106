"""Factored layers: against the layer whose weight is the product, in the place of one, and built again from plain data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from vitedge.errors import UsageError
from vitedge.models.factored import FactoredLinear, factored_layer, rebuild


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_it_computes_what_the_product_does(inputs: int, outputs: int, rank: int, bias: bool, seed: int) -> None:
    left_OR, right_RI = numbers(outputs, rank, seed=seed), numbers(rank, inputs, seed=seed + 1)
    layer = FactoredLinear(inputs, outputs, rank, bias, dtype=torch.float64).set(left_OR, right_RI)
    x = numbers(2, 3, inputs, seed=seed + 2)
    with torch.no_grad():
        expected = x @ (left_OR @ right_RI).T + (layer.expand.bias if bias else 0.0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert (layer.in_features, layer.out_features, layer.rank) == (inputs, outputs, rank)
    assert set(layer.state_dict()) == {"reduce.weight", "expand.weight"} | ({"expand.bias"} if bias else set())
    assert sum(p.numel() for p in layer.parameters()) == rank * (inputs + outputs) + (outputs if bias else 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_takes_the_place_of_a_layer(bias: bool, training: bool, learns: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 10, bias=bias, dtype=dtype).train(training).requires_grad_(learns)
    before = copy.deepcopy(linear)
    layer = factored_layer(linear, 3)
    assert (layer.in_features, layer.out_features, layer.rank) == (6, 10, 3)
    assert all(module.training == training for module in layer.modules())
    assert all(p.dtype == dtype and p.requires_grad == learns for p in layer.parameters())
    assert (layer.expand.bias is not None) == bias
    if bias:
        assert torch.equal(layer.expand.bias, linear.bias) and layer.expand.bias is not linear.bias
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), before.parameters(), strict=True))


def test_gradients_reach_both_factors_and_the_bias() -> None:
    layer = FactoredLinear(5, 4, 2)
    layer(torch.ones(3, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_it_compiles_as_it_computes() -> None:
    layer = FactoredLinear(5, 4, 2)
    x = numbers(3, 5).float()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_model_is_built_again_whatever_the_widths_of_its_layers() -> None:
    model: Any = made.student()
    model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2 = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)
    ranks = {"blocks.0.mlp.fc1": 5, "blocks.0.mlp.fc2": 4, "blocks.1.attn.qkv": 3, "head": 2}
    assert rebuild(model, ranks) is model
    found = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    assert {name: module.rank for name, module in found.items()} == ranks
    sizes = {name: (module.in_features, module.out_features) for name, module in found.items()}
    assert sizes == {"blocks.0.mlp.fc1": (16, 40), "blocks.0.mlp.fc2": (40, 16), "blocks.1.attn.qkv": (16, 48), "head": (16, 4)}
    assert model.blocks[0].mlp.fc2.expand.bias is None and model.blocks[0].mlp.fc1.expand.bias is not None
    assert model.eval()(made.batch().x_BCHW).shape == (6, 4)


@pytest.mark.parametrize(
    ("name", "found"), [("blocks.9.mlp.fc1", "none"), ("blocks.0.norm1", "LayerNorm"), ("blocks.1.mlp.fc1", "FactoredLinear")]
)
def test_a_model_without_the_layer_is_refused_in_one_line(name: str, found: str) -> None:
    model: Any = made.student()
    model.blocks[1].mlp.fc1 = FactoredLinear(16, 64, 2)
    with pytest.raises(UsageError) as caught:
        rebuild(model, {name: 2})
    assert str(caught.value) == f"checkpoint: expected a linear layer {name}, found {found}; train it again"
