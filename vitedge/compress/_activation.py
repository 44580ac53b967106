"""The activation of an MLP, found and exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from vitedge.errors import UsageError

KINDS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "hard_swish": nn.Hardswish}


def exchange_(model: nn.Module, kind: str, blocks: Sequence[str]) -> dict[str, str]:
    """Put another activation into the MLP of these blocks, in place.

    Args:
        model: A ViT whose blocks have an MLP of timm's.
        kind: One of `KINDS`.
        blocks: Names of its blocks.

    Returns:
        By block, the class of the activation that was there.

    Raises:
        UsageError: A block has no MLP, or one without an activation of its own.
    """
    mlps = {name: _mlp(model, name) for name in blocks}  # all of them before the first is changed: a refusal leaves the model as it was
    before = {name: type(mlp.act).__name__ for name, mlp in mlps.items()}
    for mlp in mlps.values():
        mlp.act = KINDS[kind]().train(mlp.training)
    return before


def _mlp(model: nn.Module, block: str) -> Any:
    try:
        mlp = model.get_submodule(f"{block}.mlp")
    except AttributeError:
        mlp = None
    if not isinstance(getattr(mlp, "act", None), nn.Module):
        raise UsageError(
            f"activation: {block}.mlp",
            expected="an MLP with an activation between its layers",
            found="nothing" if mlp is None else f"{type(mlp).__name__}, which has none",
            fix="name other blocks in activation.blocks, or choose a ViT or DeiT as model.arch",
        )
    return mlp
