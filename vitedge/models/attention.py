"""timm's attention with its two products laid open, for techniques that change what goes into them or comes out.

Shapes: B batch, N tokens, D embed_dim, H heads, K head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitedge.errors import UsageError


class OpenAttention(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Softmax attention as timm computes it, with a module at every point where a technique may act.

    The layers are those of the attention it is made from, under the same names, so that its weights keep theirs.

    Args:
        attention: timm's.

    Attributes:
        on_query, on_key, on_value: Take what goes into the products: BHNK, scaled already; BHKN, for a transposition between
            rounding and product is what ONNX Runtime 1.31 fails to load where the integers are signed; BHNK.
        softmax: Makes weights out of scores, BHNN.
        on_weights: Takes the weights, BHNN.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        self.on_query: nn.Module = nn.Identity()
        self.on_key: nn.Module = nn.Identity()
        self.on_value: nn.Module = nn.Identity()
        self.on_weights: nn.Module = nn.Identity()
        self.softmax: nn.Module = nn.Softmax(dim=-1)

    def forward(self, x_BND: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attended tokens, BND; timm's signature.

        Raises:
            ValueError: A mask, which image models have none of.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention without a mask")
        batch, tokens, _ = x_BND.shape
        qkv = self.qkv(x_BND).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q_BHNK, k_BHNK, v_BHNK = qkv.unbind(0)
        q_BHNK, k_BHKN = self.on_query(self.q_norm(q_BHNK) * self.scale), self.on_key(self.k_norm(k_BHNK).transpose(-2, -1))
        weights_BHNN = self.on_weights(self.attn_drop(self.softmax(q_BHNK @ k_BHKN)))
        out_BND = (weights_BHNN @ self.on_value(v_BHNK)).transpose(1, 2).reshape(batch, tokens, -1)
        out: torch.Tensor = self.proj_drop(self.proj(self.norm(out_BND)))
        return out


def open_attention(model: nn.Module) -> list[str]:
    """Replace timm's attention in every block by `OpenAttention`, in place; what is open already stays.

    Returns:
        Names of the attention modules, in order.

    Raises:
        UsageError: The model has no attention of timm's `VisionTransformer`, or one that is gated.
    """
    from timm.models.vision_transformer import Attention

    names = [name for name, module in model.named_modules() if isinstance(module, (Attention, OpenAttention))]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(name)
        if isinstance(module, OpenAttention):
            continue
        if getattr(module, "gate", None) is not None:
            raise UsageError("model", expected="attention without a gate", found=f"a gate in {name}", fix="choose another architecture")
        setattr(model.get_submodule(parent), leaf, OpenAttention(module).train(module.training))
    if not names:
        raise UsageError("model", expected="a timm ViT or DeiT", found=type(model).__name__, fix="choose one as model.arch")
    return names
