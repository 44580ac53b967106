"""Attention by another core than softmax: where one may go, what it costs there, and how it comes back from a checkpoint.

A core is a module called as `OpenAttention.core` is, with two methods: `describe()` gives the arguments of its constructor as plain
data, and `macs(slot)` the multiply-accumulates of its products for one image. Shapes: B batch, N tokens, H heads, K width of a
head's queries and keys, V width of its values; images are BCHW, with C channels, H height and W width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vitedge.errors import UsageError
from vitedge.models.attention import open_attention
from vitedge.models.blocks import matching_blocks
from vitedge.models.quantized import rounds

WIDE = (torch.float32, torch.float64)
POINTS = ("on_query", "on_key", "on_value", "on_weights")  # of OpenAttention, where something else may act on softmax attention


@dataclass(frozen=True)
class Slot:
    """Attention that a core can go into.

    Attributes:
        name: Of the module.
        tokens: N, counted on an image: techniques before may have taken some away.
        prefix: How many of them, the first ones, stand for no patch: class token, distillation token, registers.
        num_heads, key_dim, value_dim: H, K and V.
        scale: What the queries that a core gets were multiplied by.
    """

    name: str
    tokens: int
    prefix: int
    num_heads: int
    key_dim: int
    value_dim: int
    scale: float

    @property
    def softmax_macs(self) -> int:
        """Multiply-accumulates of softmax attention's two products, `H N^2 (K + V)`."""
        return self.num_heads * self.tokens**2 * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Exchanged:
    """Cores that were put into a model.

    Attributes:
        cores: Arguments of their constructors by the name of the attention, as plain data.
        notes: For the manifest: tokens and multiply-accumulates by block and in all, of softmax attention and of the cores.
    """

    cores: dict[str, dict[str, Any]]
    notes: dict[str, Any]

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """What `rebuild_cores` takes; known since the exchange, so that nothing is read off the model that is saved."""
        return {"cores": self.cores}


def exchange_cores(
    model: nn.Module, technique: str, patterns: Sequence[str], x_BCHW: torch.Tensor, make: Callable[[Slot], Any]
) -> Exchanged:
    """Put a core into every block that a pattern names, in place; all other weights stay what they are.

    Args:
        model: A timm ViT in float.
        technique: Name of the technique, for errors.
        patterns: fnmatch patterns of block names.
        x_BCHW: An image, as model input.
        make: Makes the core of a slot, or raises.

    Raises:
        UsageError: The model has no such attention, is quantized, or attends in another way already; or a pattern names no block.
    """
    slots = find_slots(model, technique, patterns, x_BCHW)
    cores = {slot.name: make(slot) for slot in slots}  # all of them before the first is put in: a refusal leaves the model as it was
    device = next(model.parameters()).device
    for name, core in cores.items():
        attention: Any = model.get_submodule(name)
        attention.core = core.to(device).train(attention.training)
    try:
        _answer(model, x_BCHW)
    except ValueError as error:  # of OpenAttention.attend
        raise UsageError(
            technique,
            expected="attention that goes by queries, keys and values alone",
            found=str(error),
            fix="merge tokens without proportional attention, or leave one of the two techniques out",
        ) from error
    macs = {slot.name: cores[slot.name].macs(slot) for slot in slots}
    blocks = {slot.name: {"tokens": slot.tokens, "softmax_macs": slot.softmax_macs, "macs": macs[slot.name]} for slot in slots}
    before, after = sum(slot.softmax_macs for slot in slots), sum(macs.values())
    notes = {"blocks": blocks, "softmax_macs": before, "macs": after, "fewer_macs": after < before}
    return Exchanged({name: core.describe() for name, core in cores.items()}, notes)


def find_slots(model: nn.Module, technique: str, patterns: Sequence[str], x_BCHW: torch.Tensor) -> list[Slot]:
    """The attention of every block that a pattern names, opened, in order; arguments and errors as of `exchange_cores`."""
    if rounds(model):
        raise UsageError(
            technique, expected="a float model", found="a quantized one", fix=f"put `{technique}` before the step that quantizes"
        )
    blocks = {name: name.rpartition(".")[0] for name in open_attention(model)}
    matching = matching_blocks(list(blocks.values()), patterns, technique)
    chosen = [name for name, block in blocks.items() if block in matching]
    for name in chosen:
        _check_free(technique, name, model.get_submodule(name))
    _check_unmasked(model, technique, chosen)
    tokens = _count_tokens(model, chosen, x_BCHW)
    prefix = _prefix(model)
    slots = []
    for name in chosen:
        attention: Any = model.get_submodule(name)
        sizes = attention.num_heads, attention.key_dim, attention.value_dim
        slots.append(Slot(name, tokens[name], prefix, *sizes, float(attention.scale)))
    return slots


