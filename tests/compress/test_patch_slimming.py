"""Patch slimming: significance against the paper's sum over paths, positions, and the model that leaves the others out."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.compress import made
from tests.compress.reducing import (
    assert_comes_back,
    assert_file_answers_as,
    assert_gradients_reach_all,
    context,
    images,
    vit,
)
from vitedge.compress import Compressed, patch_slimming
from vitedge.compress._patch_slimming import change_of_block, choose, local_positions, significance
from vitedge.errors import FileProblems, InputError, UsageError
from vitedge.models.attention import open_attention
from vitedge.recipe import recipe_from_plain


def apply(model: nn.Module, **config: Any) -> Compressed:
    return patch_slimming.apply(model, patch_slimming.Config(**{"images": 20, **config}), context())


def opened(token: bool = False, double: bool = False) -> Any:
    model = vit(token)
    open_attention(model)
    return model.double() if double else model


def attention_of(block: Any, x_BND: torch.Tensor) -> np.ndarray:
    """Weights BHNN, written out from the layers."""
    batch, tokens, width = x_BND.shape
    q, k, _ = block.attn.qkv(block.norm1(x_BND)).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
    found: np.ndarray = (q @ k.transpose(-2, -1) / (width // 2) ** 0.5).softmax(-1).numpy()
    return found


@torch.no_grad()
def test_significance_is_the_papers_sum_over_paths_through_heads() -> None:
    model = opened(double=True)
    first, second, third = model.blocks
    x0_BND = torch.randn(18, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x1_BND = first(x0_BND)
    x2_BND = second(x1_BND)
    answer, kept = [0], [0, 3, 5]  # what leaves the last block, and the one before it
    start_BNN = torch.diag(torch.eye(6, dtype=torch.float64)[0]).expand(18, -1, -1)
    impact_BNN, score_1 = significance(second, third, x1_BND, x2_BND, start_BNN, answer)
    _, score_0 = significance(first, second, x0_BND, x1_BND, impact_BNN, kept)

    p0, p1, p2 = (attention_of(block, x) for block, x in zip(model.blocks, (x0_BND, x1_BND, x2_BND), strict=True))
    m1, m2 = (np.diag([float(position in positions) for position in range(6)]) for positions in (kept, answer))
    wanted_0, wanted_1 = np.zeros(6), np.zeros(6)
    for image in range(18):
        gathered_0 = sum(((p0[image, h] @ np.abs(first.norm1(x0_BND)[image].numpy())) ** 2).sum(1) for h in range(2))
        gathered_1 = sum(((p1[image, h] @ np.abs(second.norm1(x1_BND)[image].numpy())) ** 2).sum(1) for h in range(2))
        for h2 in range(2):
            wanted_1 += ((m2 @ p2[image, h2]) ** 2).sum(0) * gathered_1 / 18
        for h2, h1 in itertools.product(range(2), range(2)):
            wanted_0 += ((m2 @ p2[image, h2] @ m1 @ p1[image, h1]) ** 2).sum(0) * gathered_0 / 18
    # A mean over heads at each step is the sum over paths, but for a factor that all tokens share.
    np.testing.assert_allclose(score_1.numpy() * 2, wanted_1, rtol=1e-10)
    np.testing.assert_allclose(score_0.numpy() * 4, wanted_0, rtol=1e-10)


@pytest.mark.parametrize("token", [True, False])
def test_positions_narrow_on_a_straight_line_and_are_nested(token: bool) -> None:
    chosen = choose(opened(token), images(20), 0.25, 0.0, 4)
    prefix = 1 + token
    assert [len(kept) - prefix for kept in chosen.kept] == [10, 4, 0] and len(chosen.errors) == 2
    for shallow, deep in itertools.pairwise(chosen.kept):
        assert set(deep) <= set(shallow) and shallow == sorted(set(shallow)) and shallow[:prefix] == [*range(prefix)]
    assert local_positions([[0, 2, 5, 7], [0, 5], [0]]) == [[0, 2, 5, 7], [0, 2], [0]]


def with_registers() -> Any:
    """As `opened`, with a class token and two registers before its 16 patch tokens."""
    torch.manual_seed(0)
    model: Any = VisionTransformer(16, 4, num_classes=3, embed_dim=16, depth=3, num_heads=2, reg_tokens=2)
    for tensor in model.parameters():
        if tensor.ndim > 1:
            nn.init.normal_(tensor, std=0.3)
    open_attention(model)
    return model.eval()


@pytest.mark.parametrize("registers", [0, 2])
def test_the_most_significant_positions_for_the_answer_are_the_ones_that_are_kept(registers: int) -> None:
    model, x_BCHW, prefix = with_registers() if registers else opened(), images(20), 1 + registers
    chosen = choose(model, x_BCHW, 0.25, 0.0, 4)
    with torch.no_grad():
        tokens = [model.patch_drop(model._pos_embed(model.patch_embed(x_BCHW)))]
        for block in model.blocks:
            tokens.append(block(tokens[-1]))
        # The answer is read off the class token alone: what registers gather in the last block goes nowhere.
        start_BNN = torch.diag(torch.eye(prefix + 16)[0]).expand(20, -1, -1)
        _, score_N = significance(model.blocks[1], model.blocks[2], tokens[1], tokens[2], start_BNN, [0])
    best = {prefix + int(i) for i in score_N[prefix:].argsort(descending=True)[:4]}
    assert set(chosen.kept[1]) == {*range(prefix), *best}


def test_a_tolerance_is_kept_or_all_positions_are() -> None:
    for tolerance in (0.05, 0.3, 0.9):
        chosen = choose(opened(), images(20), None, tolerance, 4)
        assert all(error <= tolerance for error in chosen.errors)
    assert [len(kept) for kept in choose(opened(), images(20), None, 1e-12, 3).kept] == [17, 17, 1]
    strict, loose = (sum(map(len, choose(opened(), images(20), None, tolerance, 1).kept)) for tolerance in (0.02, 0.8))
    assert strict > loose


@torch.no_grad()
def test_the_change_of_a_block_is_that_of_its_keys() -> None:
    block = opened(double=True).blocks[0]
    x_BND = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out_BND = block(x_BND)
    assert change_of_block(block, x_BND, out_BND, [0, 1, 2, 3, 4], [0, 2]) < 1e-12
    given, kept = [0, 2, 4], [0, 2]
    found = block(x_BND[:, given])[:, :2]
    wanted = float((found - out_BND[:, kept]).norm() / (out_BND[:, kept] - x_BND[:, kept]).norm())
    assert change_of_block(block, x_BND, out_BND, given, kept) == pytest.approx(wanted, rel=1e-9) and wanted > 1e-3


@pytest.mark.parametrize("token", [True, False])
def test_keeping_all_positions_changes_no_answer(token: bool) -> None:
    plain = vit(token)
    compressed = apply(copy.deepcopy(plain), keep=1)
    with torch.no_grad():
        torch.testing.assert_close(compressed.model(images()), plain(images()), rtol=0, atol=1e-5)
    prefix = 1 + token
    # Of the last block's tokens only those that answer go on to its MLP.
    assert compressed.notes["kept"] == [prefix + 16, prefix + 16, prefix] and compressed.notes["errors"] == pytest.approx([0, 0], abs=1e-4)
    assert compressed.notes["tokens"][-1] == {"attention": prefix + 16, "mlp": prefix} and compressed.notes["macs"]["share"] < 1


def test_the_model_computes_blocks_on_the_positions_that_were_chosen() -> None:
    plain, x_BCHW = opened(), images(20)
    kept = choose(plain, torch.from_numpy(context().sample(20)[0]), 0.25, 0.0, 4).kept
    slim = apply(vit(), keep=0.25).model
    with torch.no_grad():
        x_BND, now = plain._pos_embed(plain.patch_embed(x_BCHW)), list(range(17))
        for block, after in zip(plain.blocks, kept, strict=True):
            x_BND = x_BND + block.attn(block.norm1(x_BND))
            x_BND = x_BND[:, [now.index(position) for position in after]]
            x_BND, now = x_BND + block.mlp(block.norm2(x_BND)), after
        wanted_BC = plain.forward_head(plain.norm(x_BND))
        torch.testing.assert_close(slim(x_BCHW), wanted_BC, rtol=0, atol=1e-5)


def test_notes_and_a_second_time() -> None:
    results = [apply(vit(), tolerance=0.3, granularity=2) for _ in range(2)]
    notes = results[0].notes
    assert notes["images"] == 20 and notes["keep"] is None and notes["tolerance"] == 0.3 and notes["seconds"] >= 0
    json.dumps(notes, allow_nan=False)
    states = [list(result.model.state_dict().values()) for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    with pytest.raises(UsageError, match="one whose tokens are reduced"):
        apply(results[0].model)


@pytest.mark.parametrize("token", [True, False])
def test_gradients_reach_every_weight(token: bool) -> None:
    assert_gradients_reach_all(apply(vit(token)).model)


def test_the_exported_file_answers_as_the_model(tmp_path: Path) -> None:
    assert_file_answers_as(apply(vit(token=True)).model, tmp_path)


@pytest.mark.parametrize("token", [True, False])
def test_it_comes_back_from_its_checkpoint(token: bool, tmp_path: Path) -> None:
    compressed = apply(vit(token), keep=0.3)
    again: Any = assert_comes_back("patch_slimming", compressed, token, tmp_path)
    saved: Any = compressed.model
    for block, wanted in zip(again.blocks, saved.blocks, strict=True):
        assert torch.equal(block.between.positions, wanted.between.positions) and block.between.positions.dtype == torch.int64


def test_what_it_refuses() -> None:
    from timm.layers import PatchDropout

    with pytest.raises(UsageError, match="found ResNet"):
        apply(made.teacher_model())
    model: Any = apply(vit()).model
    model.patch_drop = PatchDropout(0.5)
    with pytest.raises(UsageError, match="set patch_drop: 0") as caught:
        model.train()(images(2))
    assert "\n" not in str(caught.value)
    broken = vit()
    with torch.no_grad():
        broken.blocks[1].mlp.fc2.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="finite features"):
        apply(broken)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"keep": 0}, "greater than 0"),
        ({"keep": 1.1}, "less than or equal to 1"),
        ({"tolerance": 1}, "less than 1"),
        ({"keep": 0.5, "tolerance": 0.1}, "keep or tolerance, not both"),
        ({"granularity": 2}, "no granularity without a tolerance"),
        ({"images": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"patch_slimming": config}]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)
