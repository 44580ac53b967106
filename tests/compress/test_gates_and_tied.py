"""Techniques that round or scale weights, on models whose weights are gated or used twice: refused in one line, or exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compress import made
from vitedge import plugins
from vitedge.compress import Compressed, gates, prune, shared_vit, smooth
from vitedge.errors import UsageError

ROUNDING: dict[str, dict[str, Any]] = {"lsq": {"calibration_images": 16}, "diffq": {"min_elements": 1}, "fq_vit": {}}


def apply(name: str, model: nn.Module, **config: Any) -> Compressed:
    technique = plugins.load("compress", name)
    compressed: Compressed = technique.apply(model, technique.Config(**config), made.context(Path()))
    return compressed


def gated(*where: str, seed: int = 0) -> Any:
    """A student whose gates have learned something."""
    model = made.student()
    gates.apply(model, gates.Config.model_validate({"where": where}), made.context(Path()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".a"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def tied(**config: Any) -> Any:
    return shared_vit.apply(made.student(), shared_vit.Config(start="project", **config), made.context(Path())).model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = copy.deepcopy(model).double().eval()(made.batch(range(24)).x_BCHW.double())
    return found


def refused(message: str, name: str, model: nn.Module, **config: Any) -> None:
    """One line, and the model left as it was."""
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(UsageError) as caught:
        apply(name, model, **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize(("where", "layer"), [("mlp", "blocks.0.mlp.fc2"), ("heads", "blocks.0.attn.proj"), ("skip", "blocks.0.attn.qkv")])
def test_gates_are_not_rounded_away(name: str, where: str, layer: str) -> None:
    message = (
        f"{name}: {layer}: expected a layer without gates, found those of a `gates` step; put `prune: {{score: gates}}` before `{name}`"
    )
    refused(message, name, gated(where), **ROUNDING[name])


@pytest.mark.parametrize("name", ROUNDING)
def test_gates_that_were_cut_are_in_nobodys_way(name: str) -> None:
    model = gated("mlp")
    cut = prune.Config(score="gates", units=("mlp",), ratio=0.25, multiple=8)
    prune.apply(model, cut, made.context(Path()))
    compressed = apply(name, model, **ROUNDING[name])
    converted = compressed.convert(compressed.model) if compressed.convert else compressed.model
    assert converted.eval()(made.batch().x_BCHW).shape == (6, 4)


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize(
    ("config", "layer"), [({}, "blocks.0.attn"), ({"mlp": False}, "blocks.0.attn"), ({"attention": False}, "blocks.0.mlp")]
)
def test_a_matrix_that_is_used_twice_is_not_rounded_once(name: str, config: dict[str, Any], layer: str) -> None:
    message = f"{name}: {layer}: expected weights that are used once, found a matrix used as it is and transposed"
    refused(message, name, tied(**config), **ROUNDING[name])


@pytest.mark.parametrize(
    ("where", "layer"), [("qkv_input", "blocks.0.attn.qkv"), ("value_dims", "blocks.0.attn.proj"), ("skip", "blocks.0.attn.qkv")]
)
def test_what_reads_through_gates_is_not_smoothed(where: str, layer: str) -> None:
    message = f"smooth: {layer}: expected a plain linear layer in float, found GatedLinear; put `smooth` before the step that changed it"
    refused(message, "smooth", gated(where), images=16)


def test_gates_that_nothing_smoothed_reads_through_change_nothing() -> None:
    """Those of hidden units stand before fc2, which is left as it is."""
    model = gated("mlp")
    before = logits(model)
    smooth.apply(model, smooth.Config(images=16), made.context(Path()))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("config", "part", "kind"),
    [
        ({}, "blocks.0.attn", "TiedAttention"),
        ({"attention": False}, "blocks.0.mlp", "TiedMlp"),
    ],
)
def test_a_matrix_that_is_used_twice_is_not_scaled_for_one_use(config: dict[str, Any], part: str, kind: str) -> None:
    message = f"smooth: {part}: expected weights that are used once, and so can be scaled for one use, found {kind}"
    refused(message, "smooth", tied(**config), images=16)


def test_a_model_with_shared_weights_is_smoothed_where_it_shares_none() -> None:
    for config, folds in (({}, ("norm",)), ({"mlp": False}, ("norm2", "norm")), ({"attention": False}, ("norm1", "value", "norm"))):
        model = tied(**config)
        before = logits(model)
        smooth.apply(model, smooth.Config.model_validate({"images": 16, "folds": folds}), made.context(Path()))
        torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6 * float(before.abs().max()))
