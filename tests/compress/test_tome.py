"""Token merging: the matching against one written out in numpy, and what must not change when tokens merge, in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from tests.compress.reducing import (
    DEPTH,
    OPTIONS,
    PATCHES,
    SIZE,
    assert_comes_back,
    assert_file_answers_as,
    assert_gradients_reach_all,
    context,
    images,
    vit,
)
from vitedge.compress import Compressed, tome
from vitedge.compress._tome import TokenMerging, match, merge, merge_tokens_, schedule
from vitedge.errors import FileProblems, UsageError
from vitedge.models.attention import Attended, open_attention
from vitedge.models.build import create
from vitedge.models.quantized import quantized_layer
from vitedge.models.reducing_block import token_counts
from vitedge.recipe import recipe_from_plain


def apply(model: nn.Module, **config: Any) -> Compressed:
    return tome.apply(model, tome.Config(**config), context())


def through(blocks: Any, x_BND: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out_BND: torch.Tensor = blocks(x_BND)
    return out_BND


def reference(x_ND: np.ndarray, size_N: np.ndarray, keys_HNK: np.ndarray, prefix: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    """Bipartite soft matching and merging of one image's tokens, step by step as the paper describes it."""
    metric = keys_HNK.mean(0)[prefix:]
    metric = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    first, second = range(0, len(metric), 2), range(1, len(metric), 2)
    edges = []
    for i in first:
        similarities = {j: float(metric[i] @ metric[j]) for j in second}
        best = max(similarities, key=lambda j: similarities[j])
        edges.append((similarities[best], i, best))
    merging = sorted(edges, reverse=True)[:r]
    groups = {j: [j] for j in second}
    for _, i, j in merging:
        groups[j].append(i)
    gone = {i for _, i, _ in merging}
    members = [[n] for n in range(prefix)] + [[prefix + i] for i in first if i not in gone]
    members += [[prefix + n for n in groups[j]] for j in second]
    sizes = np.array([size_N[group].sum() for group in members])
    means = np.stack([(x_ND[group] * size_N[group, None]).sum(0) / size_N[group].sum() for group in members])
    return means, sizes


@given(st.integers(2, 13), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.integers(0, 10**6), st.data())
@settings(max_examples=60, deadline=None)
def test_merging_is_the_papers(patches: int, prefix: int, heads: int, first_time: bool, seed: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, patches // 2))
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + patches
    x_BND = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    keys_BHNK = torch.randn(2, heads, tokens, 4, generator=generator, dtype=torch.float64)
    size_BN1 = torch.randint(1, 6, (2, tokens, 1), generator=generator).double()
    if first_time:
        size_BN1 = torch.ones_like(size_BN1)
    found, sizes = TokenMerging(r, prefix)(x_BND, None if first_time else size_BN1, Attended(x_BND, keys_BHNK, None))
    assert found.shape == (2, tokens - r, 5) and sizes.shape == (2, tokens - r, 1)
    for image in range(2):
        means, wanted = reference(x_BND[image].numpy(), size_BN1[image, :, 0].numpy(), keys_BHNK[image].numpy(), prefix, r)
        np.testing.assert_allclose(found[image].numpy(), means, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(sizes[image, :, 0].numpy(), wanted)
    np.testing.assert_allclose(found[:, :prefix].numpy(), x_BND[:, :prefix].numpy(), rtol=1e-15)
    assert torch.equal(sizes.sum(1), size_BN1.sum(1))


def test_a_token_of_some_size_is_attended_to_as_so_many_copies() -> None:
    model = vit().double()
    open_attention(model)
    attention = model.blocks[0].attn
    x_BND = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size_N = torch.tensor([1, 3, 2, 1, 4])
    with torch.no_grad():
        found = attention.attend(x_BND, size_N.double().log().expand(2, -1)).out_BND
        copies = attention.attend(x_BND.repeat_interleave(size_N, dim=1)).out_BND
        without = attention.attend(x_BND).out_BND
    firsts = [0, 1, 4, 6, 7]
    torch.testing.assert_close(found, copies[:, firsts], rtol=0, atol=1e-12)
    assert float((without - found).abs().max()) > 1e-3


@pytest.mark.parametrize("r", [1, 3, 4])
def test_merging_twins_changes_nothing_where_attention_is_proportional(r: int) -> None:
    """Four pairs of equal patches: one of each pair merges into the other, and the class token sees what it saw."""
    patches_BTD = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prefix_BPD = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_BND = torch.cat([prefix_BPD, patches_BTD.repeat_interleave(2, dim=1)], 1)
    plain = vit(token=True).double()
    found = {}
    for proportional in (True, False):
        merging: Any = merge_tokens_(copy.deepcopy(plain), [r, 0, 0], proportional)
        found[proportional] = through(merging.blocks, x_BND)
        assert found[proportional].shape == (3, 10 - r, 16)
    wanted = through(plain.blocks, x_BND)
    torch.testing.assert_close(found[True][:, :2], wanted[:, :2], rtol=0, atol=1e-10)
    assert float((found[False][:, :2] - wanted[:, :2]).abs().max()) > 1e-5


@pytest.mark.parametrize("token", [True, False])
def test_blocks_that_merge_nothing_are_the_plain_ones(token: bool) -> None:
    plain = vit(token)
    wrapped: Any = merge_tokens_(copy.deepcopy(plain), [0] * DEPTH, True)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(images()), plain(images()), rtol=0, atol=1e-6)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in wrapped.named_children()] == [name for name, _ in plain.named_children()]
    assert not any(module.training for module in wrapped.modules())


