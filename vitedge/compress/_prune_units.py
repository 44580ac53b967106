"""What can be pruned in a ViT: kinds of units, how many there are, and which weights belong to each.

A place is where units of one kind lie: (block, kind), and ("", "skip") for the channels of the residual stream.

    kind        a unit                                      its weights
    heads       a head of a block's attention               its rows of qkv, its columns of proj
    key_dims    a dimension of one head's queries and keys  both rows of qkv
    value_dims  a dimension of one head's values            its row of qkv, its column of proj
    mlp         a hidden unit of a block's MLP              its row of fc1, its column of fc2
    qkv_input   a channel that a block's qkv reads          its column of qkv
    skip        a channel of the residual stream            all that read or write it, in every block

Biases belong to their rows. Shapes: H heads, K width of a head's queries and keys, V of its values, D embed_dim, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vitedge.compress._prune_norm import SelectingNorm
from vitedge.errors import UsageError
from vitedge.models.attention import OpenAttention, open_attention
from vitedge.models.blocks import block_names, norms_over, plain_linear
from vitedge.models.heads import classifier_names

Place = tuple[str, str]
STREAM: Place = ("", "skip")
PER_HEAD = ("key_dims", "value_dims")  # as many for each head of a block, each head its own
ATTENTION = ("heads", *PER_HEAD, "qkv_input")


def find_places(model: nn.Module, kinds: Sequence[str]) -> list[Place]:
    """Every place of these kinds, in the model's order; attention that loses units is laid open, in place.

    Raises:
        UsageError: The model is quantized, is no timm ViT, or was changed by a step before where units would be cut.
    """
    blocks = block_names(model, "prune")
    if set(kinds) & set(ATTENTION):
        _open(model, blocks)
    for block in blocks:
        for kind in kinds:
            _check(model, block, kind)
    if "skip" in kinds:
        _check_stream(model, blocks)
    return [(block, kind) for block in blocks for kind in kinds if kind != "skip"] + [STREAM] * ("skip" in kinds)


def _open(model: nn.Module, blocks: Sequence[str]) -> None:
    from timm.models.vision_transformer import Attention

    for block in blocks:
        attention = model.get_submodule(f"{block}.attn")
        if not isinstance(attention, (Attention, OpenAttention)):
            raise _refusal(f"{block}.attn", "timm's attention", type(attention).__name__)
    open_attention(model)


def _check(model: nn.Module, block: str, kind: str) -> None:
    """Refuse a block whose layers are not what a cut of this kind needs."""
    module: Any = model.get_submodule(block)
    if kind in ATTENTION:
        qkv, proj = (plain_linear(model, f"{block}.attn.{leaf}", "prune") for leaf in ("qkv", "proj"))
        attention = module.attn
        heads, key_dim, value_dim = attention.num_heads, attention.key_dim, attention.value_dim
        if (qkv.out_features, proj.in_features) != (heads * (2 * key_dim + value_dim), heads * value_dim):
            raise _refusal(f"{block}.attn.qkv", f"{heads} heads of queries, keys and values", f"{qkv.out_features} features")
        if kind != "qkv_input" and attention.core is not None:
            raise _refusal(f"{block}.attn", "softmax attention", type(attention.core).__name__)
    if kind == "mlp":
        fc1, fc2 = (plain_linear(model, f"{block}.mlp.{leaf}", "prune") for leaf in ("fc1", "fc2"))
        if fc1.out_features != fc2.in_features:
            raise _refusal(f"{block}.mlp", "an MLP that is not gated", f"{fc1.out_features} features that become {fc2.in_features}")
    if kind == "qkv_input":
        from timm.models.vision_transformer import ResPostBlock

        norm = module.norm1
        affine = isinstance(norm, nn.LayerNorm) and norm.weight is not None
        if isinstance(module, ResPostBlock) or not (affine or isinstance(norm, SelectingNorm)):
            raise _refusal(f"{block}.norm1", "a LayerNorm with weights before attention", type(norm).__name__)
    # A norm over units would see others when some are gone: a cut would then not be what it is scored as.
    for name, norm in norms_over(module, kind):
        raise _refusal(f"{block}.{name}", f"no norm over what {kind} would take away", type(norm).__name__, kind)


def _check_stream(model: Any, blocks: Sequence[str]) -> None:
    """Refuse a model in which something else than timm's own layers reads or writes the residual stream."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer) or type(model.patch_embed.proj) is not nn.Conv2d:
        raise _refusal("skip", "a timm ViT whose patch embedding is one convolution", type(model).__name__, "skip")
    for block in blocks:
        for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            plain_linear(model, f"{block}.{leaf}", "prune")
        if isinstance(model.get_submodule(block).norm1, SelectingNorm):
            raise _refusal(f"{block}.norm1", "a norm whose whole result qkv reads", "one that a cut of qkv_input narrowed", "skip")
    tensors = stream(model)
    sizes = {getattr(owner, name).shape[axis] for owner, name, axis in tensors}
    known = {id(getattr(owner, name)) for owner, name, _ in tensors}
    inside = [model.get_submodule(f"{block}.{leaf}") for block in blocks for leaf in ("attn.qkv", "mlp.fc1")]
    inside += [plain_linear(model, name, "prune") for name in classifier_names(model)]
    known |= {id(layer.bias) for layer in inside}
    # Norms over heads or hidden units do not see the stream.
    parts = [model.get_submodule(f"{block}.{leaf}") for block in blocks for leaf in ("attn", "mlp")]
    norms = [getattr(part, name, None) for part in parts for name in ("q_norm", "k_norm", "norm")]
    known |= {id(parameter) for norm in norms if norm is not None for parameter in norm.parameters()}
    others = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if others or len(sizes) != 1:
        raise _refusal("skip", "one width of all that reads or writes the residual stream", others[0] if others else f"{sizes}", "skip")


