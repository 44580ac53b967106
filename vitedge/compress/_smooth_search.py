"""Which alpha suits a model: every candidate of a grid is judged by what int8 leaves of the logits, or of layers' outputs.

Shapes: B batch, C input channels of a linear layer, O its outputs, I its inputs (C of them), L classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.compress._smooth import ACTIVATIONS, Fold, Spans, fold_, run, smoothing_factors, weight_of
from vitedge.numerics import Grid, PerChannel, fake_quantize, parameters, ranges, spread, sqnr_db

# What the runtimes' static int8 does to a linear layer: one range for its input, one for each output's weights.
WEIGHTS = Grid(8, narrow=True)
OBJECTIVES = {
    "model": "sqnr_db of the logits, with the input (per tensor) and the weight (per channel) of every smoothed layer in int8",
    "block": "sqnr_db of the outputs of a block's smoothed layers, each with its input (per tensor) and weight (per channel) in int8: "
    "the mean of their relative squared errors",
}


def search(
    model: nn.Module,
    folds: Sequence[Fold],
    spans: Spans,
    grid: Sequence[float | None],
    per: str,
    floor: float,
    x_BCHW: torch.Tensor,
    logits_BL: torch.Tensor,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The best alpha of the grid for each group of folds, the first of equal ones, and every candidate's figure as plain data.

    Args:
        model: Not smoothed, in eval mode; it stays as it is.
        folds, spans, logits_BL: Of that model.
        grid: Candidates; None is no smoothing.
        per: `model` | `block`; see `OBJECTIVES`.
        floor: As in `equation_4`.
        x_BCHW: Calibration images.
    """
    groups = list(dict.fromkeys(fold.group for fold in folds))
    if per == "block":
        found = outputs_sqnr_db(model, folds, spans, grid, floor, x_BCHW)
    else:
        found = {"model": [logits_sqnr_db(model, folds, spans, alpha, floor, x_BCHW, logits_BL) for alpha in grid]}
    best = {name: grid[max(range(len(grid)), key=lambda i: figures[i])] for name, figures in found.items()}
    notes = {
        "per": per,
        "objective": OBJECTIVES[per],
        "chosen": best,
        "candidates": {
            name: [
                {"alpha": alpha, "sqnr_db": round(figure, 4) if math.isfinite(figure) else None}
                for alpha, figure in zip(grid, figures, strict=True)
            ]
            for name, figures in found.items()
        },
    }
    return {group: best[group if per == "block" else "model"] for group in groups}, notes


def rounded_weight(weight_OI: torch.Tensor) -> torch.Tensor:
    """What int8 keeps of a weight, with a symmetric range for each output."""
    scale_O, zero_O = parameters(*ranges(weight_OI, PerChannel(0)), WEIGHTS, symmetric=True)
    return fake_quantize(weight_OI, spread(scale_O, 2, 0), spread(zero_O, 2, 0), WEIGHTS)


def rounded_input(x: torch.Tensor, low_C: torch.Tensor, high_C: torch.Tensor) -> torch.Tensor:
    """What uint8 keeps of activations (..., C), with one range for all channels: from the least to the greatest bound."""
    scale, zero_point = parameters(low_C.min(), high_C.max(), ACTIVATIONS, symmetric=False)
    return fake_quantize(x, scale, zero_point, ACTIVATIONS)


def logits_sqnr_db(
    model: nn.Module,
    folds: Sequence[Fold],
    spans: Spans,
    alpha: float | None,
    floor: float,
    x_BCHW: torch.Tensor,
    logits_BL: torch.Tensor,
) -> float:
    """SQNR of the logits when the model is smoothed with alpha and every reader computes in int8; arguments as in `search`."""
    candidate = copy.deepcopy(model)
    for fold in folds:
        s_C = smoothing_factors(model, fold, spans, alpha, floor)
        fold_(candidate, fold, s_C)
        for name in fold.readers:
            low_C, high_C = (bound / s_C.cpu() for bound in spans[name])

            def rounded(module: nn.Module, inputs: tuple[torch.Tensor], low_C: torch.Tensor, high_C: torch.Tensor) -> torch.Tensor:
                return rounded_input(inputs[0], low_C, high_C)

            candidate.get_submodule(name).register_forward_pre_hook(partial(rounded, low_C=low_C, high_C=high_C))
    with torch.no_grad():
        # Only now: qkv is a reader of one fold and the source of another.
        for name in (name for fold in folds for name in fold.readers):
            weight_of(candidate, name).copy_(rounded_weight(weight_of(candidate, name)))
    return sqnr_db(logits_BL, run(candidate, x_BCHW))


def outputs_sqnr_db(
    model: nn.Module, folds: Sequence[Fold], spans: Spans, grid: Sequence[float | None], floor: float, x_BCHW: torch.Tensor
) -> dict[str, list[float]]:
    """For each group of folds and each alpha, the SQNR of its readers' outputs on float inputs; arguments as in `search`.

    It is that of the mean over readers of `sum (y - y_int8)^2 / sum y^2`, so that every layer counts alike.
    """
    signal: dict[str, float] = {name: 0.0 for fold in folds for name in fold.readers}
    noise: dict[str, list[float]] = {name: [0.0] * len(grid) for name in signal}
    factors = {fold: [smoothing_factors(model, fold, spans, alpha, floor) for alpha in grid] for fold in folds}

    def compare(fold: Fold, name: str) -> Callable[..., None]:
        def look(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            signal[name] += float(output.double().square().sum())
            for index, s_C in enumerate(factors[fold]):
                low_C, high_C = (bound / s_C.cpu() for bound in spans[name])
                weight_OI = rounded_weight((module.weight.double() * s_C).float())
                rounded = F.linear(rounded_input((inputs[0].double() / s_C).float(), low_C, high_C), weight_OI, module.bias)
                noise[name][index] += float((output.double() - rounded).square().sum())

        return look

    with contextlib.ExitStack() as stack:
        for fold in folds:
            for name in fold.readers:
                stack.callback(model.get_submodule(name).register_forward_hook(compare(fold, name)).remove)
        run(model, x_BCHW)
    found: dict[str, list[float]] = {}
    for group in dict.fromkeys(fold.group for fold in folds):
        readers = [name for fold in folds if fold.group == group for name in fold.readers]
        shares = [sum(noise[n][i] / signal[n] if signal[n] else 0.0 for n in readers) / len(readers) for i in range(len(grid))]
        found[group] = [-10 * math.log10(share) if share else math.inf for share in shares]
    return found
