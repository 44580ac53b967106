"""Parameters that techniques add have their own rate, no decay and no orthogonal steps, with every optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vitedge.models.build import create
from vitedge.recipe import TrainConfig
from vitedge.train.optim import build_optimizer, set_learning_rate


def model_with_steps() -> Any:
    """A tiny ViT with a matrix and a scalar that ask for rates of their own."""
    torch.manual_seed(0)
    model: Any = create("vit_tiny_patch16_224", 8, 4, 3)
    fc1 = model.blocks[0].mlp.fc1
    fc1.bits = nn.Parameter(torch.full((4, 6), 2.0))
    fc1.step = nn.Parameter(torch.tensor(0.1))
    fc1.bits.lr_scale, fc1.step.lr_scale = 10.0, 0.5
    return model


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_an_own_rate_is_the_schedules_times_the_scale(optimizer: str, layer_decay: float) -> None:
    model = model_with_steps()
    made = build_optimizer(model, TrainConfig(optimizer=optimizer, layer_decay=layer_decay, weight_decay=0.3))  # type: ignore[arg-type]
    set_learning_rate(made, 0.01)
    groups = {id(p): group for group in made.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
    fc1 = model.blocks[0].mlp.fc1
    for parameter, rate in ((fc1.bits, 0.1), (fc1.step, 0.005)):
        assert groups[id(parameter)]["lr"] == pytest.approx(rate) and groups[id(parameter)]["weight_decay"] == 0.0
    assert groups[id(model.head.weight)]["weight_decay"] == 0.3
    assert groups[id(model.head.weight)]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_they_take_adams_steps(optimizer: str) -> None:
    """Adam's first step is the rate, whatever the gradient; with Muon's Nesterov momentum it is 1 + beta1 times that."""
    model = model_with_steps()
    made = build_optimizer(model, TrainConfig(optimizer=optimizer, weight_decay=0.3))  # type: ignore[arg-type]
    set_learning_rate(made, 0.001)
    fc1 = model.blocks[0].mlp.fc1
    before = fc1.bits.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    made.step()
    expected = 0.01 * (1.9 if optimizer == "muon" else 1.0)
    torch.testing.assert_close((fc1.bits - before).abs(), torch.full((4, 6), expected), rtol=2e-3, atol=1e-6)


def test_without_such_parameters_groups_are_as_before() -> None:
    torch.manual_seed(0)
    groups = build_optimizer(create("vit_tiny_patch16_224", 8, 4, 3), TrainConfig()).param_groups
    assert len(groups) == 2 and not any("lr_scale" in group for group in groups)
