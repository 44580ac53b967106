"""DynamicViT: masked training against leaving tokens out, the drawn choice and its loss, and the choice by score out of training."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from vitedge.compress import Compressed, dynamic_vit
from vitedge.compress._dynamic_vit import MASKED, KeepLoss, LearnedSelection, TokenPredictor, kept_by_stage, start
from vitedge.errors import FileProblems, UsageError, VitedgeError
from vitedge.models.reducing_block import wrap_blocks
from vitedge.recipe import recipe_from_plain


def apply(model: nn.Module, **config: Any) -> Compressed:
    return dynamic_vit.apply(model, dynamic_vit.Config(**config), context())


def selections_of(model: nn.Module) -> list[LearnedSelection]:
    return [module for module in model.modules() if isinstance(module, LearnedSelection)]


class Fixed(nn.Module):
    """Masks the same tokens of every image, as a drawn choice does."""

    def __init__(self, mask_N: torch.Tensor) -> None:
        super().__init__()
        self.mask_N = mask_N

    def forward(self, x_BND: torch.Tensor, size_BN1: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return x_BND, (self.mask_N + MASKED * (1 - self.mask_N)).expand(len(x_BND), -1)[..., None]


@pytest.mark.parametrize("token", [True, False])
def test_a_masked_token_is_as_good_as_gone(token: bool) -> None:
    plain: Any = vit(token).double()
    masked = copy.deepcopy(plain)
    prefix = 1 + token
    kept = [*range(prefix), prefix + 1, prefix + 4, prefix + 5, prefix + 11]
    mask_N = torch.zeros(prefix + 16, dtype=torch.float64)
    mask_N[kept] = 1
    wrap_blocks(masked, before={1: Fixed(mask_N)})
    x_BND = torch.randn(3, prefix + 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        found = masked.blocks(x_BND)[:, kept]
        first = plain.blocks[0](x_BND)
        wanted = plain.blocks[2](plain.blocks[1](first[:, kept]))
        unmasked = plain.blocks(x_BND)[:, kept]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    assert float((unmasked - wanted).abs().max()) > 1e-3


def test_a_dropped_tokens_mask_has_the_gradient_of_the_papers_product() -> None:
    """d softmax(s + log m) = d (exp(s) m / sum exp(s) m), at a mask of 0 too."""
    scores_N = torch.tensor([0.3, -1.2, 2.0, 0.1])
    mask_N = torch.tensor([1.0, 0.0, 1.0, 0.0])
    value_N = torch.tensor([1.0, 2.0, -1.0, 0.5])
    ours, papers = (mask_N.clone().requires_grad_() for _ in range(2))
    ((scores_N + (ours + MASKED).log()).softmax(-1) @ value_N).backward()
    product = scores_N.exp() * papers
    (product / product.sum() @ value_N).backward()
    assert ours.grad is not None and papers.grad is not None
    torch.testing.assert_close(ours.grad, papers.grad, rtol=1e-5, atol=1e-7)
    assert (papers.grad[mask_N == 0].abs() > 1e-3).all()


@pytest.mark.parametrize("token", [True, False])
def test_a_choice_is_drawn_in_training_and_is_final(token: bool) -> None:
    compressed = apply(vit(token), blocks=(0, 1, 2), keep=0.5)
    model: Any = compressed.model.train()
    prefix, seen = 1 + token, []
    for block in model.blocks:
        block.before.register_forward_hook(lambda _, inputs, output: seen.append(output[1].detach()))
    torch.manual_seed(5)
    out_BC = model(images(24))
    assert out_BC.shape == (24, 4) and [size.shape for size in seen] == [(24, prefix + 16, 1)] * 3
    masks = [(size > 0.5).squeeze(-1) for size in seen]
    for size, mask in zip(seen, masks, strict=True):
        assert mask[:, :prefix].all() and torch.allclose(size.squeeze(-1), mask.float(), atol=1e-6) and size.min() > 0
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    shares = [float(mask[:, prefix:].float().mean()) for mask in masks]
    # Predictors begin with a bias to keep a half: 24 x 16 draws have a deviation of 3 %.
    assert shares == pytest.approx([0.5, 0.25, 0.125], abs=0.15)


def test_the_same_random_numbers_draw_the_same_choice() -> None:
    model = apply(vit()).model.train()
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model(images(8)).detach())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_predictors_come_from_the_recipes_seed_and_move_no_other_random_numbers() -> None:
    drawn, states = [], []
    for _ in range(2):
        plain = vit()
        torch.manual_seed(len(drawn))  # whatever came before
        drawn.append(apply(plain).model)
        states.append(torch.rand(1))
        torch.manual_seed(len(drawn) - 1)
        assert torch.equal(states[-1], torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0].state_dict().values(), drawn[1].state_dict().values(), strict=True))


@torch.no_grad()
def test_out_of_training_the_highest_scores_stay() -> None:
    selection = LearnedSelection(16, 2, 5).eval()
    x_BND = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(0))
    found, size = selection(x_BND, None)
    assert size is None and found.shape == (3, 7, 16) and torch.equal(found[:, :2], x_BND[:, :2])
    probability = selection.predictor(x_BND[:, 2:], None).softmax(-1)[..., 0].numpy()
    for image in range(3):
        best = 2 + np.argsort(-probability[image])[:5]
        np.testing.assert_array_equal(found[image, 2:].numpy(), x_BND[image, best].numpy())


@torch.no_grad()
def test_the_global_feature_is_of_the_tokens_that_are_left() -> None:
    predictor = TokenPredictor(16).double()
    x_BTD = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = [0, 2, 3]
    policy_BT1 = torch.zeros(2, 7, 1, dtype=torch.float64)
    policy_BT1[:, left] = 1
    torch.testing.assert_close(predictor(x_BTD, policy_BT1)[:, left], predictor(x_BTD[:, left], None), rtol=0, atol=1e-12)
    assert predictor(x_BTD, torch.zeros_like(policy_BT1)).isfinite().all()


def test_the_loss_is_the_squared_distance_from_the_target_once_for_a_forward_pass() -> None:
    compressed = apply(vit(), keep=0.5, weight=3.0)
    model, (loss,) = compressed.model.train(), compressed.losses
    assert compressed.notes["kept"] == kept_by_stage(0.5, 2, 16) == [8, 4] and loss.label_share == 1
    shares: list[torch.Tensor] = []
    for selection in selections_of(model):
        selection.register_forward_hook(lambda _, inputs, output: shares.append((output[1][:, 1:, 0] > 0.5).float().mean(1)))
    outputs = model(images(6))
    found_B = loss(outputs, made.batch())
    wanted_B = 3.0 * ((shares[0] - 0.5).square() + (shares[1] - 0.25).square()) / 2
    torch.testing.assert_close(found_B.detach(), wanted_B, rtol=1e-4, atol=1e-6)
    assert found_B.dtype == torch.float32 and found_B.requires_grad
    with pytest.raises(VitedgeError, match="a forward pass in training mode"):
        loss(outputs, made.batch())


def test_a_model_can_be_copied_between_forward_and_backward() -> None:
    model = apply(vit()).model.train()
    model(images(4)).sum().backward()
    again = copy.deepcopy(model)  # a tensor with a history cannot be
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(VitedgeError, match="a forward pass in training mode"):
        selections_of(again)[0].take_share()
    assert selections_of(model)[0].take_share().shape == (4,)


@pytest.mark.parametrize("token", [True, False])
def test_gradients_reach_every_weight_without_the_loss_too(token: bool) -> None:
    model = apply(vit(token), keep=0.5).model
    assert_gradients_reach_all(model)
    assert all(
        float(p.grad.abs().sum()) > 0 for s in selections_of(model) for n, p in s.predictor.named_parameters() if n.endswith("weight")
    )


def test_autocast_leaves_the_loss_in_float32() -> None:
    compressed = apply(vit())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = compressed.model.train()(images(6))
    total_B = compressed.losses[0](outputs, made.batch())
    (outputs.float().square().sum() + total_B.sum()).backward()
    assert total_B.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressed.model.parameters())


def test_predictors_learn_to_keep_what_is_asked_for() -> None:
    torch.manual_seed(0)
    selection = LearnedSelection(16, 1, 11)
    start(selection.predictor, 0.2, 10.0)
    assert {p.lr_scale for p in selection.parameters()} == {10.0}
    loss, x_BND = KeepLoss([selection], [0.7], 2.0), torch.randn(16, 17, 16)
    optimizer = torch.optim.Adam(selection.parameters(), lr=0.03)
    shares = []
    for _ in range(120):
        _, size_BN1 = selection.train()(x_BND, None)
        shares.append(float(size_BN1[:, 1:].detach().mean()))
        optimizer.zero_grad()
        loss(None, made.batch()).mean().backward()
        optimizer.step()
    assert np.mean(shares[:3]) < 0.4 and np.mean(shares[-10:]) == pytest.approx(0.7, abs=0.12)


@pytest.mark.parametrize("token", [True, False])
def test_how_many_stay_where(token: bool) -> None:
    notes = apply(vit(token)).notes
    prefix = 1 + token
    # 0.7 and 0.49 of 16, before the second block and the third.
    assert notes["kept"] == [11, 7] and notes["blocks"] == [1, 2]
    assert notes["tokens"] == [{"attention": prefix + n, "mlp": prefix + n} for n in (16, 11, 7)]
    assert notes["macs"]["after"] < notes["macs"]["before"]
    json.dumps(notes)
    assert kept_by_stage(0.7, 3, 196) == [137, 96, 67] and kept_by_stage(0.1, 2, 4) == [1, 1]


def test_the_exported_file_answers_as_the_model(tmp_path: Path) -> None:
    assert_file_answers_as(apply(vit(token=True)).model, tmp_path)


@pytest.mark.parametrize("token", [True, False])
def test_it_comes_back_from_its_checkpoint(token: bool, tmp_path: Path) -> None:
    compressed = apply(vit(token), blocks=(0, 2), keep=0.6)
    again = assert_comes_back("dynamic_vit", compressed, token, tmp_path)
    assert [selection.kept for selection in selections_of(again)] == [9, 5]


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="found ResNet"):
        apply(made.teacher_model())
    with pytest.raises(UsageError, match=r"dynamic_vit\.blocks: expected blocks of the model, 0 to 2, found 7"):
        apply(vit(), blocks=(1, 7))
    once = apply(vit()).model
    with pytest.raises(UsageError, match="one whose tokens are reduced"):
        apply(once)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"keep": 1}, "less than 1"),
        ({"weight": 0}, "greater than 0"),
        ({"lr_scale": -1}, "greater than 0"),
        ({"blocks": [0, 0]}, "each block once"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"dynamic_vit": config}, "train"]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)
