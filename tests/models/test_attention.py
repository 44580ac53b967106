"""timm's attention laid open: it computes the same to the bit, and what stands in a slot sees what it is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.compress import made
from vitedge.errors import UsageError
from vitedge.models.attention import OpenAttention, open_attention

# 8 px in patches of 4 are 4 tokens, beside the class's and the distillation's; 2 heads of 8.
HEADS, TOKENS, HEAD_DIM = 2, 6, 8


class Seen(nn.Module):
    """Keeps what it is shown, and gives it on times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x.detach()
        return x * self.factor


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_timm_does(token: bool, training: bool) -> None:
    plain, opened = made.student(token).train(training), made.student(token).train(training)
    assert open_attention(opened) == ["blocks.0.attn", "blocks.1.attn"]
    x_BCHW = made.batch().x_BCHW
    torch.testing.assert_close(opened(x_BCHW), plain(x_BCHW), rtol=0, atol=1e-6)
    assert all(module.training == training for module in opened.modules())


def test_its_weights_keep_their_names_and_values() -> None:
    model = made.student()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    open_attention(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_open_stays_as_it_is() -> None:
    model = made.student()
    open_attention(model)
    first = model.blocks[0].attn
    first.on_value = Seen()
    assert open_attention(model) == ["blocks.0.attn", "blocks.1.attn"]
    assert model.blocks[0].attn is first and isinstance(first.on_value, Seen)


def test_every_slot_sees_its_factor_of_the_products() -> None:
    """With norms of queries and keys as some of timm's models have them; the products are recomputed from what was seen."""
    model = made.student().eval()
    open_attention(model)
    attention: Any = model.blocks[1].attn
    attention.q_norm, attention.k_norm = nn.LayerNorm(HEAD_DIM), nn.LayerNorm(HEAD_DIM)
    slots = {name: Seen() for name in ("on_query", "on_key", "on_value", "on_weights")}
    for name, slot in slots.items():
        setattr(attention, name, slot)
    x_BND = torch.randn(3, TOKENS, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out_BND = attention(x_BND)
        q_BHNK, k_BHKN, v_BHNK, weights_BHNN = (slots[name].x for name in ("on_query", "on_key", "on_value", "on_weights"))
        assert q_BHNK.shape == v_BHNK.shape == (3, HEADS, TOKENS, HEAD_DIM) and k_BHKN.shape == (3, HEADS, HEAD_DIM, TOKENS)
        plain_q_BHNK = attention.qkv(x_BND).reshape(3, TOKENS, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)[0]
        torch.testing.assert_close(q_BHNK, attention.q_norm(plain_q_BHNK) * HEAD_DIM**-0.5)
        torch.testing.assert_close(weights_BHNN, (q_BHNK @ k_BHKN).softmax(-1))
        torch.testing.assert_close(out_BND, attention.proj((weights_BHNN @ v_BHNK).transpose(1, 2).reshape(x_BND.shape)))


@pytest.mark.parametrize("slot", ["on_query", "on_key", "on_value", "on_weights", "softmax"])
def test_what_a_slot_gives_is_what_goes_on(slot: str) -> None:
    model = made.student(False).eval()
    open_attention(model)
    x_BCHW = made.batch().x_BCHW
    with torch.no_grad():
        before_BC = model(x_BCHW)
        setattr(model.blocks[0].attn, slot, Seen(3.0))
        assert float((model(x_BCHW) - before_BC).abs().max()) > 1e-5


def test_gradients_reach_every_weight() -> None:
    model = made.student()
    open_attention(model)
    model(made.batch().x_BCHW).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="expected a timm ViT or DeiT, found ResNet"):
        open_attention(made.teacher_model())
    gated = made.student()
    gated.blocks[1].attn.gate = nn.Linear(16, 16)
    with pytest.raises(UsageError, match=r"a gate in blocks\.1\.attn"):
        open_attention(gated)
    opened = made.student()
    open_attention(opened)
    assert isinstance(opened.blocks[0].attn, OpenAttention)
    for mask in ({"attn_mask": torch.zeros(TOKENS, TOKENS)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="without a mask"):
            opened.blocks[0].attn(torch.zeros(1, TOKENS, HEADS * HEAD_DIM), **mask)