def _prefix(model: nn.Module) -> int:
    """Tokens before the patches; timm's PiT has another name for it."""
    own = getattr(model, "num_prefix_tokens", None)
    return int(own if own is not None else getattr(model, "num_tokens", 0))


def _check_unmasked(model: nn.Module, technique: str, chosen: Sequence[str]) -> None:
    """Refuse attention behind a selection that masks keys in training, of which a core that is tried out of training knows nothing.

    Raises:
        UsageError: There is one.
    """
    masked = [name.rpartition(".")[0] for name, module in model.named_modules() if getattr(module, "masks_in_training", False)]
    if not masked:
        return
    blocks = [name.rpartition(".")[0] for name in open_attention(model)]
    first = min(blocks.index(block) for block in masked)
    for name in chosen:
        if blocks.index(name.rpartition(".")[0]) >= first:
            raise UsageError(
                technique,
                expected="attention over all tokens",
                found=f"{name} behind a step that masks tokens while it trains",
                fix=f"narrow {technique}.blocks to those before it, or leave one of the two techniques out",
            )


def rebuild_cores(model: nn.Module, cores: dict[str, dict[str, Any]], make: Callable[..., nn.Module]) -> nn.Module:
    """Put cores, values still to be loaded, where `exchange_cores` put them.

    Args:
        model: As it was before the exchange.
        cores: Arguments for `make` by the name of the attention.
        make: Makes a core.

    Raises:
        UsageError: There is no such attention.
    """
    names = open_attention(model)
    for name, made in cores.items():
        if name not in names:
            raise UsageError("checkpoint", expected=f"attention {name}", found="none", fix="train it again")
        attention: Any = model.get_submodule(name)
        attention.core = make(**made)
    return model


def in_float32(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q_BHNK: torch.Tensor,
    k_BHNK: torch.Tensor,
    v_BHNV: torch.Tensor,
) -> torch.Tensor:
    """What `attend` gives, BHNV in the values' type, computed in float32 or wider whatever autocast would have.

    Exponentials and pseudo-inverses need the bits. Autocast is left only where it is on, so that an exported graph has no trace of it.
    """
    device = v_BHNV.device.type
    wide = [x if x.dtype in WIDE else x.float() for x in (q_BHNK, k_BHNK, v_BHNV)]
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            out_BHNV = attend(*wide)
    else:
        out_BHNV = attend(*wide)
    return out_BHNV if out_BHNV.dtype == v_BHNV.dtype else out_BHNV.to(v_BHNV.dtype)


def _check_free(technique: str, name: str, attention: Any) -> None:
    """Refuse attention that is no plain softmax attention any more.

    Raises:
        UsageError: It has a core, or something acts on its products or its weights, which a core would leave out.
    """
    if attention.core is not None:
        raise UsageError(
            technique,
            expected="softmax attention",
            found=f"{type(attention.core).__name__} in {name}",
            fix="replace the attention of a block once in `steps:`",
        )
    acting = {point: getattr(attention, point) for point in POINTS if type(getattr(attention, point)) is not nn.Identity}
    acting |= {"softmax": attention.softmax} if type(attention.softmax) is not nn.Softmax else {}
    for point, module in acting.items():
        raise UsageError(
            technique,
            expected="softmax attention that nothing else acts on",
            found=f"{type(module).__name__} at {name}.{point}",
            fix=f"put `{technique}` before the step that put it there",
        )


def _count_tokens(model: nn.Module, names: Sequence[str], x_BCHW: torch.Tensor) -> dict[str, int]:
    """How many tokens each of these attention modules is given."""
    seen: dict[str, int] = {}

    def look(module: nn.Module, inputs: tuple[torch.Tensor], name: str) -> None:
        seen[name] = inputs[0].shape[1]

    with contextlib.ExitStack() as stack:
        for name in names:  # on `qkv`: a block may call its attention by `attend`, past the module's own hooks
            stack.callback(model.get_submodule(f"{name}.qkv").register_forward_pre_hook(partial(look, name=name)).remove)
        _answer(model, x_BCHW)
    return seen


def _answer(model: nn.Module, x_BCHW: torch.Tensor) -> None:
    """Let the model answer once, in eval mode and without gradients; its modes come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(x_BCHW.to(next(model.parameters()).device))
    finally:
        for module, training in modes:
            module.training = training
