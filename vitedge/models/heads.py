"""The heads of a classifier: DeiT's distilled models have two, and answer with their mean. Shapes: B batch, C channels or classes, H, W."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def has_distillation_token(model: nn.Module) -> bool:
    """Whether the model is timm's DeiT with a distillation token and a head of its own on it (Touvron et al. 2021)."""
    from timm.models.deit import VisionTransformerDistilled

    return isinstance(model, VisionTransformerDistilled)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Modules of a timm model that answer with classes, by name: one, or two where there is a distillation token."""
    names: str | tuple[str, ...] = getattr(model, "pretrained_cfg", {}).get("classifier", ())
    return (names,) if isinstance(names, str) else tuple(names)


def head_logits(model: Any, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits (B, C) of every head of a model in eval mode, by name.

    `average` is what the model itself answers, to the bit. A model with a distillation token also has
    `class` and `distill`, whose mean that is.
    """
    if not has_distillation_token(model):
        return {"average": model(x_BCHW)}
    tokens_BND = model.forward_features(x_BCHW)
    class_BC, distill_BC = model.head(tokens_BND[:, 0]), model.head_dist(tokens_BND[:, 1])
    return {"average": (class_BC + distill_BC) / 2, "class": class_BC, "distill": distill_BC}
