"""Attention and MLP of a ViT in half the weights: each matrix is used twice, as it is and transposed.

Koyun and Toreyin 2024, "Do Deep Neural Networks Utilize the Weight Space Efficiently?", section 3.1: what lies between the two
uses is not linear, so that the column space and the row space of one matrix do the work of two matrices.
A matrix is one parameter and is owned once; its transpose is a view.
Shapes: B batch, N tokens, D embed_dim, H heads, K width of a head, M hidden width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.models.attention import OpenAttention


class TiedAttention(OpenAttention):
    """Attention of equations 1 and 2: `Q = W_q x, K = W_kv x, V = W_kv^T x`, and `W_q^T` for the output projection.

    It is open attention in all but its layers: it takes a core in the place of softmax, and has the same points of action.
    Its weights are zero until they are set or loaded; it takes over everything else of the attention it is made from.

    Args:
        attention: One whose heads together are as wide as its tokens.
        bias: Whether queries, keys, values and the output keep the biases that they have there; the equations have none.

    Attributes:
        query_weight, key_value_weight: W_q and W_kv, (D, D).
        query_bias, key_bias, value_bias, proj_bias: (D,), or None.
    """

    def __init__(self, attention: OpenAttention, bias: bool = True) -> None:
        nn.Module.__init__(self)  # open attention's own constructor takes timm's
        self.num_heads, self.key_dim, self.value_dim = attention.num_heads, attention.key_dim, attention.value_dim
        self.scale = attention.scale
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        self.on_query, self.on_key, self.on_value = attention.on_query, attention.on_key, attention.on_value
        self.softmax, self.on_weights, self.core = attention.softmax, attention.on_weights, attention.core
        self.qkv = nn.Identity()  # heads are made straight from the tokens: joining the three products first gains nothing
        weight_DD = attention.proj.weight
        self.query_weight = nn.Parameter(torch.zeros_like(weight_DD))
        self.key_value_weight = nn.Parameter(torch.zeros_like(weight_DD))
        qkv_bias, proj_bias = (attention.qkv.bias, attention.proj.bias) if bias else (None, None)
        parts = (None,) * 3 if qkv_bias is None else qkv_bias.chunk(3)
        for name, part in zip(("query_bias", "key_bias", "value_bias", "proj_bias"), (*parts, proj_bias), strict=True):
            self.register_parameter(name, _copied(part))

    def proj(self, out_BND: torch.Tensor) -> torch.Tensor:
        """The output projection, `W_q^T`; in the place of a layer."""
        return F.linear(out_BND, self.query_weight.t(), self.proj_bias)

    def _heads(self, qkv_BND: torch.Tensor, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, BHNK, of the tokens themselves, as `qkv` passes them on."""
        parts = (
            F.linear(qkv_BND, self.query_weight, self.query_bias),
            F.linear(qkv_BND, self.key_value_weight, self.key_bias),
            F.linear(qkv_BND, self.key_value_weight.t(), self.value_bias),
        )
        q, k, v = (part.reshape(batch, tokens, self.num_heads, self.key_dim).transpose(1, 2) for part in parts)
        return q, k, v


class TiedMlp(nn.Module):  # type: ignore[misc]  # the library carries no types
    """The MLP of equation 4, `W^T f(W x + b_1) + b_2`.

    Its weight is zero until it is set or loaded; it takes over everything else of the MLP it is made from.

    Args:
        mlp: timm's, with `fc2.weight` of the shape of `fc1.weight` transposed.

    Attributes:
        weight: W, (M, D).
        fc1_bias, fc2_bias: b_1 (M,) and b_2 (D,), or None.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(mlp.fc1.weight))
        self.register_parameter("fc1_bias", _copied(mlp.fc1.bias))
        self.register_parameter("fc2_bias", _copied(mlp.fc2.bias))
        self.act, self.drop1, self.norm, self.drop2 = mlp.act, mlp.drop1, mlp.norm, mlp.drop2

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """What the block adds to its tokens, BND."""
        hidden_BNM = self.norm(self.drop1(self.act(F.linear(x_BND, self.weight, self.fc1_bias))))
        return self.drop2(F.linear(hidden_BNM, self.weight.t(), self.fc2_bias))


def _copied(bias: torch.Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().clone())
