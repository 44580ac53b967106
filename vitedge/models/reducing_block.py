"""Blocks among which tokens become fewer, and what every technique that reduces tokens needs of a model.

timm calls `model.blocks` with tokens alone. `ReducingBlocks` stands in its place, under the same names, and passes on beside the
tokens how many each of them stands for: merged tokens for several, tokens that are masked in training for next to none.
Shapes: B batch, N tokens (class, distillation and register tokens first, then patches), n some of them, D embed_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vitedge.errors import UsageError
from vitedge.models.attention import OpenAttention, open_attention
from vitedge.models.cost import count
from vitedge.models.quantized import rounds

# A block's modules, by timm's names.
_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


REDUCERS = ("before", "between")  # names of a ReducingBlock's modules that reduce tokens


class ReducingBlock(nn.Module):  # type: ignore[misc]  # the library carries no types
    """timm's pre-norm block, with two places where tokens may become fewer.

    Args:
        block: timm's, with attention laid open; its modules keep their names.
        before: Called with tokens BND and their sizes BN1 (or None) before the block; returns both. None leaves them as they are.
        between: Called with tokens, sizes and what attention went by (`Attended`), between attention and MLP; returns tokens and sizes.
        proportional: Whether a key weighs in attention as the tokens it stands for (Bolya et al. 2023, equation 1).
    """

    def __init__(self, block: Any, before: nn.Module | None, between: nn.Module | None, proportional: bool) -> None:
        super().__init__()
        for name in _PARTS:
            setattr(self, name, getattr(block, name))
        self.before, self.between, self.proportional = before, between, proportional

    def forward(self, x_BND: torch.Tensor, size_BN1: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's tokens and how many each stands for; None where every one stands for itself."""
        if self.before is not None:
            x_BND, size_BN1 = self.before(x_BND, size_BN1)
        bias_BN = size_BN1.squeeze(-1).log() if self.proportional and size_BN1 is not None else None
        attended = self.attn.attend(self.norm1(x_BND), bias_BN)
        x_BND = x_BND + self.drop_path1(self.ls1(attended.out_BND))
        if self.between is not None:
            x_BND, size_BN1 = self.between(x_BND, size_BN1, attended)
        x_BND = x_BND + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BND))))
        return x_BND, size_BN1


class ReducingBlocks(nn.Sequential):  # type: ignore[misc]  # the library carries no types
    """All blocks of a model, each a `ReducingBlock`."""

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """BND to BnD."""
        size_BN1 = None
        for block in self:
            x_BND, size_BN1 = block(x_BND, size_BN1)
        return x_BND


def check_reducible(model: nn.Module, technique: str) -> None:
    """Refuse a model whose tokens `technique` cannot reduce.

    Raises:
        UsageError: Quantized, no ViT of timm's, reduced already, without a class token that answers, or with other blocks or attention.
    """
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    def refuse(expected: str, found: str, fix: str) -> UsageError:
        return UsageError(technique, expected=expected, found=found, fix=fix)

    if rounds(model):
        raise refuse("a float model", "a quantized one", f"put `{technique}` before the step that quantizes")
    if not isinstance(model, VisionTransformer):
        raise refuse("a timm ViT or DeiT", type(model).__name__, "choose one as model.arch")
    vit: Any = model
    if reduces_tokens(model):
        fix = "name one technique that reduces tokens in `steps:`, and name it once"
        raise refuse("a model whose tokens no other step reduces", "one whose tokens are reduced", fix)
    if vit.global_pool != "token":
        fix = "leave global_pool out of model.options, or choose another model.arch"
        raise refuse("a model that answers from its class token", f"global_pool '{vit.global_pool}'", fix)
    for index, block in enumerate(vit.blocks):
        if type(block) is not Block:
            raise refuse("timm's pre-norm blocks", f"{type(block).__name__} as blocks.{index}", f"put `{technique}` before other steps")
        kind = block.attn if getattr(block.attn, "core", None) is None else block.attn.core
        if not isinstance(kind, (Attention, OpenAttention)):
            fix = f"leave out the step that replaced it, or `{technique}`"
            raise refuse("softmax attention", f"{type(kind).__name__} in blocks.{index}.attn", fix)


