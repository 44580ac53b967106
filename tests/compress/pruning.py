"""Small ViTs to prune, units chosen at random, and the same model with those units' weights at zero, written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from timm.layers import RmsNorm
from torch import nn

from tests.compress import made
from vitedge.compress import Compressed, prune
from vitedge.models.build import CheckpointMeta, create

HEADS, HEAD_DIM, EMBED, HIDDEN = 2, 8, 16, 64
SIZES = {"heads": HEADS, "key_dims": HEAD_DIM, "value_dims": HEAD_DIM, "mlp": HIDDEN, "qkv_input": EMBED}
ARCH = "deit_tiny_patch16_224"


def vit(seed: int = 0, arch: str = ARCH, **options: Any) -> Any:
    """A float64 ViT of two blocks whose weights, biases and norms are all random and large enough to matter."""
    torch.manual_seed(seed)
    model = create(arch, 8, 4, len(made.LABELS), options={**made.VIT, **options}).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * values if "norm" in name and name.endswith("weight") else 0.3 * values)
    return model


def images(count: int = 6) -> torch.Tensor:
    return made.batch(range(count)).x_BCHW.double()


def answers(model: nn.Module, count: int = 6) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(images(count))
    return found


def meta_of(structure: tuple[tuple[str, dict[str, Any]], ...], arch: str = ARCH, **options: Any) -> CheckpointMeta:
    return CheckpointMeta(
        arch, 8, 4, len(made.LABELS), made.CONTRACT.to_json(), made.LABELS, options={**made.VIT, **options}, structure=structure
    )


def apply(model: nn.Module, **config: Any) -> Compressed:
    """The prune step; relative targets count from a model of the same architecture."""
    return prune.apply(model, prune.Config(**config), made.context(Path(), untouched=lambda: vit(9)))


def choose(kind: str, width: int, seed: int) -> torch.Tensor:
    """Positions that stay, sorted; of each head by itself for the dimensions of heads."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(SIZES[kind], generator=generator)[:width].sort().values for _ in range(HEADS)]
    return torch.stack(rows) if kind in ("key_dims", "value_dims") else rows[0]


def gone(kind: str, kept: torch.Tensor) -> list[tuple[int, ...]]:
    """Units that do not stay, (unit,) or (head, unit)."""
    if kept.ndim == 1:
        return [(unit,) for unit in range(SIZES[kind]) if unit not in kept.tolist()]
    return [(head, unit) for head in range(HEADS) for unit in range(SIZES[kind]) if unit not in kept[head].tolist()]


def zero_(model: Any, block: int, kind: str, unit: tuple[int, ...], wholly: bool = False) -> None:
    """Put a unit's weights to 0: those that it is read by, or `wholly` all of them."""
    attn, mlp = model.blocks[block].attn, model.blocks[block].mlp
    with torch.no_grad():
        if kind == "mlp":
            mlp.fc2.weight[:, unit[0]] = 0
            if wholly:
                mlp.fc1.weight[unit[0]] = 0
                mlp.fc1.bias[unit[0]] = 0
        if kind == "qkv_input":
            attn.qkv.weight[:, unit[0]] = 0
        if kind == "value_dims":
            attn.proj.weight[:, unit[0] * HEAD_DIM + unit[1]] = 0
            if wholly:
                _zero_row_(attn.qkv, 2 * EMBED + unit[0] * HEAD_DIM + unit[1])
        if kind == "key_dims":
            _zero_row_(attn.qkv, unit[0] * HEAD_DIM + unit[1])
            _zero_row_(attn.qkv, EMBED + unit[0] * HEAD_DIM + unit[1])
        if kind == "heads":
            attn.proj.weight[:, unit[0] * HEAD_DIM : (unit[0] + 1) * HEAD_DIM] = 0
            if wholly:
                for part in range(3):
                    for dim in range(HEAD_DIM):
                        _zero_row_(attn.qkv, part * EMBED + unit[0] * HEAD_DIM + dim)


def _zero_row_(layer: nn.Linear, row: int) -> None:
    layer.weight[row] = 0
    if layer.bias is not None:
        layer.bias[row] = 0


def zeroed(model: nn.Module, kept: dict[tuple[str, str], torch.Tensor]) -> nn.Module:
    """A copy in which all units are read with 0 but those that are kept, by place as a cut takes them."""
    masked = copy.deepcopy(model)
    for (block, kind), index in kept.items():
        for unit in gone(kind, index):
            zero_(masked, int(block.removeprefix("blocks.")), kind, unit)
    return masked


class NormOfSome(nn.Module):
    """LayerNorm, or RmsNorm, that counts some channels only, and gives 0 on the others: what a narrower residual stream sees."""

    def __init__(self, norm: Any, kept: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, part = self.norm.weight[self.kept], x[..., self.kept]
        if isinstance(self.norm, nn.LayerNorm):
            some = F.layer_norm(part, (len(self.kept),), weight, self.norm.bias[self.kept], self.norm.eps)
        else:
            some = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + self.norm.eps) * weight
        full = torch.zeros_like(x)
        full[..., self.kept] = some
        return full


def with_narrow_norms(model: Any, kept: torch.Tensor) -> nn.Module:
    """A copy whose every norm of the residual stream counts the kept channels only; all else as it is."""
    masked = copy.deepcopy(model)
    for name, module in list(masked.named_modules()):
        if isinstance(module, (nn.LayerNorm, RmsNorm)) and len(module.weight) == EMBED:
            parent, _, leaf = name.rpartition(".")
            setattr(masked.get_submodule(parent), leaf, NormOfSome(module, kept))
    return masked