def _refusal(where: str, expected: str, found: str, kind: str = "") -> UsageError:
    fix = "put `prune` before the step that changed it" + (f", or leave {kind} out of prune.units" if kind else "")
    return UsageError(f"prune: {where}", expected=expected, found=found, fix=fix)


def stream(model: Any) -> list[tuple[Any, str, int]]:
    """Every tensor along the residual stream of a timm ViT: the module that has it, its name there, and its axis of D channels."""
    patches = model.patch_embed
    found = [(patches.proj, "weight", 0), (patches.proj, "bias", 0)]
    found += [(model, name, 2) for name in ("cls_token", "reg_token", "dist_token", "pos_embed")]
    norms = [patches.norm, model.norm_pre, model.norm, model.fc_norm]
    for block in (model.get_submodule(name) for name in block_names(model, "prune")):
        norms += [block.norm1, block.norm2]
        found += [(block.attn.qkv, "weight", 1), (block.attn.proj, "weight", 0), (block.attn.proj, "bias", 0)]
        found += [(block.mlp.fc1, "weight", 1), (block.mlp.fc2, "weight", 0), (block.mlp.fc2, "bias", 0)]
        found += [(getattr(block, name, None), "gamma", 0) for name in ("ls1", "ls2")]
    found += [(norm, name, 0) for norm in norms for name in ("weight", "bias")]
    found += [(model.get_submodule(name), "weight", 1) for name in classifier_names(model)]
    return [(owner, name, axis) for owner, name, axis in found if getattr(owner, name, None) is not None]


def width(model: Any, place: Place) -> int:
    """How many units there are: of `PER_HEAD` kinds in each head."""
    block, kind = place
    if place == STREAM:
        return int(model.patch_embed.proj.out_channels)
    module = model.get_submodule(block)
    if kind == "mlp":
        return int(module.mlp.fc2.in_features)
    if kind == "qkv_input":
        return int(module.attn.qkv.in_features)
    return int(getattr(module.attn, {"heads": "num_heads", "key_dims": "key_dim", "value_dims": "value_dim"}[kind]))


def unit_sums(model: Any, place: Place, value: Callable[[nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """The sum over each unit's weights of a value that each weight has.

    Args:
        model: The model.
        place: Where.
        value: Of each weight of a tensor, a tensor of its shape.

    Returns:
        (U,), or (H, K) and (H, V) for the kinds of `PER_HEAD`.
    """
    block, kind = place
    if place == STREAM:
        return torch.stack([_along(value(getattr(owner, name)), axis) for owner, name, axis in stream(model)]).sum(0)
    module = model.get_submodule(block)
    if kind == "mlp":
        return _rows(module.mlp.fc1, value) + value(module.mlp.fc2.weight).sum(0)
    attention = module.attn
    if kind == "qkv_input":
        return value(attention.qkv.weight).sum(0)
    heads, key_dim, value_dim = attention.num_heads, attention.key_dim, attention.value_dim
    q, k, v = _rows(attention.qkv, value).split([heads * key_dim, heads * key_dim, heads * value_dim])
    keys_HK = (q + k).reshape(heads, key_dim)
    values_HV = (v + value(attention.proj.weight).sum(0)).reshape(heads, value_dim)
    if kind == "heads":
        return keys_HK.sum(1) + values_HV.sum(1)
    return keys_HK if kind == "key_dims" else values_HV


def _along(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums over all axes but one, (D,)."""
    return values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1)


def _rows(layer: Any, value: Callable[[nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """Sums of a linear layer's rows, biases included."""
    rows = value(layer.weight).sum(1)
    return rows if layer.bias is None else rows + value(layer.bias)


def readers(model: Any, place: Place, units: torch.Tensor) -> list[tuple[nn.Parameter, int, torch.Tensor]]:
    """What must be 0 for the model to answer as if these units were gone: tensors, an axis of each, positions on it.

    For `skip` it is as if no layer read the channels; LayerNorm still counts them, as it no longer does after a cut.

    Args:
        model: The model.
        place: Where.
        units: Positions in what `unit_sums` gives, flattened; int64.
    """
    block, kind = place
    if place == STREAM:
        return [(getattr(owner, name), axis, units) for owner, name, axis in stream(model) if isinstance(owner, nn.Linear) and axis == 1]
    module = model.get_submodule(block)
    if kind == "mlp":
        return [(module.mlp.fc2.weight, 1, units)]
    attention = module.attn
    if kind == "key_dims":  # a query that is 0 adds nothing to a score, whatever the key
        return [(tensor, 0, units) for tensor in (attention.qkv.weight, attention.qkv.bias) if tensor is not None]
    if kind == "qkv_input":
        return [(attention.qkv.weight, 1, units)]
    if kind == "heads":
        units = (units[:, None] * attention.value_dim + torch.arange(attention.value_dim, device=units.device)).flatten()
    return [(attention.proj.weight, 1, units)]