@given(st.integers(0, 200), st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_a_schedule_deals_out_its_total(total: int, blocks: int) -> None:
    for kind in ("constant", "decreasing"):
        shares = schedule(total, blocks, kind)
        assert sum(shares) == total and min(shares) >= 0 and len(shares) == blocks
        steepness = 2 / (blocks - 1) if kind == "decreasing" and blocks > 1 else 0.0
        start = 2.0 if steepness else 1.0
        ideal = [total / blocks * (start - steepness * index) for index in range(blocks)]
        assert all(abs(share - wanted) <= 1 + 1e-9 for share, wanted in zip(shares, ideal, strict=True))


@pytest.mark.parametrize(
    ("config", "asked", "merged"),
    [
        ({}, [8, 8, 8], [8, 4, 2]),
        ({"r": 3}, [3, 3, 3], [3, 3, 3]),
        ({"r": 4, "schedule": "decreasing"}, [8, 4, 0], [8, 4, 0]),
        ({"r": 8, "blocks": (1,)}, [0, 8, 0], [0, 8, 0]),
        ({"keep": 0.5}, [3, 2, 3], [3, 2, 3]),
        ({"keep": 0.5, "blocks": (2, 0)}, [4, 0, 4], [4, 0, 4]),
    ],
)
@pytest.mark.parametrize("token", [True, False])
def test_how_many_merge_where(config: dict[str, Any], asked: list[int], merged: list[int], token: bool) -> None:
    model = vit(token)
    notes = apply(model, **config).notes
    assert notes["asked"] == asked and notes["merged"] == merged
    attention = [1 + token + PATCHES - sum(merged[:block]) for block in range(DEPTH)]
    mlp = [1 + token + PATCHES - sum(merged[: block + 1]) for block in range(DEPTH)]
    assert notes["tokens"] == [{"attention": a, "mlp": m} for a, m in zip(attention, mlp, strict=True)]
    assert notes["macs"]["after"] < notes["macs"]["before"] and 0 < notes["macs"]["share"] < 1
    json.dumps(notes)


def test_autocast_does_not_round_what_merges() -> None:
    generator = torch.Generator().manual_seed(3)
    x_BND, keys_BHNK = torch.randn(2, 9, 16, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    merging, attended = TokenMerging(3, 1), Attended(x_BND, keys_BHNK, None)
    wanted, _ = merging(x_BND, None, attended)
    with torch.autocast("cpu", torch.bfloat16):
        found, sizes = merging(x_BND, None, attended)
    assert torch.equal(found, wanted) and found.dtype == sizes.dtype == torch.float32


def test_equal_similarities_go_to_the_first() -> None:
    """All of the second set are alike: PyTorch, as ONNX, takes the first of them."""
    twins_BHNK = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]]])
    assert match(twins_BHNK, 1, 2).into_Br.tolist() == [[0, 0]]


def test_keys_of_no_length_do_not_spoil_anything() -> None:
    x_BND = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    summed = merge(x_BND, 1, match(torch.zeros(1, 2, 5, 4), 1, 1))
    assert summed.shape == (1, 4, 3) and summed.isfinite().all()


