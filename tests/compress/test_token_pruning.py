"""Pruning by the class token's attention: which tokens stay, what the others become, and the exported file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress.reducing import (
    DEPTH,
    assert_comes_back,
    assert_file_answers_as,
    assert_gradients_reach_all,
    context,
    images,
    vit,
)
from vitedge.compress import Compressed, token_pruning
from vitedge.compress._token_pruning import AttentionPruning, kept_tokens
from vitedge.compress._tome import merge_tokens_
from vitedge.errors import FileProblems, UsageError
from vitedge.models.attention import Attended, open_attention
from vitedge.models.reducing_block import quarters
from vitedge.recipe import recipe_from_plain


def apply(model: nn.Module, **config: Any) -> Compressed:
    return token_pruning.apply(model, token_pruning.Config(**config), context())


@given(st.integers(2, 12), st.integers(1, 3), st.integers(0, 1), st.floats(0.1, 0.9), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_tokens_that_are_looked_at_most_stay(patches: int, answering: int, registers: int, keep: float, fuse: bool, seed: int) -> None:
    prefix, tokens = answering + registers, answering + registers + patches
    generator = torch.Generator().manual_seed(seed)
    x_BND = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    weights_BHNN = torch.randn(2, 3, tokens, tokens, generator=generator, dtype=torch.float64).softmax(-1)
    pruning = AttentionPruning(keep, prefix, answering, fuse)
    found, size = pruning(x_BND, None, Attended(x_BND, x_BND[:, None], weights_BHNN))
    kept = int(np.ceil(keep * patches))
    fused = fuse and kept < patches
    assert size is None and found.shape == (2, prefix + kept + fused, 5)
    assert torch.equal(found[:, :prefix], x_BND[:, :prefix])
    for image in range(2):
        x, scores = x_BND[image].numpy(), weights_BHNN[image, :, :answering, prefix:].numpy().mean((0, 1))
        order = np.argsort(-scores)
        np.testing.assert_array_equal(found[image, prefix : prefix + kept].numpy(), x[prefix + order[:kept]])
        if fused:
            rest = order[kept:]
            np.testing.assert_allclose(found[image, -1].numpy(), (scores[rest, None] * x[prefix + rest]).sum(0), rtol=1e-10, atol=1e-12)


def test_tokens_that_nothing_looks_at_are_not_missed() -> None:
    """Where the others have no weight at all, in no head and for no token, dropping them changes no answer."""
    model = vit().double()
    open_attention(model)

    class Blind(nn.Module):
        def forward(self, scores_BHNN: torch.Tensor) -> torch.Tensor:
            seen_N = torch.arange(scores_BHNN.shape[-1]) < 9  # the class token and the first eight patches
            return scores_BHNN.masked_fill(~seen_N, -torch.inf).softmax(-1)

    for block in model.blocks:
        block.attn.softmax = Blind()
    pruned = copy.deepcopy(model)
    notes = token_pruning.apply(pruned, token_pruning.Config(keep=0.5, blocks=(0,), fuse=False), context()).notes
    assert notes["tokens"][1] == {"attention": 9, "mlp": 9}
    x_BCHW = images(5).double()
    with torch.no_grad():
        torch.testing.assert_close(pruned(x_BCHW), model(x_BCHW), rtol=0, atol=1e-10)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, [(16, 16), (16, 13), (13, 11)]),  # 12 of 16 and one fused, 10 of 13 and one fused
        ({"fuse": False}, [(16, 16), (16, 12), (12, 9)]),
        ({"keep": 0.5, "blocks": (0,)}, [(16, 9), (9, 9), (9, 9)]),
    ],
)
def test_how_many_stay_where(config: dict[str, Any], tokens: list[tuple[int, int]], token: bool) -> None:
    notes = apply(vit(token), **config).notes
    prefix = 1 + token
    assert notes["tokens"] == [{"attention": prefix + a, "mlp": prefix + m} for a, m in tokens]
    assert 0 < notes["macs"]["share"] < 1
    json.dumps(notes)


def test_the_papers_blocks_are_the_default() -> None:
    assert quarters(12) == [3, 6, 9] and quarters(2) == [1] and quarters(1) == [0] and quarters(24) == [6, 12, 18]
    assert [kept_tokens(0.7, n) for n in (196, 139, 99)] == [138, 98, 70]


@pytest.mark.parametrize("token", [True, False])
def test_gradients_reach_every_weight(token: bool) -> None:
    assert_gradients_reach_all(apply(vit(token)).model)


@pytest.mark.parametrize(("token", "config"), [(True, {"fuse": False, "keep": 0.5}), pytest.param(False, {}, marks=pytest.mark.slow)])
def test_the_exported_file_answers_as_the_model(token: bool, config: dict[str, Any], tmp_path: Path) -> None:
    assert_file_answers_as(apply(vit(token), **config).model, tmp_path)


@pytest.mark.parametrize("token", [True, False])
def test_it_comes_back_from_its_checkpoint(token: bool, tmp_path: Path) -> None:
    compressed = apply(vit(token), keep=0.6, fuse=token, blocks=(2, 0))
    again: Any = assert_comes_back("token_pruning", compressed, token, tmp_path)
    assert [block.between is not None for block in again.blocks] == [True, False, True]


def test_it_goes_with_patch_drop_in_training() -> None:
    from timm.layers import PatchDropout

    model: Any = apply(vit(), blocks=(0, 1, 2)).model
    model.patch_drop = PatchDropout(0.9)
    assert model.train()(images(2)).shape == (2, 4)  # one patch is left, and is kept


@pytest.mark.parametrize(
    ("merging", "config", "message"),
    [
        (False, {"keep": 0.99}, "token_pruning.keep: expected a share of 16 patch tokens that leaves one out, found 0.99"),
        (False, {"blocks": [DEPTH]}, "token_pruning.blocks: expected blocks of the model, 0 to 2, found 3"),
        (True, {}, "token_pruning: expected a model whose tokens no other step reduces"),
    ],
)
def test_what_it_refuses_in_one_line(merging: bool, config: dict[str, Any], message: str) -> None:
    model = vit()
    if merging:
        merge_tokens_(model, [3, 3, 3], True)
    with pytest.raises(UsageError) as caught:
        apply(model, **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_done_once_and_needs_weights() -> None:
    model: Any = apply(vit(), blocks=(0,)).model
    with pytest.raises(UsageError, match="one whose tokens are reduced"):
        apply(model)
    model.blocks[0].attn.core = nn.Identity()
    x_BND = torch.zeros(1, 3, 16)
    with pytest.raises(ValueError, match="the weights of softmax attention"):
        model.blocks[0].between(x_BND, None, Attended(x_BND, x_BND[:, None], None))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"keep": 1}, "less than 1"),
        ({"keep": 0}, "greater than 0"),
        ({"blocks": [2, 2]}, "each block once"),
        ({"blocks": []}, "at least 1"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"token_pruning": config}]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)
