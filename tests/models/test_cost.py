"""Weights, multiply-accumulates and bytes of PyTorch models: in closed form, and as the exported file and the checkpoint have them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compress import made
from vitedge import plugins
from vitedge.bench.cost import count_onnx
from vitedge.export import to_onnx
from vitedge.models.attention import open_attention
from vitedge.models.build import CheckpointMeta, save_checkpoint
from vitedge.models.cost import ModuleCost, count, count_modules, count_own, with_inner

SHAPE = (3, 8, 8)
PATCHES, PATCH_VALUES, DIM, HIDDEN, DEPTH, CLASSES = 4, 3 * 4 * 4, 16, 64, 2, 4


def tokens(token: bool) -> int:
    """With the class token, and the distillation token where there is one."""
    return PATCHES + (2 if token else 1)


def attention_macs(token: bool) -> int:
    """qkv, QK^T, AV and the projection of one block; heads make no difference."""
    n = tokens(token)
    return n * DIM * 3 * DIM + 2 * n * n * DIM + n * DIM * DIM


def mlp_macs(token: bool) -> int:
    return 2 * tokens(token) * DIM * HIDDEN


def model_macs(token: bool) -> int:
    heads = 2 if token else 1
    return PATCHES * PATCH_VALUES * DIM + DEPTH * (attention_macs(token) + mlp_macs(token)) + heads * DIM * CLASSES


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("opened", [True, False])
def test_a_vit_costs_its_closed_form(token: bool, opened: bool) -> None:
    model = made.student(token)
    if opened:
        open_attention(model)
    found = count_modules(model, SHAPE)
    assert found[""] == count(model, SHAPE) == ModuleCost(parameters(model), model_macs(token), 4 * parameters(model))
    assert found["patch_embed"].macs == found["patch_embed.proj"].macs == PATCHES * PATCH_VALUES * DIM
    for block in ("blocks.0", "blocks.1"):
        assert found[f"{block}.attn"].macs == attention_macs(token) and found[f"{block}.mlp"].macs == mlp_macs(token)
        assert found[block].macs == attention_macs(token) + mlp_macs(token)
        assert found[f"{block}.norm1"] == ModuleCost(2 * DIM, 0, 8 * DIM)
    assert found["blocks.0.attn.qkv"] == ModuleCost(DIM * 3 * DIM + 3 * DIM, tokens(token) * DIM * 3 * DIM, 4 * (DIM + 1) * 3 * DIM)
    assert found["head"].macs == DIM * CLASSES
    assert "blocks.0.attn.attn_drop" not in found


@pytest.mark.parametrize("token", [True, False])
def test_the_exported_file_has_as_many_multiply_accumulates(token: bool) -> None:
    model = made.student(token).eval()
    assert count_onnx(to_onnx(model, 8, 18)).macs == count(model, SHAPE).macs


def test_parts_add_up_to_the_whole() -> None:
    model = made.student()
    own = count_own(model, SHAPE)
    assert set(own) == {name for name, _ in model.named_modules()}
    whole = count(model, SHAPE)
    for figure in ("params", "macs", "bytes"):
        assert sum(getattr(cost, figure) for cost in own.values()) == getattr(whole, figure)
    assert own["blocks"] == ModuleCost(0, 0, 0)
    assert own["blocks.0.attn"].macs == 2 * tokens(True) ** 2 * DIM  # both products of attention, which no layer makes
    assert with_inner(own) == count_modules(model, SHAPE)


def test_the_model_stays_as_it_is() -> None:
    model = made.student().train()
    model.blocks[1].eval()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    count(model, SHAPE)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training and model.blocks[0].mlp.training and not model.blocks[1].mlp.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def data_bytes(path: Path) -> int:
    """Of a safetensors file without its header: 8 bytes say how long that is."""
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("name", ["lsq", "diffq", "fq_vit"])
def test_a_quantized_model_holds_the_weights_it_had_in_packed_bytes(name: str, tmp_path: Path) -> None:
    model = made.student()
    before = count(model, SHAPE)
    technique = plugins.load("compress", name)
    compressed = technique.apply(model, technique.Config(), made.context(tmp_path))
    saved = compressed.convert(compressed.model) if compressed.convert else compressed.model
    found = count(saved, SHAPE)
    assert (found.params, found.macs) == (before.params, before.macs)
    arch = "deit_tiny_distilled_patch16_224"
    meta = CheckpointMeta(arch, 8, 4, len(made.LABELS), made.CONTRACT.to_json(), made.LABELS, options=made.VIT)
    save_checkpoint(tmp_path / "saved.safetensors", saved, meta)
    assert found.bytes == data_bytes(tmp_path / "saved.safetensors") < before.bytes
    layer = count_modules(saved, SHAPE)["blocks.0.mlp.fc1"]
    assert (layer.params, layer.macs) == (DIM * HIDDEN + HIDDEN, tokens(True) * DIM * HIDDEN)


def test_layers_that_stand_nowhere_are_their_users() -> None:
    """DiffQ's layers compute with a rounded twin that is no module of the model."""
    technique = plugins.load("compress", "diffq")
    model = technique.apply(made.student(), technique.Config(), made.context(Path())).model
    found = count_modules(model, SHAPE)
    assert found[""].macs == model_macs(True)
    assert found["blocks.1.mlp.fc2"].macs == tokens(True) * DIM * HIDDEN


def test_a_deep_copy_costs_the_same() -> None:
    model = made.student()
    open_attention(model)
    assert count_modules(copy.deepcopy(model), SHAPE) == count_modules(model, SHAPE)


class Twice(nn.Module):
    """One layer in two places, called in both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = self.first

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x_BCHW.flatten(1)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.back(self.there(x_BCHW.flatten(1)))


class Aside(nn.Module):
    """Uses a method of its part instead of calling it, and then a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4, bias=False)
        self.score = nn.Parameter(torch.ones(4))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCN = x_BCHW.flatten(2)
        return self.part.forward(x_BCN) @ self.score


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Twice, {"": ModuleCost(16, 32, 64), "first": ModuleCost(16, 32, 64)}),
        (Tied, {"": ModuleCost(16, 32, 64), "there": ModuleCost(16, 16, 64), "back": ModuleCost(0, 16, 0)}),
    ],
)
def test_a_weight_counts_once_and_its_products_each_time(kind: Any, expected: dict[str, ModuleCost]) -> None:
    assert count_modules(kind(), (1, 2, 2)) == expected


def test_products_outside_of_a_call_are_the_callers_and_vectors_count() -> None:
    # Two channels of 4 values: each through a 4x4 matrix, then with a vector of 4.
    expected = {"": ModuleCost(20, 2 * 16 + 2 * 4, 80), "part": ModuleCost(16, 0, 64)}
    assert count_modules(Aside(), (2, 2, 2)) == expected


class Asking(nn.Module):
    """Asks attention what it went by, as blocks do that reduce tokens."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        attended: Any = self.attn
        return attended.attend(x_BCHW.squeeze(1)).out_BND


def test_attention_that_is_asked_costs_what_it_does_when_called() -> None:
    model = made.student()
    open_attention(model)
    attention = model.blocks[0].attn
    expected = 4 * DIM * 4 * DIM + 2 * 4 * 4 * DIM
    found = count_modules(Asking(attention), (1, 4, DIM))
    assert found["attn"].macs == found[""].macs == expected
    assert "attend" not in vars(attention)
