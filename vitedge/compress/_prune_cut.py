"""The cut itself: layers lose rows and columns, for chosen units or, where values come later, for as many of the first ones.

Shapes: C units kept, H heads kept, K and V dimensions kept of each head's keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vitedge.compress._prune_norm import SelectingNorm
from vitedge.compress._prune_units import ATTENTION, PER_HEAD, STREAM, Place, stream, width
from vitedge.errors import UsageError
from vitedge.models.attention import open_attention
from vitedge.models.blocks import block_names

# Units that are kept, sorted, int64 (C,); of kinds of `PER_HEAD` for each head there was before the cut, (heads, C).
Kept = Mapping[Place, torch.Tensor]
# Units that are kept, of kinds of `PER_HEAD` in each head.
Widths = dict[Place, int]


def cut_(model: nn.Module, kept: Kept) -> None:
    """Take away all units of these places but the kept ones, in place; other places stay as they are.

    What is left computes what the model did with those units' weights at 0; for `skip`, LayerNorm counts the channels that are left.

    Args:
        model: A model whose places `find_places` found.
        kept: By place.
    """
    by_block: dict[str, dict[str, torch.Tensor]] = {}
    for (block, kind), index in kept.items():
        by_block.setdefault(block, {})[kind] = index
    for block, indices in by_block.items():
        if block == STREAM[0]:
            _cut_stream(model, indices[STREAM[1]])
            continue
        module: Any = model.get_submodule(block)
        if "mlp" in indices:
            _narrow(module.mlp.fc1, "weight", 0, indices["mlp"])
            _narrow(module.mlp.fc1, "bias", 0, indices["mlp"])
            _narrow(module.mlp.fc2, "weight", 1, indices["mlp"])
        if {"heads", *PER_HEAD} & set(indices):
            _cut_heads(module.attn, indices)
        if "qkv_input" in indices:
            _cut_input(module, indices["qkv_input"])


def _narrow(owner: Any, name: str, axis: int, index: torch.Tensor) -> None:
    """Keep some positions of a parameter's axis, if there is one, and let its module know its new sizes."""
    old = getattr(owner, name)
    if old is None:
        return
    setattr(owner, name, nn.Parameter(old.detach().index_select(axis, index.to(old.device)), requires_grad=old.requires_grad))
    if name == "weight":
        shape = tuple(owner.weight.shape)
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = shape
        elif isinstance(owner, nn.Conv2d):
            owner.out_channels = shape[0]
        elif hasattr(owner, "normalized_shape"):  # LayerNorm, RmsNorm
            owner.normalized_shape = shape


def _cut_heads(attention: Any, indices: Mapping[str, torch.Tensor]) -> None:
    """Whole heads, and dimensions of those that are left."""
    heads, key_dim, value_dim = attention.num_heads, attention.key_dim, attention.value_dim
    heads_H = indices.get("heads", torch.arange(heads))
    keys_HK = indices.get("key_dims", torch.arange(key_dim).expand(heads, -1))[heads_H]
    values_HV = indices.get("value_dims", torch.arange(value_dim).expand(heads, -1))[heads_H]
    queries, columns = (heads_H[:, None] * key_dim + keys_HK).flatten(), (heads_H[:, None] * value_dim + values_HV).flatten()
    rows = torch.cat([queries, heads * key_dim + queries, 2 * heads * key_dim + columns])
    _narrow(attention.qkv, "weight", 0, rows)
    _narrow(attention.qkv, "bias", 0, rows)
    _narrow(attention.proj, "weight", 1, columns)
    attention.num_heads, attention.key_dim, attention.value_dim = len(heads_H), keys_HK.shape[1], values_HV.shape[1]


def _cut_input(block: Any, index_C: torch.Tensor) -> None:
    """Channels that qkv reads: the norm before it still normalizes over all, and its scale and shift go into qkv."""
    norm, qkv = block.norm1, block.attn.qkv
    device, dtype = qkv.weight.device, qkv.weight.dtype
    if isinstance(norm, SelectingNorm):
        features, positions = norm.features, norm.index.cpu()[index_C]
    else:
        features, positions = len(norm.weight), index_C
        with torch.no_grad():
            if norm.bias is not None:
                shift_C = norm.bias.double().index_select(0, index_C.to(device))
                added_O = qkv.weight.double().index_select(1, index_C.to(device)) @ shift_C
                if qkv.bias is None:
                    qkv.bias = nn.Parameter(added_O.to(dtype))
                else:
                    qkv.bias.copy_(qkv.bias.double() + added_O)
            qkv.weight.copy_(qkv.weight.double() * norm.weight.double())
    _narrow(qkv, "weight", 1, index_C)
    block.norm1 = SelectingNorm(features, norm.eps, positions.clone()).to(device=device, dtype=dtype).train(block.training)


def _cut_stream(model: Any, index_C: torch.Tensor) -> None:
    """Channels of the residual stream, wherever they are read or written."""
    for owner, name, axis in stream(model):
        _narrow(owner, name, axis, index_C)
    model.embed_dim = model.num_features = model.head_hidden_size = len(index_C)


def first_units(model: nn.Module, widths: Mapping[Place, int]) -> dict[Place, torch.Tensor]:
    """As many units of each place as there are to be, the first ones; places that are no wider are left out."""
    kept = {}
    for place, units in widths.items():
        if units < width(model, place):
            kept[place] = torch.arange(units)
            if place[1] in PER_HEAD:
                kept[place] = kept[place].expand(width(model, (place[0], "heads")), -1)
    return kept


def trial(model: nn.Module, widths: Mapping[Place, int]) -> nn.Module:
    """A copy of the model of these widths, to count or to time: which units it keeps is left open."""
    made = copy.deepcopy(model)
    cut_(made, first_units(made, widths))
    return made


def describe(widths: Mapping[Place, int]) -> dict[str, Any]:
    """The widths that a cut left, as plain data for a checkpoint: kinds by block, the residual stream under `""`."""
    plain: dict[str, dict[str, int]] = {}
    for (block, kind), units in widths.items():
        plain.setdefault(block, {})[kind] = units
    return {"widths": plain}


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Give a newly built model, in place, the widths that a cut left; values are still to be loaded.

    Args:
        model: The architecture, with what techniques before the cut made of it.
        structure: What `describe` gave.

    Raises:
        UsageError: The model has no such layers, or narrower ones.
    """
    widths = {(block, kind): int(units) for block, kinds in structure["widths"].items() for kind, units in kinds.items()}
    if any(kind in ATTENTION for _, kind in widths):
        open_attention(model)
    known = {STREAM[0], *block_names(model, "prune")}
    for (block, kind), units in widths.items():
        if block not in known or width(model, (block, kind)) < units:
            raise UsageError("checkpoint", expected=f"{units} {kind} in {block or 'the model'}", found="fewer", fix="train it again")
    cut_(model, first_units(model, widths))
    return model
