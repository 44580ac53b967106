"""The transformer blocks of a model and their layers, by the names that the architecture gives them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from vitedge.errors import UsageError, closest
from vitedge.models.quantized import rounds

PARTS = ("norm1", "attn", "norm2", "mlp")


def block_names(model: nn.Module, technique: str) -> list[str]:
    """Names of the transformer blocks of a float model, in its order.

    Args:
        model: Any.
        technique: Whom an error speaks of.

    Raises:
        UsageError: The model is quantized, or has no such blocks.
    """
    if rounds(model):
        raise UsageError(
            technique, expected="a float model", found="a quantized one", fix=f"put `{technique}` before the step that quantizes"
        )
    names = [name for name, module in model.named_modules() if all(hasattr(module, part) for part in PARTS)]
    if not names:
        raise UsageError(
            technique,
            expected=f"transformer blocks, of {', '.join(PARTS)}",
            found=f"none in {type(model).__name__}",
            fix="remove the step, or choose a ViT or DeiT as model.arch",
        )
    return names


def matching_blocks(names: Sequence[str], patterns: Sequence[str], technique: str) -> list[str]:
    """Those of the blocks that a pattern names, in their order.

    Args:
        names: Of blocks.
        patterns: fnmatch patterns.
        technique: Whom an error speaks of.

    Raises:
        UsageError: A pattern names no block.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"{technique}.blocks",
                expected="patterns that match blocks",
                found=f"'{pattern}', which matches none{closest(pattern, list(names))}",
                fix="name blocks as the model does, such as blocks.0 or blocks.1?",
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


# What a timm block may have in it that normalizes over units of a kind.
_NORMS_OVER = {
    "heads": ("attn.norm",),
    "value_dims": ("attn.norm",),
    "key_dims": ("attn.q_norm", "attn.k_norm"),
    "mlp": ("mlp.norm",),
}


def norms_over(block: nn.Module, kind: str) -> Iterator[tuple[str, nn.Module]]:
    """The norms over units of a kind, by their names in the block: without some of the units they would see others.

    Args:
        block: timm's.
        kind: `heads`, `key_dims`, `value_dims`, `mlp`, or one that nothing normalizes over.
    """
    for name in _NORMS_OVER.get(kind, ()):
        parent, _, leaf = name.rpartition(".")
        norm = getattr(block.get_submodule(parent), leaf, None)
        if norm is not None and not isinstance(norm, nn.Identity):
            yield name, norm


def plain_linear(model: nn.Module, name: str, technique: str) -> nn.Linear:
    """The layer of that name, which does nothing but a product with its weight.

    Args:
        model: Any.
        name: Of the layer.
        technique: Whom an error speaks of.

    Raises:
        UsageError: There is none, or one that does more or less, as layers that were factored or that round.
    """
    try:
        layer: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        layer = None
    if type(layer) is not nn.Linear:
        raise UsageError(
            f"{technique}: {name}",
            expected="a plain linear layer in float",
            found="nothing" if layer is None else type(layer).__name__,
            fix=f"put `{technique}` before the step that changed it",
        )
    return layer
