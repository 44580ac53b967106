"""Which layers of a ViT can share their weights, their replacement, and the first values of what they share.

Shapes: D embed_dim, M hidden width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitedge.errors import UsageError
from vitedge.models.attention import OpenAttention
from vitedge.models.quantized import rounds
from vitedge.models.tied import TiedAttention, TiedMlp

STD = 0.02  # of a ViT's first weights, in timm and in DeiT


def tie_(model: nn.Module, attention: bool, mlp: bool, attention_bias: bool) -> dict[str, TiedAttention | TiedMlp]:
    """Replace the layers of every block in place; returns the new ones by name, their weights zero.

    Args:
        model: A timm ViT, with attention as timm has it or open.
        attention: Replace attention.
        mlp: Replace the MLP.
        attention_bias: Keep the biases of attention.

    Raises:
        UsageError: A layer cannot be shared; then nothing was replaced.
    """
    if rounds(model):
        raise UsageError(
            "shared_vit", expected="a float model", found="a quantized one", fix="put `shared_vit` before the step that quantizes"
        )
    blocks = [n for n, m in model.named_modules() if all(hasattr(m, part) for part in ("norm1", "attn", "norm2", "mlp"))]
    if not blocks:
        raise UsageError(
            "shared_vit",
            expected="a ViT or DeiT, whose blocks have attention and an MLP",
            found=type(model).__name__,
            fix="choose one as model.arch, or use `shared_resnet` for a ResNet",
        )
    names = [f"{block}.{part}" for block in blocks for part, wanted in (("attn", attention), ("mlp", mlp)) if wanted]
    for name in names:
        check = _check_attention if name.endswith("attn") else _check_mlp
        check(name, model.get_submodule(name))
    made = {}
    for name in names:
        old: Any = model.get_submodule(name)
        tied: TiedAttention | TiedMlp
        if name.endswith("attn"):
            tied = TiedAttention(old if isinstance(old, OpenAttention) else OpenAttention(old), attention_bias)
        else:
            tied = TiedMlp(old)
        made[name] = tied.train(old.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, tied)
    return made


def _check_attention(name: str, module: Any) -> None:
    from timm.models.vision_transformer import Attention

    if isinstance(module, TiedAttention):
        raise _shared_already(name)
    if not isinstance(module, (Attention, OpenAttention)):
        raise _refusal(name, "timm's attention", type(module).__name__, "attention: false")
    if getattr(module, "gate", None) is not None:
        raise _refusal(name, "attention without a gate", "a gate", "attention: false")
    for part, layer in (("qkv", module.qkv), ("proj", module.proj)):
        if type(layer) is not nn.Linear:
            raise _refusal(f"{name}.{part}", "a plain linear layer in float", type(layer).__name__, "attention: false")
    width, qkv, proj = module.qkv.in_features, module.qkv, module.proj
    if (qkv.out_features, proj.in_features, proj.out_features) != (3 * width, width, width) or _widths_differ(module):
        found = f"{qkv.in_features} to {qkv.out_features} and {proj.in_features} to {proj.out_features}"
        raise _refusal(name, f"queries, keys and values as wide as the {width} of a token", found, "attention: false")


def _widths_differ(module: Any) -> bool:
    return isinstance(module, OpenAttention) and module.key_dim != module.value_dim


def _check_mlp(name: str, module: Any) -> None:
    from timm.layers import Mlp

    if isinstance(module, TiedMlp):
        raise _shared_already(name)
    if type(module) is not Mlp:
        raise _refusal(name, "timm's MLP of two layers", type(module).__name__, "mlp: false")
    for part, layer in (("fc1", module.fc1), ("fc2", module.fc2)):
        if type(layer) is not nn.Linear:
            raise _refusal(f"{name}.{part}", "a plain linear layer in float", type(layer).__name__, "mlp: false")
    if module.fc1.weight.shape != module.fc2.weight.t().shape:
        found = f"{tuple(module.fc1.weight.shape)} and {tuple(module.fc2.weight.shape)}"
        raise _refusal(name, "two layers, each of the other's shape transposed", found, "mlp: false")


def _shared_already(name: str) -> UsageError:
    return UsageError(
        f"shared_vit: {name}",
        expected="weights of its own for each use",
        found="weights that are shared already",
        fix="name `shared_vit` once in `steps:`",
    )


def _refusal(where: str, expected: str, found: str, left_out: str) -> UsageError:
    return UsageError(
        f"shared_vit: {where}",
        expected=expected,
        found=found,
        fix=f"put `shared_vit` before the step that changed it, or set shared_vit.{left_out}",
    )


def restart_(tied: TiedAttention | TiedMlp, generator: torch.Generator) -> None:
    """timm's first values, in place: normal of standard deviation 0.02 for weights, cut off as timm does, 0 for biases."""
    for parameter in tied.parameters(recurse=False):
        if parameter.ndim == 2:
            drawn = nn.init.trunc_normal_(torch.empty(parameter.shape), std=STD, generator=generator)
            with torch.no_grad():
                parameter.copy_(drawn)
        else:
            nn.init.zeros_(parameter)


def project_(tied: TiedAttention | TiedMlp, old: Any) -> float:
    """Give the shared matrices the values nearest to the layer's own, in place; returns how far those are away.

    W stands for a matrix A where it is used as it is, and for B where it is used transposed. What is made least is
    `|W - A|^2 + |W^T - B|^2`, over all entries. Its gradient, `2 (W - A) + 2 (W - B^T)`, is zero where `W = (A + B^T) / 2`, and it
    is strictly convex, so that this mean is the one optimum; `|A - B^T|^2 / 2` is what remains. Pairs (A, B) are (W_q, W_proj),
    (W_k, W_v) and (W_1, W_2). To put hidden units of the MLP into another order changes rows of W_1 and columns of W_2 alike, and
    so the least value not at all: there is nothing to gain there. Biases stay as they are: none is shared.

    Args:
        tied: The layer that shares.
        old: The layer that it took the place of, timm's or open.

    Returns:
        The distance between the shared matrices, as used, and the layer's own, over the norm of the latter: 0 where they agree.
    """
    if isinstance(tied, TiedMlp):
        pairs = [(tied.weight, old.fc1.weight, old.fc2.weight)]
    else:
        query_DD, key_DD, value_DD = old.qkv.weight.chunk(3)
        pairs = [(tied.query_weight, query_DD, old.proj.weight), (tied.key_value_weight, key_DD, value_DD)]
    error = size = 0.0
    with torch.no_grad():
        for shared, plain, transposed in pairs:
            a, b = plain.double(), transposed.double().t()
            shared.copy_((a + b) / 2)
            error += float((a - b).square().sum()) / 2
            size += float(a.square().sum() + b.square().sum())
    return float((error / size) ** 0.5) if size else 0.0
