"""Fitting the layers that write to the residual stream, block after block.

Shapes: B batch, N tokens, D width of the residual stream, I input features of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from vitedge.compress.refit import TECHNIQUE, Config
from vitedge.errors import InputError, UsageError
from vitedge.models.blocks import block_names, plain_linear
from vitedge.models.evaluating import evaluating
from vitedge.models.factored import FactoredLinear

BATCH = 64  # images of one forward pass
HELD = 5  # one batch of so many chooses the ridge, and has no part in the fits that it chooses among
# Strengths of the ridge, of the mean square of a layer's inputs: from next to no change to next to nothing held back.
RIDGES = tuple(10**power for power in (2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -4.0, -5.0))
LAST = {"attn": "attn.proj", "mlp": "mlp.fc2"}  # of a block's parts, by timm's names


@dataclass
class Sums:
    """What a ridge regression needs of any number of tokens, float64.

    Attributes:
        count: Tokens.
        x_I, e_D: Sums of inputs and of what the stream lacks.
        xx_II, xe_ID: Sums of products.
        ee, target: Sums of squares of what the stream lacks, and of what it is to be.
    """

    count: int = 0
    x_I: Any = 0
    e_D: Any = 0
    xx_II: Any = 0
    xe_ID: Any = 0
    ee: float = 0.0
    target: float = 0.0

    def add(self, x: torch.Tensor, now: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens of a batch: inputs (..., I), the stream as it is and as it is to be (..., D)."""
        x, missing = x.flatten(0, -2), (target - now).flatten(0, -2)
        self.count += len(x)
        self.x_I, self.e_D = self.x_I + x.sum(0).double(), self.e_D + missing.sum(0).double()
        self.xx_II, self.xe_ID = self.xx_II + (x.T @ x).double(), self.xe_ID + (x.T @ missing).double()
        self.ee += float(missing.double().square().sum())
        self.target += float(target.double().square().sum())

    def __add__(self, other: Sums) -> Sums:
        return Sums(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def lacking(self, change_ID: torch.Tensor, bias_D: torch.Tensor) -> float:
        """Sum of squares of what the stream would still lack after a change of weights and bias."""
        inputs_D = self.x_I @ change_ID
        linear = (change_ID * self.xe_ID).sum() + (bias_D * self.e_D).sum()
        square = (change_ID * (self.xx_II @ change_ID)).sum() + 2 * (bias_D * inputs_D).sum() + self.count * bias_D.square().sum()
        return self.ee - 2 * float(linear) + float(square)


@dataclass
class Ridge:
    """Ridge regressions of the same tokens, any strength for the price of one decomposition; the mean is not held back.

    Args:
        sums: Of the tokens.
        centred: Whether there is a bias, which takes the means.
    """

    sums: Sums
    centred: bool
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        sums = self.sums
        self.mean_I, self.mean_D = (sums.x_I / sums.count, sums.e_D / sums.count) if self.centred else (sums.x_I * 0, sums.e_D * 0)
        values, self.vectors_II = torch.linalg.eigh(sums.xx_II - sums.count * torch.outer(self.mean_I, self.mean_I))
        self.values_I = values.clamp(min=0)  # rounding may leave the smallest ones below
        self.rotated_ID = self.vectors_II.T @ (sums.xe_ID - sums.count * torch.outer(self.mean_I, self.mean_D))
        self.scale = float(self.values_I.mean())

    def solve(self, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The change of weights (I, D), transposed as torch keeps them, and of the bias (D,)."""
        change_ID = self.vectors_II @ (self.rotated_ID / (self.values_I + strength * self.scale)[:, None])
        return change_ID, self.mean_D - self.mean_I @ change_ID


def refit_(model: nn.Module, origin: nn.Module | None, config: Config, x_BCHW: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Fit the layers of every block in turn, in place.

    Args:
        model: A pre-norm ViT.
        origin: What it is fitted to: the model before it was changed.
        config: Which layers.
        x_BCHW: Images as model inputs.

    Returns:
        By layer: the `ridge` that was chosen (None: no change), and what the stream after it lacks on the images that chose, as a share of
        the stream (root mean squares), `before` and `after`.

    Raises:
        UsageError, InputError: As `refit.apply`.
    """
    if len(x_BCHW) < 2 * HELD:
        raise UsageError(TECHNIQUE, expected=f"{2 * HELD} train images or more", found=str(len(x_BCHW)), fix="leave the step out")
    layers = {name: {part: _writer(model, name, part) for part in config.layers} for name in block_names(model, TECHNIQUE)}
    if origin is None:
        raise _unchanged()
    weight = next(model.parameters())
    batches = torch.from_numpy(x_BCHW).to(weight.device, weight.dtype).split(max(1, min(BATCH, len(x_BCHW) // HELD)))
    notes: dict[str, dict[str, float | None]] = {}
    with evaluating(model), evaluating(origin.to(weight.device)), torch.no_grad():
        targets, streams = (_into(whole, next(iter(layers)), batches) for whole in (origin, model))
        for name, writers in layers.items():
            pair = model.get_submodule(name), origin.get_submodule(name)
            _check_alike(streams[0], targets[0], name)
            notes.update({f"{name}.{LAST[part]}": note for part, note in _fit_block(name, pair, writers, streams, targets)})
    if not any(note["before"] for note in notes.values()):
        raise _unchanged()
    return notes


def _writer(model: nn.Module, block: str, part: str) -> nn.Linear:
    """The linear layer that is last in a part of a block.

    Raises:
        UsageError: The block is none whose parts are added to the residual stream, or the layer does more than a product.
    """
    from timm.models.vision_transformer import Block

    if type(model.get_submodule(block)) is not Block:
        raise UsageError(
            f"{TECHNIQUE}: {block}",
            expected="timm's pre-norm block",
            found=type(model.get_submodule(block)).__name__,
            fix=f"put `{TECHNIQUE}` before the step that changed it, or choose a ViT or DeiT as model.arch",
        )
    layer = model.get_submodule(f"{block}.{LAST[part]}")
    return layer.expand if isinstance(layer, FactoredLinear) else plain_linear(model, f"{block}.{LAST[part]}", TECHNIQUE)


class _Reached(Exception):  # noqa: N818 - no error
    """A forward pass has come as far as it was to."""


def _into(model: nn.Module, block: str, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What goes into a block, BND for each batch."""
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = model.get_submodule(block).register_forward_pre_hook(stop)
    try:
        for x_BCHW in batches:
            with contextlib.suppress(_Reached):
                model(x_BCHW)
    finally:
        handle.remove()
    return found


@contextlib.contextmanager
def _inputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What goes into a module while it is called."""
    found: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()


def _fit_block(
    name: str,
    pair: tuple[Any, Any],
    writers: Mapping[Any, nn.Linear],
    streams: list[torch.Tensor],
    targets: list[torch.Tensor],
) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Fit a block's layers; the streams go on to what comes out of it.

    Args:
        name: The block's.
        pair: The block, and what it was.
        writers: Its layers to fit, by part.
        streams, targets: What goes into the block, and what went into the other: BND for each batch. They are replaced.
    """
    block, whole = pair
    sums = Sums(), Sums()  # to fit by, and to choose by
    for index, stream in enumerate(streams):
        with _inputs(whole.norm2) as middles:  # the stream between attention and MLP
            targets[index] = whole(targets[index])
        if "attn" in writers:
            with _inputs(writers["attn"]) as inputs, _inputs(block.norm2) as own:
                block(stream)
            sums[_held(index)].add(inputs[0], own[0], middles[0])
    if "attn" in writers:
        yield "attn", _fit(f"{name}.attn", writers["attn"], *sums, block.ls1)
    if "mlp" in writers:
        sums = Sums(), Sums()
        for index, stream in enumerate(streams):
            with _inputs(writers["mlp"]) as inputs:
                own_BND = block(stream)
            sums[_held(index)].add(inputs[0], own_BND, targets[index])
        yield "mlp", _fit(f"{name}.mlp", writers["mlp"], *sums, block.ls2)
    for index, stream in enumerate(streams):
        streams[index] = block(stream)


def _held(index: int) -> int:
    """0 for a batch to fit by, 1 for one to choose by."""
    return int(index % HELD == HELD - 1)


def _fit(where: str, layer: nn.Linear, sums: Sums, held: Sums, layer_scale: nn.Module) -> dict[str, float | None]:
    """Change a layer by the regression that the held images like best, fitted to all of them; nothing where they like no change best.

    Raises:
        InputError: A sum is not finite.
    """
    if not bool(sums.xx_II.isfinite().all() and sums.xe_ID.isfinite().all() and held.xx_II.isfinite().all()):
        raise InputError(f"{TECHNIQUE}: {where}", expected="finite activations", found="others", fix="check the weights")
    centred = layer.bias is not None
    tried = Ridge(sums, centred)
    lacking = {strength: held.lacking(*tried.solve(strength)) for strength in RIDGES}
    best = min(lacking, key=lambda strength: lacking[strength])
    before, after = (float(np.sqrt(max(value, 0.0) / held.target)) for value in (held.ee, lacking[best]))
    if lacking[best] >= held.ee:
        return {"ridge": None, "before": round(before, 6), "after": round(before, 6)}
    change_ID, bias_D = Ridge(sums + held, centred).solve(best)
    scale_D = getattr(layer_scale, "gamma", torch.ones_like(bias_D)).double()
    # What a layer scale multiplies by nothing, the layer cannot change.
    per_output_D = torch.where(scale_D == 0, 0, 1 / scale_D)
    layer.weight += (change_ID * per_output_D).T.to(layer.weight.dtype)
    if centred:
        layer.bias += (bias_D * per_output_D).to(layer.bias.dtype)
    return {"ridge": best, "before": round(before, 6), "after": round(after, 6)}


def _check_alike(stream_BND: torch.Tensor, target_BND: torch.Tensor, block: str) -> None:
    """Refuse streams that cannot be compared.

    Raises:
        UsageError: Tokens or channels of the stream are others than they were.
    """
    if stream_BND.shape != target_BND.shape:
        raise UsageError(
            f"{TECHNIQUE}: {block}",
            expected=f"as many tokens and channels as before, {tuple(target_BND.shape[1:])}",
            found=str(tuple(stream_BND.shape[1:])),
            fix=f"put `{TECHNIQUE}` before the step that took some away, or leave one of the two out",
        )


def _unchanged() -> UsageError:
    return UsageError(
        TECHNIQUE,
        expected="a step before it that changed the model since it was loaded or last trained",
        found="none",
        fix=f"put `{TECHNIQUE}` after one such as `prune`, `decompose` or `activation`",
    )
