"""What cannot be pruned, and what cannot be asked for, is refused in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.compress import made
from tests.compress.pruning import apply, vit
from vitedge.compress import gates, prune
from vitedge.compress._prune_cut import describe, rebuild
from vitedge.compress._prune_units import find_places
from vitedge.errors import FileProblems, UsageError
from vitedge.models.factored import FactoredLinear
from vitedge.models.quantized import quantized_layer
from vitedge.schema import validate


def _factored() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc1 = FactoredLinear(16, 64, 4)
    return model


def _quantized() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = quantized_layer(model.blocks[1].mlp.fc2, {"bits": 8}, None)
    return model


def _gated() -> nn.Module:
    model = made.student()
    gates.apply(model, gates.Config(where=("mlp",)), made.context(Path()))
    return model


def _with_core() -> nn.Module:
    model = made.student()
    find_places(model, ["heads"])
    model.blocks[0].attn.core = nn.Flatten()
    return model


def _narrowed() -> nn.Module:
    model = made.student()
    apply(model, units=["qkv_input"], ratio=0.3)
    return model


def _with_factored_head() -> nn.Module:
    model = made.student()
    model.head = FactoredLinear(16, 3, 2)
    return model


def _with_adapter() -> nn.Module:
    model = made.student()
    model.blocks[0].adapter = nn.Linear(16, 16)
    return model


@pytest.mark.parametrize(
    ("broken", "config", "message"),
    [
        (made.teacher_model, {}, "prune: expected transformer blocks, of norm1, attn, norm2, mlp, found none in ResNet"),
        (_quantized, {}, "found a quantized one; put `prune` before the step that quantizes"),
        (_factored, {}, "blocks.1.mlp.fc1: expected a plain linear layer in float, found FactoredLinear; put `prune` before"),
        (_with_core, {}, "blocks.0.attn: expected softmax attention, found Flatten; put `prune` before"),
        (lambda: vit(qk_norm=True), {"units": ["key_dims"]}, "blocks.0.attn.q_norm: expected no norm over what key_dims would take away"),
        (lambda: vit(scale_attn_norm=True), {}, "blocks.0.attn.norm: expected no norm over what value_dims"),
        (lambda: vit(scale_mlp_norm=True), {"units": ["mlp"]}, "blocks.0.mlp.norm: expected no norm over what mlp"),
        (_narrowed, {"units": ["skip"]}, "blocks.0.norm1: expected a norm whose whole result qkv reads"),
        (
            _with_factored_head,
            {"units": ["skip"]},
            "head: expected a plain linear layer in float, found FactoredLinear; put `prune` before",
        ),
        (_with_adapter, {"units": ["skip"]}, "found blocks.0.adapter.weight"),
        (_gated, {}, "prune.score: expected gates, for a model that has them, found taylor"),
        (_gated, {"score": "gates"}, "prune.units: expected units that have gates: mlp, found value_dims; add value_dims to gates.where"),
        (made.student, {"score": "gates"}, "expected a score other than gates, for a model without them"),
        (made.student, {"target": {"params": 0.05}}, "prune.target.params: expected at most"),
        (made.student, {"ratio": 0.99}, "at the least widths"),
        (made.student, {"target": {"mib": 5.0}}, "prune.target.mib: expected a model of more than 5"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(broken: Callable[[], nn.Module], config: dict[str, Any], message: str) -> None:
    model = broken()
    with pytest.raises(UsageError) as caught:
        apply(model, **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"checkpoint: expected 80 mlp in blocks\.0"):
        rebuild(made.student(), describe({("blocks.0", "mlp"): 80}))
    with pytest.raises(UsageError, match=r"checkpoint: expected 8 mlp in blocks\.7"):
        rebuild(made.student(), describe({("blocks.7", "mlp"): 8}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": 0.2, "target": {"params": 0.5}}, "ratio or target, not both"),
        ({"target": {}}, "one of params, macs, mib and latency_ms"),
        ({"target": {"params": 0.5, "macs": 0.5}}, "one of params, macs, mib and latency_ms"),
        ({"target": {"params": 0.5, "latency_ms": 3}}, "one of params, macs, mib and latency_ms"),
        ({"target": {"params": 50}}, "target.params"),
        ({"target": {"latency_ms": 0}}, "target.latency_ms"),
        ({"units": []}, "units"),
        ({"units": ["mlp", "mlp"]}, "each kind once in units"),
        ({"units": ["qkv_input", "skip"]}, "qkv_input or skip in units, not both"),
        ({"units": ["key_dims"], "score": "gates"}, "no key_dims in units beside score: gates"),
        ({"normalize": "layer", "scope": "layer"}, "no normalize beside scope: layer"),
        ({"redistribute": True, "scope": "layer"}, "no scope and no normalize beside redistribute"),
        ({"multiple": 0}, "multiple"),
        ({"prunning_ratio": 0.5}, "unknown key 'prunning_ratio'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        validate(prune.Config, config, "recipe.yaml", "steps.0.prune.")
    assert message in str(caught.value)
