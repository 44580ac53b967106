"""timm's attention laid open, for techniques that change what goes into its products, what comes out, or how tokens attend at all.

Shapes: B batch, N tokens, D embed_dim, H heads, K width of a head's queries and keys, V width of its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitedge.errors import UsageError


@dataclass(frozen=True)
class Attended:
    """What attention gives, and what it went by.

    Attributes:
        out_BND: The attended tokens, after the output projection.
        keys_BHNK: Keys, normalized where the model does that.
        weights_BHNN: The weights, a row for each query; None where a core made none.
    """

    out_BND: torch.Tensor
    keys_BHNK: torch.Tensor
    weights_BHNN: torch.Tensor | None


class OpenAttention(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Softmax attention as timm computes it, with a module at every point where a technique may act.

    The layers are those of the attention it is made from, under the same names, so that its weights keep theirs. Heads need not
    be as many, nor as wide, as the architecture has them: what `qkv` gives is queries, keys and values, in heads.

    Args:
        attention: timm's.

    Attributes:
        num_heads, key_dim, value_dim: H, K and V. `qkv` has H (2 K + V) output features and `proj` H V input features.
        scale: What queries are multiplied by; that of the architecture, also where K is smaller than it was.
        on_query, on_key, on_value: Take what goes into the products: BHNK, scaled already; BHKN, for a transposition between
            rounding and product is what ONNX Runtime 1.31 fails to load where the integers are signed; BHNV.
        softmax: Makes weights out of scores, BHNN.
        on_weights: Takes the weights, BHNN.
        core: Attends in the place of softmax: called with scaled queries BHNK, keys BHNK and values BHNV, it gives BHNV.
            None for softmax, whose points of action are the ones above.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim = attention.num_heads, attention.head_dim, attention.head_dim
        self.scale: float = attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        self.on_query: nn.Module = nn.Identity()
        self.on_key: nn.Module = nn.Identity()
        self.on_value: nn.Module = nn.Identity()
        self.on_weights: nn.Module = nn.Identity()
        self.softmax: nn.Module = nn.Softmax(dim=-1)
        self.core: nn.Module | None = None

    def forward(self, x_BND: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attended tokens, BND; timm's signature.

        Raises:
            ValueError: A mask, which image models have none of.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention without a mask")
        return self.attend(x_BND).out_BND

    def attend(self, x_BND: torch.Tensor, bias_BN: torch.Tensor | None = None) -> Attended:
        """As `forward`, with what it went by.

        Args:
            x_BND: Tokens.
            bias_BN: Added to every query's score of a key, as the logarithm of the number of tokens it stands for.

        Raises:
            ValueError: A bias where a core attends.
        """
        batch, tokens, _ = x_BND.shape
        q_BHNK, k_BHNK, v_BHNV = self._heads(self.qkv(x_BND), batch, tokens)
        q_BHNK, k_BHNK = self.q_norm(q_BHNK) * self.scale, self.k_norm(k_BHNK)
        weights_BHNN = None
        if self.core is not None:
            if bias_BN is not None:
                raise ValueError("a bias needs softmax attention")
            out_BHNV = self.core(q_BHNK, k_BHNK, v_BHNV)
        else:
            scores_BHNN = self.on_query(q_BHNK) @ self.on_key(k_BHNK.transpose(-2, -1))
            if bias_BN is not None:
                # What is the same for all keys of a query leaves softmax as it is, so that a query's own bias may be taken away. It makes
                # the summand a full matrix: OpenVINO 2026.4 answers nonsense, silently, where one row is added to the scores of
                # 8-bit queries and keys at batch 1.
                scores_BHNN = scores_BHNN + (bias_BN[:, None, None, :] - bias_BN[:, None, :, None])
            weights_BHNN = self.on_weights(self.attn_drop(self.softmax(scores_BHNN)))
            out_BHNV = weights_BHNN @ self.on_value(v_BHNV)
        out_BND = self.proj_drop(self.proj(self.norm(out_BHNV.transpose(1, 2).reshape(batch, tokens, -1))))
        return Attended(out_BND, k_BHNK, weights_BHNN)

    def _heads(self, qkv_BND: torch.Tensor, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, BHNK, BHNK and BHNV."""
        heads = self.num_heads
        if self.key_dim == self.value_dim:  # timm's own operations, whose pattern runtimes know
            q, k, v = qkv_BND.reshape(batch, tokens, 3, heads, self.key_dim).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        parts = qkv_BND.split([heads * self.key_dim, heads * self.key_dim, heads * self.value_dim], dim=-1)
        q, k, v = (part.reshape(batch, tokens, heads, -1).transpose(1, 2) for part in parts)
        return q, k, v


def open_attention(model: nn.Module) -> list[str]:
    """Replace timm's attention in every block by `OpenAttention`, in place; what is open already stays.

    Returns:
        Names of the attention modules, in order, those with a core of their own included.

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
