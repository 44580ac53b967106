"""Putting gates into a ViT, what they add to the loss, and taking them out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vitedge.compress import Batch
from vitedge.errors import UsageError
from vitedge.models.blocks import block_names, norms_over, plain_linear
from vitedge.models.gated import READERS, SKIP, Gate, GatedLinear, gated_layers, ungate_
from vitedge.models.heads import classifier_names


def insert(model: nn.Module, where: Sequence[str], soft: bool, lr_scale: float) -> tuple[list[Gate], dict[str, int]]:
    """Put open gates before the layers that read these kinds of units, in place.

    Args:
        model: A timm ViT.
        where: Kinds of units: those of `READERS`, and `skip`.
        soft: Kind of the gates.
        lr_scale: Their learning rate, in times of the schedule's.

    Returns:
        The gates, and how many units of each kind they are for.

    Raises:
        UsageError: The model has gates, is quantized or no ViT, or a layer is not a plain one.
    """
    if gated_layers(model):
        raise UsageError(
            "gates",
            expected="a model without gates",
            found="those of an earlier `gates` step",
            fix="put `prune: {score: gates}` between the two, or name the technique once",
        )
    blocks = block_names(model, "gates")
    kinds: dict[str, list[str]] = {}
    for block in blocks:
        for kind in where:
            for name, norm in norms_over(model.get_submodule(block), kind):
                raise UsageError(
                    f"gates: {block}.{name}",
                    expected=f"no norm over what {kind} would take away",
                    found=type(norm).__name__,
                    fix=f"leave {kind} out of gates.where: `prune` could not cut it",
                )
            if kind != "skip":
                kinds.setdefault(f"{block}.{READERS[kind]}", []).append(kind)
    stream = _stream_readers(model, blocks) if "skip" in where else []
    layers = {name: plain_linear(model, name, "gates") for name in dict.fromkeys([*kinds, *stream])}
    gates, units = [], dict.fromkeys(where, 0)
    shared = None
    if stream:
        shared = _gate(layers[stream[0]], layers[stream[0]].in_features, soft, lr_scale)
        gates.append(shared)
        units["skip"] = layers[stream[0]].in_features
        model.add_module(SKIP, shared)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        own = {}
        for kind in kinds.get(name, ()):
            own[kind] = _gate(layer, owner.num_heads if kind == "heads" else layer.in_features, soft, lr_scale)
            units[kind] += len(own[kind].a)
        gates += own.values()
        setattr(owner, leaf, GatedLinear(layer, own, shared if name in stream else None).train(layer.training))
    return gates, units


def _gate(layer: nn.Linear, units: int, soft: bool, lr_scale: float) -> Gate:
    gate: Gate = Gate(units, layer.in_features // units, soft).to(device=layer.weight.device, dtype=layer.weight.dtype)
    gate.a.lr_scale = lr_scale
    gate.train(layer.training)
    return gate


def _stream_readers(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Every layer that reads the residual stream, by name: qkv and fc1 of all blocks, and the classifier's heads.

    Raises:
        UsageError: One of them is not plain, they do not read the same channels, or something else reads the stream.
    """
    names = [f"{block}.{reader}" for block in blocks for reader in ("attn.qkv", "mlp.fc1")] + [*classifier_names(model)]
    widths = {plain_linear(model, name, "gates").in_features for name in names}
    pooling = getattr(model, "attn_pool", None)
    if len(widths) > 1 or pooling is not None:
        raise UsageError(
            "gates.where: skip",
            expected="layers that all read the same channels, and nothing else that does",
            found=f"widths {', '.join(map(str, sorted(widths)))}" if pooling is None else type(pooling).__name__,
            fix="leave skip out of gates.where, or put `gates` before the step that changed the layers",
        )
    return names


def check_there(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse a model in which another step took gated layers away.

    Args:
        model: The model.
        names: Of the layers that were given gates.

    Raises:
        UsageError: One of them has no gates any more.
    """
    here = gated_layers(model)
    gone = [name for name in names if name not in here]
    if gone:
        raise UsageError(
            "gates",
            expected=f"gates before {gone[0]}, as this step put them there",
            found="a later step that changed the layer",
            fix="put `prune: {score: gates}` before that step",
        )


class Sparsity:
    """`weight` times the sum over all gates of how much they let through, added to each image's loss.

    For plain gates it is `lambda ||a||_1` of Zhu et al. 2021; for soft ones the number of units that are open, in expectation.

    Args:
        gates: All of them.
        weight: lambda.
    """

    def __init__(self, gates: Sequence[Gate], weight: float) -> None:
        self.gates, self.weight = gates, weight
        self.label_share = 1.0

    def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The term per image, float32 (B,): the same for each."""
        total = torch.stack([gate.expected().sum() for gate in self.gates]).sum().float()
        return (self.weight * total).expand(len(batch.x_BCHW))


class Annealing:
    """Before each optimizer step: checks that the gates are there, and lowers the temperature of soft ones from 1 to `final`.

    The temperature at step t of T is `final^(t / (T - 1))`: what is open at the end is nearly 1, the rest nearly 0.

    Args:
        model: The model.
        names: Of the layers with gates.
        gates: All of them.
        final: Temperature of the last step.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], gates: Sequence[Gate], final: float) -> None:
        self.model, self.names, self.gates, self.final = model, names, gates, final

    def __call__(self, step: int, steps: int) -> None:
        """Called with the step, from 0, and their number."""
        check_there(self.model, self.names)
        temperature = self.final ** (step / max(1, steps - 1))
        for gate in self.gates:
            if gate.soft:
                gate.temperature.fill_(temperature)


def fold(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Fold gates that were never cut into the weights: the model that is saved is plain, and answers the same.

    Raises:
        UsageError: A layer lost its gates.
    """
    check_there(model, names)
    ungate_(model)
    return model
