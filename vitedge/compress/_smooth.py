"""Where a ViT can be smoothed, by how much, and the smoothing itself.

Folds are known by module names, so that they can be done on a copy of the model as well.
Shapes: B batch, C input channels of a linear layer, O its outputs, I its inputs (C of them), L classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vitedge.calibration import observer
from vitedge.errors import UsageError, VitedgeError
from vitedge.models.heads import classifier_names
from vitedge.models.quantized import rounds
from vitedge.models.tied import TiedAttention, TiedMlp
from vitedge.numerics import Grid

TOLERANCE = 1e-5  # of the largest logit
ACTIVATIONS = Grid(8, signed=False)  # as in the runtimes' static int8
_BATCH = 32
Spans = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Fold:
    """A linear map and the linear layers that read its result.

    Attributes:
        kind: norm1 | norm2 | norm | value.
        group: The block, by name, or `head`.
        source: Name of the LayerNorm; of qkv where the kind is value, whose last third makes the values.
        readers: Names of the linear layers.
    """

    kind: str
    group: str
    source: str
    readers: tuple[str, ...]


def find_folds(model: nn.Module, kinds: Sequence[str]) -> list[Fold]:
    """The folds of these kinds in a timm ViT, in the model's order.

    Raises:
        UsageError: There are no transformer blocks, the model is quantized, or a fold's layers are not what it needs.
    """
    if rounds(model):
        raise UsageError("smooth", expected="a float model", found="a quantized one", fix="put `smooth` before the step that quantizes")
    blocks = [n for n, m in model.named_modules() if all(hasattr(m, part) for part in ("norm1", "attn", "norm2", "mlp"))]
    if not blocks:
        raise UsageError(
            "smooth",
            expected="transformer blocks, with a LayerNorm before their linear layers",
            found=f"none in {type(model).__name__}",
            fix="remove the step, or choose a ViT or DeiT as model.arch",
        )
    found = []
    for block in blocks:
        found += [
            Fold("norm1", block, f"{block}.norm1", (f"{block}.attn.qkv",)),
            Fold("value", block, f"{block}.attn.qkv", (f"{block}.attn.proj",)),
            Fold("norm2", block, f"{block}.norm2", (f"{block}.mlp.fc1",)),
        ]
    last = "fc_norm" if isinstance(getattr(model, "fc_norm", None), nn.LayerNorm) else "norm"
    found = [fold for fold in [*found, Fold("norm", "head", last, classifier_names(model))] if fold.kind in kinds]
    for fold in found:
        _check(model, fold)
    return found


def _check(model: nn.Module, fold: Fold) -> None:
    """Refuse a fold whose layers are not plain ones, or that has something between them which does not scale."""
    part = f"{fold.group}.{'mlp' if fold.kind == 'norm2' else 'attn'}"
    if fold.kind != "norm" and isinstance(shared := _module(model, part), (TiedAttention, TiedMlp)):
        raise _refusal(fold, part, "weights that are used once, and so can be scaled for one use", shared)
    source, readers = _module(model, fold.source), [_module(model, name) for name in fold.readers]
    plain = [*zip(fold.readers, readers, strict=True), *([(fold.source, source)] if fold.kind == "value" else [])]
    for name, module in plain:
        # A subclass may do more than a product with its weight, as layers under quantization-aware training do.
        if type(module) is not nn.Linear:
            raise _refusal(fold, name, "a plain linear layer in float", module)
    if fold.kind != "value" and not (isinstance(source, nn.LayerNorm) and source.weight is not None):
        raise _refusal(fold, fold.source, f"a LayerNorm with weights before {' and '.join(fold.readers)}", source)
    between: dict[str, Any] = {}
    if fold.kind == "norm":
        between["attn_pool"] = getattr(model, "attn_pool", None)
    if fold.kind in ("norm1", "value"):
        attention: Any = model.get_submodule(f"{fold.group}.attn")
        between |= {f"{fold.group}.attn.gate": getattr(attention, "gate", None)} if fold.kind == "norm1" else {}
        between |= {f"{fold.group}.attn.norm": getattr(attention, "norm", None)} if fold.kind == "value" else {}
    for name, module in between.items():
        if module is not None and not isinstance(module, nn.Identity):
            raise _refusal(fold, name, f"nothing else between {fold.source} and {', '.join(fold.readers)}", module)
    if fold.kind == "value" and source.out_features != 3 * readers[0].in_features:
        raise _refusal(fold, fold.source, f"queries, keys and values of {readers[0].in_features} channels each", source)


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _refusal(fold: Fold, where: str, expected: str, found: Any) -> UsageError:
    text = "nothing" if found is None else str(found) if type(found) is nn.Linear else type(found).__name__
    return UsageError(
        f"smooth: {where}",
        expected=expected,
        found=text,
        fix=f"put `smooth` before the step that changed it, or leave {fold.kind} out of smooth.folds",
    )


def run(model: nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Logits BL, float32, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(x.to(device)).float().cpu() for x in x_BCHW.split(_BATCH)])


def measure(model: nn.Module, folds: Sequence[Fold], x_BCHW: torch.Tensor) -> tuple[Spans, torch.Tensor]:
    """The least and the greatest value (C,) of each channel that goes into each reader, and the logits BL.

    Raises:
        InputError: A value is infinite or NaN.
    """
    observers = {name: observer("minmax", ACTIVATIONS, False, axis=-1) for fold in folds for name in fold.readers}

    def look(module: nn.Module, inputs: tuple[torch.Tensor], seen: Any) -> None:
        seen.observe(inputs[0])

    with contextlib.ExitStack() as stack:
        for name, seen in observers.items():
            stack.callback(model.get_submodule(name).register_forward_pre_hook(partial(look, seen=seen)).remove)
        logits_BL = run(model, x_BCHW)
    return {name: seen.range() for name, seen in observers.items()}, logits_BL


def equation_4(activation_C: torch.Tensor, weight_C: torch.Tensor, alpha: float, floor: float) -> torch.Tensor:
    """`max|X_j|^alpha / max|W_j|^(1 - alpha)` of Xiao et al. 2023, float64 (C,), kept between floor and 1 / floor.

    A channel that is always 0, or that nothing reads, has nothing to move: its factor is 1.

    Args:
        activation_C: max|X_j|.
        weight_C: max|W_j|.
        alpha: 0 to 1.
        floor: 0 to 1.
    """
    x_C, w_C = activation_C.double(), weight_C.double()
    s_C = (x_C**alpha / w_C ** (1 - alpha)).clamp(floor, 1 / floor)
    return torch.where((x_C > 0) & (w_C > 0), s_C, 1.0)


def smoothing_factors(model: nn.Module, fold: Fold, spans: Spans, alpha: float | None, floor: float) -> torch.Tensor:
    """The factors s, float64 (C,), on the readers' device; ones where alpha is None."""
    weights = [weight_of(model, name) for name in fold.readers]
    weight_C = torch.stack([w_OI.double().abs().amax(0) for w_OI in weights]).amax(0)
    if alpha is None:
        return torch.ones_like(weight_C)
    return equation_4(reach(fold, spans).to(weight_C.device), weight_C, alpha, floor)


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    linear: Any = model.get_submodule(name)
    weight_OI: torch.Tensor = linear.weight.detach()
    return weight_OI


