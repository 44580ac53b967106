"""Scores of units against their definitions, computed again: finite differences, closed forms, weights put to zero one by one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from tests.compress import made, pruning
from tests.compress.pruning import vit, zero_
from vitedge.compress._prune_scores import divergence, magnitude, taylor, weights_per_unit
from vitedge.compress._prune_units import STREAM, find_places, stream, unit_sums
from vitedge.errors import InputError

KINDS = tuple(pruning.SIZES)
D = pruning.HEAD_DIM
# Some units of each kind, (unit,) or (head, unit).
SOME: dict[str, tuple[tuple[int, ...], ...]] = {
    "heads": ((0,), (1,)),
    "key_dims": ((0, 3), (1, 7)),
    "value_dims": ((0, 0), (1, 5)),
    "mlp": ((0,), (40,)),
    "qkv_input": ((2,), (15,)),
}


def weights_of(model: Any, block: int, kind: str, unit: tuple[int, ...]) -> list[torch.Tensor]:
    """Views of all weights of a unit: rows with their biases, and columns."""
    attn, mlp = model.blocks[block].attn, model.blocks[block].mlp
    if kind == "mlp":
        return [mlp.fc1.weight[unit[0]], mlp.fc1.bias[unit[0] : unit[0] + 1], mlp.fc2.weight[:, unit[0]]]
    if kind == "qkv_input":
        return [attn.qkv.weight[:, unit[0]]]
    if kind == "heads":
        rows = [part * 16 + unit[0] * D + dim for part in range(3) for dim in range(D)]
        columns = [unit[0] * D + dim for dim in range(D)]
    else:
        at = unit[0] * D + unit[1]
        rows, columns = ([at, 16 + at], []) if kind == "key_dims" else ([32 + at], [at])
    found = [view for row in rows for view in (attn.qkv.weight[row], attn.qkv.bias[row : row + 1])]
    return found + [attn.proj.weight[:, column] for column in columns]


def loss(model: nn.Module, images: slice) -> float:
    batch = made.batch(range(40))
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(batch.x_BCHW.double()[images]), batch.target[images]))


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_is_the_root_mean_square_of_all_weights_of_a_unit(kind: str) -> None:
    model = vit()
    places = find_places(model, [kind])
    found = magnitude(model, places)
    for block, place in enumerate(places):
        counts = weights_per_unit(model, place)
        for unit in SOME[kind]:
            values = torch.cat([view.detach() for view in weights_of(model, block, kind, unit)])
            assert float(found[place][unit]) == pytest.approx(float(values.square().mean().sqrt()), rel=1e-12)
            assert float(counts[unit]) == len(values)


def test_a_channel_of_the_stream_has_its_weights_in_every_block() -> None:
    model: Any = vit(init_values=0.5)
    (place,) = find_places(model, ["skip"])
    assert place == STREAM
    counts = weights_per_unit(model, place)
    along = sum(getattr(owner, name).numel() for owner, name, _ in stream(model))
    assert counts.unique().numel() == 1 and float(counts.sum()) == along
    values = unit_sums(model, place, lambda weight: weight.detach())
    expected = model.patch_embed.proj.weight[5].sum() + model.patch_embed.proj.bias[5] + model.cls_token[..., 5].sum()
    expected = expected + model.pos_embed[..., 5].sum() + model.norm.weight[5] + model.norm.bias[5] + model.head.weight[:, 5].sum()
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        expected = expected + attn.qkv.weight[:, 5].sum() + attn.proj.weight[5].sum() + attn.proj.bias[5]
        expected = expected + mlp.fc1.weight[:, 5].sum() + mlp.fc2.weight[5].sum() + mlp.fc2.bias[5] + block.ls1.gamma[5]
        expected = expected + block.ls2.gamma[5] + sum(n.weight[5] + n.bias[5] for n in (block.norm1, block.norm2))
    torch.testing.assert_close(values[5], expected.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_taylor_is_the_square_of_what_the_loss_changes_by(kind: str) -> None:
    """Equation 4 by central differences: all weights of a unit are scaled at once; the mean over batches of 32 and of 8 images."""
    model = vit()
    places = find_places(model, [kind])
    batch = made.batch(range(40))
    found = taylor(model, places, batch.x_BCHW, batch.target)
    step = 1e-5
    for block, place in enumerate(places):
        for unit in SOME[kind]:
            squares = []
            for images in (slice(0, 32), slice(32, 40)):
                losses = []
                for factor in (1 + step, 1 - step):
                    changed = copy.deepcopy(model)
                    with torch.no_grad():
                        for view in weights_of(changed, block, kind, unit):
                            view.mul_(factor)
                    losses.append(loss(changed, images))
                squares.append(((losses[0] - losses[1]) / (2 * step)) ** 2)
            assert float(found[place][unit]) == pytest.approx(np.mean(squares), rel=1e-3, abs=1e-14)
    assert all(parameter.grad is None for parameter in model.parameters())


class Linear(nn.Module):
    """A classifier that is two linear layers, in the names of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.norm1 = self.block.norm2 = self.block.attn = nn.Identity()
        self.block.mlp = nn.Module()
        self.block.mlp.fc1, self.block.mlp.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)
        self.double()

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        """(B, 3) to (B, 2)."""
        return self.block.mlp.fc2(self.block.mlp.fc1(x_BI))


