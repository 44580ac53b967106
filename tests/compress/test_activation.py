"""The activation of MLPs: against the functions written out in float64, where it goes, and what must stay."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.compress import made
from tests.compress.reducing import CONTRACT, DEPTH, OPTIONS, SIZE, arch, assert_file_answers_as, context, images, vit
from vitedge import plugins
from vitedge.compress import activation
from vitedge.errors import UsageError
from vitedge.models.build import CheckpointMeta, load_checkpoint, save_checkpoint
from vitedge.models.cost import count

FUNCTIONS = {"relu": lambda x: np.maximum(x, 0), "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6}


def apply(model: nn.Module, **config: Any) -> Any:
    return activation.apply(model, activation.Config(**config), context())


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out_BC: torch.Tensor = model.eval()(images())
    return out_BC


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_mlp_is_its_layers_with_the_function_between(kind: str) -> None:
    model = apply(vit().double(), kind=kind).model
    x_ND = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    for block in model.blocks:
        first, second = block.mlp.fc1, block.mlp.fc2
        hidden = FUNCTIONS[kind](x_ND.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy())
        expected_ND = hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy()
        with torch.no_grad():
            assert np.allclose(block.mlp(x_ND).numpy(), expected_ND, rtol=1e-12, atol=1e-12)


def test_weights_stay_and_answers_do_not() -> None:
    model = vit()
    before, weights = answers(model), copy.deepcopy(model.state_dict())
    cost = count(model, (3, SIZE, SIZE))
    made_of = apply(model)
    assert made_of.model is model and count(model, (3, SIZE, SIZE)) == cost
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not torch.allclose(answers(model), before, atol=1e-2)
    assert made_of.notes == {"kind": "relu", "before": {f"blocks.{index}": "GELU" for index in range(DEPTH)}}


def test_only_the_blocks_that_are_named() -> None:
    model = apply(vit(), blocks=("blocks.0", "*.2")).model
    assert [type(block.mlp.act) for block in model.blocks] == [nn.ReLU, nn.GELU, nn.ReLU]


def test_one_after_another_counts_as_the_last() -> None:
    model = vit()
    apply(model, kind="relu")
    notes = apply(model, kind="hard_swish", blocks=("blocks.1",)).notes
    assert notes["before"] == {"blocks.1": "ReLU"}
    assert [type(block.mlp.act) for block in model.blocks] == [nn.ReLU, nn.Hardswish, nn.ReLU]


def test_it_goes_with_a_cut_mlp_and_merged_tokens(tmp_path: Path) -> None:
    """In the order of a recipe, and back from a checkpoint in that order."""
    model, structure = vit(), []
    steps = {"prune": {"score": "magnitude", "units": ["mlp"], "ratio": 0.5}, "activation": {}, "tome": {"r": 2}}
    for name, settings in steps.items():
        technique = plugins.load("compress", name)
        compressed = technique.apply(model, technique.Config(**settings), context())
        model = compressed.model
        structure.append((name, json.loads(json.dumps(compressed.structure(model)))))
    labels = made.LABELS
    meta = CheckpointMeta(arch(False), SIZE, 4, len(labels), CONTRACT.to_json(), labels, options=OPTIONS, structure=tuple(structure))
    save_checkpoint(tmp_path / "saved.safetensors", model, meta)
    again, _ = load_checkpoint(tmp_path / "saved.safetensors")
    assert {type(block.mlp.act) for block in again.blocks} == {nn.ReLU}
    assert torch.equal(answers(again), answers(model))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_file_answers_as_the_model_and_has_no_error_function(kind: str, tmp_path: Path) -> None:
    model = apply(vit(), kind=kind).model
    assert_file_answers_as(model, tmp_path)
    found = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not found & {"Erf", "Gelu", "Tanh"} and found & {"Relu", "HardSwish", "Clip", "HardSigmoid"}


def test_a_model_that_has_none_is_refused_and_left_as_it_was() -> None:
    with pytest.raises(UsageError, match="activation: expected transformer blocks"):
        apply(made.teacher_model())
    with pytest.raises(UsageError, match=r"activation\.blocks: expected patterns that match blocks, found 'block\.1', which matches none"):
        apply(vit(), blocks=("blocks.0", "block.1"))
    model = vit()
    model.blocks[1].mlp = nn.Linear(16, 16)
    with pytest.raises(UsageError, match=r"activation: blocks\.1\.mlp: expected an MLP with an activation.*found Linear, which has none"):
        apply(model)
    assert isinstance(model.blocks[0].mlp.act, nn.GELU)