def reach(fold: Fold, spans: Spans) -> torch.Tensor:
    """max|X_j| over all readers, float64 (C,)."""
    return torch.stack([bound.double().abs() for name in fold.readers for bound in spans[name]]).amax(0)


def fold_(model: nn.Module, fold: Fold, s_C: torch.Tensor) -> None:
    """Divide what the source makes by s and multiply the readers' columns with it, in float64, in place."""
    source: Any = model.get_submodule(fold.source)
    with torch.no_grad():
        for parameter in (source.weight, source.bias):
            if parameter is not None:
                made = parameter[-len(s_C) :] if fold.kind == "value" else parameter
                made.copy_(made.double() / (s_C[:, None] if made.ndim == 2 else s_C))
        for name in fold.readers:
            reader: Any = model.get_submodule(name)
            reader.weight.copy_(reader.weight.double() * s_C)


def check_unchanged(before_BL: torch.Tensor, after_BL: torch.Tensor) -> float:
    """Largest difference of a logit over the largest logit.

    Raises:
        VitedgeError: It is above `TOLERANCE`.
    """
    largest, difference = float(before_BL.abs().max()), float((after_BL.double() - before_BL.double()).abs().max())
    if not difference <= TOLERANCE * largest:
        raise VitedgeError(
            "smooth",
            expected=f"logits unchanged to {TOLERANCE:g} of the largest",
            found=f"a change of {difference / largest if largest else math.inf:.1e}",
            fix="leave out those smooth.folds that are not exact in this architecture, as where blocks share weights or norms come last",
        )
    return difference / largest if largest else 0.0


def describe(fold: Fold, spans: Spans, alpha: float | None, s_C: torch.Tensor) -> dict[str, Any]:
    """What was done to one fold, as plain data; `outliers` is the reach of the widest channel over the median one's, before and after."""
    before_C = reach(fold, spans)
    found = [float(reach_C.max() / reach_C.median()) for reach_C in (before_C, before_C / s_C.cpu())]
    outliers = [round(ratio, 3) if math.isfinite(ratio) else None for ratio in found]
    return {"kind": fold.kind, "from": fold.source, "to": list(fold.readers), "alpha": alpha, "outliers": outliers}