def test_taylor_of_a_linear_model_in_closed_form() -> None:
    """With h = W1 x + b1 and d = softmax - onehot, a hidden unit's weights times their gradients add up to 2 d W2_j h_j."""
    torch.manual_seed(0)
    model = Linear()
    x_BI, target = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    found = taylor(model, [("block", "mlp")], x_BI, target)["block", "mlp"]
    mlp: Any = model.block.mlp
    w1, b1, w2, b2 = (p.detach().numpy() for p in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias))
    hidden = x_BI.numpy() @ w1.T + b1
    logits = hidden @ w2.T + b2
    d = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)[target.numpy()]
    expected = (2 * (d @ w2 * hidden).mean(0)) ** 2
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def kl(model: Any, other: Any, count: int) -> float:
    """Sum over images of KL(answer of `model` || answer of `other`), written out."""
    p, q = (pruning.answers(each, count).softmax(-1).numpy() for each in (model, other))
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_that_of_leaving_a_unit_out(kind: str) -> None:
    """Equation 5 by brute force, for a few units of each block; more images than one forward pass takes."""
    model = vit()
    before = copy.deepcopy(model.state_dict())
    places = find_places(model, [kind])
    found = divergence(model, places, made.batch(range(40)).x_BCHW, group=1)
    for block, place in enumerate(places):
        for unit in SOME[kind]:
            without = copy.deepcopy(model)
            zero_(without, block, kind, unit)
            assert float(found[place][unit]) == pytest.approx(kl(without, model, 40), rel=1e-8, abs=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["mlp", "value_dims"])
def test_units_left_out_together_share_what_that_costs(kind: str) -> None:
    """Groups go by magnitude; shares by its square."""
    model = vit()
    places = find_places(model, [kind])
    found = divergence(model, places, made.batch(range(6)).x_BCHW, group=5)
    for block, place in enumerate(places):
        size = magnitude(model, places)[place].flatten().numpy()
        score = found[place].flatten().numpy()
        order = np.argsort(size)
        for start in (0, 5, len(order) - len(order) % 5):  # the last is smaller: 64 and 16 are no multiples of 5
            group = order[start : start + 5]
            without = copy.deepcopy(model)
            for unit in group:
                zero_(without, block, kind, (int(unit),) if kind == "mlp" else (int(unit) // D, int(unit) % D))
            cost = kl(without, model, 6)
            np.testing.assert_allclose(score[group], cost * size[group] ** 2 / (size[group] ** 2).sum(), rtol=1e-8, atol=1e-13)


def test_scores_leave_modes_as_they_were() -> None:
    model = vit().train()
    model.blocks[1].eval()
    places = find_places(model, ["mlp"])
    batch = made.batch()
    taylor(model, places, batch.x_BCHW, batch.target)
    divergence(model, places, batch.x_BCHW, 64)
    assert model.training and model.blocks[0].mlp.training and not model.blocks[1].mlp.training


def test_a_score_that_is_not_finite_is_refused() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[3] = float("nan")
    batch = made.batch()
    places = find_places(model, ["mlp"])
    for score in (lambda: taylor(model, places, batch.x_BCHW, batch.target), lambda: divergence(model, places, batch.x_BCHW, 16)):
        with pytest.raises(InputError, match=r"prune: mlp of blocks\.[01]: expected finite scores"):
            score()