def wrap_blocks(
    model: nn.Module,
    before: Mapping[int, nn.Module] | None = None,
    between: Mapping[int, nn.Module] | None = None,
    proportional: bool = True,
) -> None:
    """Put `ReducingBlock`s in the place of all blocks, in place.

    Args:
        model: One that `check_reducible` lets pass.
        before, between: What reduces tokens, by block.
        proportional: As `ReducingBlock`.

    Raises:
        UsageError: Attention cannot be laid open.
    """
    open_attention(model)
    vit: Any = model
    blocks = [
        ReducingBlock(block, (before or {}).get(index), (between or {}).get(index), proportional).train(block.training)
        for index, block in enumerate(vit.blocks)
    ]
    vit.blocks = ReducingBlocks(*blocks).train(vit.blocks.training)


def reduces_tokens(model: nn.Module) -> bool:
    """Whether tokens become fewer on their way through the model."""
    return isinstance(getattr(model, "blocks", None), ReducingBlocks)


def chooses_tokens(model: nn.Module) -> bool:
    """Whether the image decides which tokens go on, and so may the last bit of a float: any reduction but that to fixed positions."""
    vit: Any = model
    parts = [part for block in vit.blocks for part in (block.before, block.between)] if reduces_tokens(model) else []
    return any(getattr(part, "chooses", True) for part in parts if part is not None)


def chosen_blocks(technique: str, asked: Sequence[int] | None, default: Sequence[int], depth: int) -> list[int]:
    """The blocks asked for, in order, or the default.

    Raises:
        UsageError: The model has no such block.
    """
    chosen = sorted(default if asked is None else asked)
    if chosen[-1] >= depth:
        raise UsageError(
            f"{technique}.blocks", expected=f"blocks of the model, 0 to {depth - 1}", found=str(chosen[-1]), fix="count blocks from 0"
        )
    return chosen


def quarters(depth: int) -> list[int]:
    """The blocks at a quarter, half and three quarters of the model, as EViT and DynamicViT choose them: 3, 6 and 9 of 12."""
    return sorted({min(depth - 1, max(1, depth * part // 4)) for part in (1, 2, 3)})


def gather_tokens(x_BND: torch.Tensor, index_Bn: torch.Tensor) -> torch.Tensor:
    """Tokens at the positions of each image, BnD."""
    return x_BND.gather(1, index_Bn.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def in_full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """While open, products on x's device are not cut to autocast's type.

    Where autocast is off nothing is opened: the exporter would keep a region of its own for it.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def widened(x: torch.Tensor) -> torch.Tensor:
    """The same values in float32 at least, for what autocast made narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_counts(model: nn.Module, shape_CHW: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Tokens that go into attention and into the MLP of each block, of one image in eval mode."""
    vit: Any = model
    seen: list[int] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0].shape[1])

    training, parameter = model.training, next(model.parameters())
    hooks = [norm.register_forward_pre_hook(look) for block in vit.blocks for norm in (block.norm1, block.norm2)]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape_CHW, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return list(zip(seen[::2], seen[1::2], strict=True))


def reduction_notes(model: nn.Module, macs_before: int, shape_CHW: tuple[int, int, int]) -> dict[str, Any]:
    """For the manifest: tokens of every block, and multiply-accumulates of one image before and after.

    Args:
        model: As it is now.
        macs_before: Of the model before its tokens were reduced.
        shape_CHW: Of one image.
    """
    macs = count(model, shape_CHW).macs
    tokens = [{"attention": attention, "mlp": mlp} for attention, mlp in token_counts(model, shape_CHW)]
    return {"tokens": tokens, "macs": {"before": macs_before, "after": macs, "share": round(macs / macs_before, 4)}}
