"""The optimizer and its schedule: no decay on norms and biases, linear warm-up, cosine to zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vitedge.recipe import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD, fused; norms, biases, class token and position embedding are not decayed.

    With `layer_decay` each block learns that much slower than the one after it (Clark et al. 2020; Bao et al. 2022).
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    skip: set[str] = getattr(model, "no_weight_decay", set)()
    groups: Any
    if config.layer_decay < 1.0:
        groups = param_groups_layer_decay(model, config.weight_decay, no_weight_decay_list=tuple(skip), layer_decay=config.layer_decay)
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=tuple(skip))
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate: the schedule's times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of step `step` of `steps`, counted from 0: linear warm-up to the peak, then a half cosine to zero."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