@pytest.mark.parametrize("token", [True, False])
def test_gradients_reach_every_weight(token: bool) -> None:
    assert_gradients_reach_all(apply(vit(token), r=3).model)
    model = apply(vit(token), r=8).model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out_BC = model(images(6))
    out_BC.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_goes_with_patch_drop_and_with_narrower_heads() -> None:
    from timm.layers import PatchDropout

    model = vit()
    open_attention(model)
    attention = model.blocks[1].attn
    attention.qkv, attention.proj = nn.Linear(16, 2 * (2 * 4 + 8)), nn.Linear(16, 16)
    attention.key_dim = 4
    apply(model, r=3)
    assert token_counts(model, (3, SIZE, SIZE)) == [(17, 14), (14, 11), (11, 8)]
    model.patch_drop = PatchDropout(0.75)
    assert model.train()(images(2)).shape == (2, 4)  # four patches: two merge, then one, then none


@pytest.mark.parametrize(
    ("token", "config"), [(True, {"r": 8, "blocks": [1], "proportional": False}), pytest.param(False, {"r": 3}, marks=pytest.mark.slow)]
)
def test_the_exported_file_answers_as_the_model(token: bool, config: dict[str, Any], tmp_path: Path) -> None:
    assert_file_answers_as(apply(vit(token), **config).model, tmp_path)


@pytest.mark.parametrize("token", [True, False])
def test_it_comes_back_from_its_checkpoint(token: bool, tmp_path: Path) -> None:
    plain = vit(token)
    compressed = apply(copy.deepcopy(plain), keep=0.4, schedule="decreasing", proportional=token)
    again: Any = assert_comes_back("tome", compressed, token, tmp_path)
    assert again.blocks[0].proportional == token
    with torch.no_grad():
        assert float((again(images()) - plain(images())).abs().max()) > 1e-4


# What it refuses.


def _resnet() -> nn.Module:
    return made.teacher_model()


def _quantized() -> nn.Module:
    model = vit()
    model.blocks[1].mlp.fc2 = quantized_layer(model.blocks[1].mlp.fc2, {"bits": 8}, None)
    return model


def _merging() -> nn.Module:
    return merge_tokens_(vit(), [1, 0, 0], True)


def _without_softmax() -> nn.Module:
    model = vit()
    open_attention(model)
    model.blocks[1].attn.core = nn.Identity()
    return model


def _pooled() -> nn.Module:
    return create("deit_tiny_patch16_224", SIZE, 4, 4, options={**OPTIONS, "global_pool": "avg"})


def _of_other_blocks() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=SIZE, patch_size=4, num_classes=4, embed_dim=16, depth=3, num_heads=2, block_fn=ResPostBlock
    )
    return model


@pytest.mark.parametrize(
    ("broken", "config", "message"),
    [
        (_resnet, {}, "tome: expected a timm ViT or DeiT, found ResNet"),
        (_quantized, {}, "found a quantized one; put `tome` before the step that quantizes"),
        (_merging, {}, "found one whose tokens are reduced"),
        (_without_softmax, {}, "expected softmax attention, found Identity in blocks.1.attn"),
        (_pooled, {}, "found global_pool 'avg'"),
        (_of_other_blocks, {}, "found ResPostBlock as blocks.0"),
        (vit, {"blocks": [3]}, "tome.blocks: expected blocks of the model, 0 to 2, found 3"),
        (vit, {"keep": 0.2, "blocks": [1]}, "found 0.2, where 8 are left"),
        (vit, {"keep": 0.99}, "found 0.99, where 16 are left"),
    ],
)
def test_what_it_refuses_in_one_line(broken: Callable[[], nn.Module], config: dict[str, Any], message: str) -> None:
    model = broken()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UsageError) as caught:
        apply(model, **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "greater than or equal to 1"),
        ({"keep": 1}, "less than 1"),
        ({"keep": 0}, "greater than 0"),
        ({"r": 4, "keep": 0.5}, "r or keep, not both"),
        ({"blocks": []}, "at least 1"),
        ({"blocks": [-1]}, "greater than or equal to 0"),
        ({"blocks": [1, 1]}, "each block once"),
        ({"schedule": "falling"}, "'constant' or 'decreasing'"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"tome": config}]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)
