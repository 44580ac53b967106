"""What decomposition refuses, in one line, and leaves as it was; and the settings that a recipe may have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compress import made
from vitedge.compress import Compressed, decompose
from vitedge.errors import FileProblems, InputError, UsageError
from vitedge.models.factored import FactoredLinear
from vitedge.models.quantized import quantized_layer
from vitedge.recipe import recipe_from_plain


def apply(model: nn.Module, **config: Any) -> Compressed:
    return decompose.apply(model, decompose.Config(**config), made.context(Path()))


def _resnet() -> nn.Module:
    return made.teacher_model()


def _quantized() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = quantized_layer(model.blocks[1].mlp.fc2, {"bits": 8}, None)
    return model


def _factored() -> nn.Module:
    return apply(made.student(), rank=3, whiten=False).model


def _under_training() -> nn.Module:
    model = made.student()
    model.blocks[0].mlp.fc1 = type("Learned", (nn.Linear,), {})(16, 64)
    return model


def _broken() -> nn.Module:
    model = made.student()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 4] = float("nan")
    return model


@pytest.mark.parametrize(
    ("start", "config", "message"),
    [
        (_resnet, {}, "decompose.layers: expected patterns that match linear layers, found 'blocks.*', which matches none in ResNet"),
        (made.student, {"layers": ["blocks.*", "block.0.mlp.fc1"]}, "(did you mean 'blocks.0.mlp.fc1'?)"),
        (made.student, {"layers": ["blocks.0.norm1"]}, "found 'blocks.0.norm1', which matches none in VisionTransformerDistilled"),
        (_quantized, {}, "decompose: expected a float model, found a quantized one; put `decompose` before the step that quantizes"),
        (_factored, {}, "decompose: blocks.0.attn.qkv: expected a layer that is one matrix, found one factored already, of rank 3"),
        (_factored, {"layers": ["*.reduce"]}, "found '*.reduce', which matches none"),
        (_under_training, {}, "decompose: blocks.0.mlp.fc1: expected a plain linear layer in float, found Learned"),
        (made.student, {"method": "evd"}, "decompose: blocks.0.attn.qkv: expected a square weight for evd, found 48 x 16"),
        (
            made.student,
            {"ratio": 0.05},
            "decompose: blocks.0.attn.qkv: expected a ratio that leaves its 48 x 16 weights a rank, found 0.05",
        ),
        (made.student, {"ratio": None, "rank": 13}, "decompose: blocks.0.attn.qkv: expected a rank of 11 or less"),
    ],
)
def test_what_cannot_be_decomposed_is_refused_in_one_line(start: Callable[[], nn.Module], config: dict[str, Any], message: str) -> None:
    model = start()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as caught:
        apply(model, **{"ratio": 0.7, **config})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_a_method_cannot_factor_leaves_the_model_as_it_was() -> None:
    model: Any = made.student()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:, 0] = 0.0
    with pytest.raises(UsageError, match=r"decompose: blocks.1.attn.qkv: expected a weight that cholesky can factor at rank 8"):
        apply(model, method="cholesky", ratio=0.7, whiten=False)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())


def test_broken_weights_and_dead_activations_are_bad_input() -> None:
    with pytest.raises(InputError, match=r"decompose: blocks.1.mlp.fc2: expected a finite weight, found infinite or NaN values"):
        apply(_broken(), ratio=0.7)
    for start, found in ((0.0, "0"), (float("inf"), "(inf|nan)")):
        model: Any = made.student()
        with torch.no_grad():
            model.blocks[0].norm2.weight.fill_(start)
            model.blocks[0].norm2.bias.fill_(0.0)
        with pytest.raises(
            InputError, match=rf"blocks.0.mlp.fc1: expected finite activations that are not all zero, found a mean square of {found}; "
        ):
            apply(model, ratio=0.7, layers=["blocks.0.mlp.fc1"])
        assert not any(module._forward_pre_hooks for module in model.modules())
        apply(model, ratio=0.7, layers=["blocks.0.mlp.fc1"], whiten=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "exactly one of rank, ratio and energy"),
        ({"rank": 4, "ratio": 0.5}, "exactly one of rank, ratio and energy"),
        ({"rank": 4, "energy": 0.5}, "exactly one of rank, ratio and energy"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"ratio": 0}, "greater than 0"),
        ({"ratio": 1}, "less than 1"),
        ({"energy": 1.0}, "less than 1"),
        ({"ratio": 0.5, "method": "qrp"}, "'svd', 'qr', 'qr_reduced'"),
        ({"ratio": 0.5, "allot": "even"}, "'uniform', 'sensitivity' or 'loss'"),
        ({"ratio": 0.5, "layers": []}, "at least 1"),
        ({"ratio": 0.5, "whiten": False, "images": 64}, "no images and no damping beside whiten: false"),
        ({"ratio": 0.5, "whiten": False, "allot": "loss"}, "whiten: true for allot: loss"),
        ({"ratio": 0.5, "damping": 0}, "greater than or equal to"),
        ({"ratio": 0.5, "ranks": 3}, "unknown key 'ranks' (did you mean 'rank'?)"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"decompose": config}]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)


def test_a_recipe_keeps_its_settings() -> None:
    plain = {"name": "r", "steps": [{"decompose": {"energy": "9e-1", "layers": ["blocks.*.mlp.*"], "allot": "sensitivity"}}]}
    recipe = recipe_from_plain(plain, "r.yaml")
    assert recipe.steps[0][1].energy == 0.9 and recipe.steps[0][1].layers == ("blocks.*.mlp.*",)
    assert recipe_from_plain({**recipe.to_plain(), "name": "r"}, "r.yaml") == recipe
