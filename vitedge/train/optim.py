"""The optimizer and its schedule: no decay on norms and biases, linear warm-up, cosine to zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vitedge.models.heads import classifier_names
from vitedge.recipe import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer; norms, biases, class token and position embedding are not decayed.

    AdamW (Loshchilov and Hutter 2019) and SGD are torch's, fused. Muon (Jordan et al. 2024) is timm's, scaled so that
    AdamW's learning rates hold (Liu et al. 2025, equation 4); the classifier, embeddings and vectors take the steps of
    AdamW with Nesterov momentum.

    With `layer_decay` each block learns that much slower than the one after it (Clark et al. 2020; Bao et al. 2022).
    A parameter with an attribute `lr_scale`, as techniques add, has that many times the schedule's rate whatever its
    layer, no decay, and never Muon's steps.
    """
    from timm.optim import Muon, param_groups_layer_decay, param_groups_weight_decay

    skip: set[str] = getattr(model, "no_weight_decay", set)()
    # Muon is for matrices inside the model: what is looked up or read out takes the fallback.
    muon = {"fallback_list": tuple(f"{name}.weight" for name in classifier_names(model)), "fallback_no_weight_decay": True}
    kept = {"no_weight_decay_list": tuple(skip), **(muon if config.optimizer == "muon" else {})}
    groups: Any
    if config.layer_decay < 1.0:
        groups = param_groups_layer_decay(model, config.weight_decay, layer_decay=config.layer_decay, **kept)
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, **kept)
    groups = _with_own_rates(model, groups)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.lr, nesterov=True, adjust_lr_fn="match_rms_adamw")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


def _with_own_rates(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, with a group more for each `lr_scale` that parameters ask for, which then stand in no other."""
    own: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and hasattr(parameter, "lr_scale"):
            own.setdefault(float(parameter.lr_scale), []).append(parameter)
    moved = {id(parameter) for parameters in own.values() for parameter in parameters}
    left = [{**group, "params": [p for p in group["params"] if id(p) not in moved]} for group in groups]
    added = [{"params": p, "weight_decay": 0.0, "lr_scale": scale, "use_fallback": True} for scale, p in own.items()]
    return [group for group in left if group["params"]] + added


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
