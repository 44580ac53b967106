"""Where LSQ rounds in a model, and the steps that it begins with.

Shapes: B batch, C channels or classes, H height, W width, O rows of a weight, I inputs, K candidates, N bins.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.calibration import observer
from vitedge.compress._lsq import OFFSET, SIGNED, SLOTS, LearnedLinear, LearnedPatchEmbedding, LearnedQuantizer
from vitedge.errors import InputError, UsageError, closest
from vitedge.models.attention import open_attention
from vitedge.models.heads import classifier_names
from vitedge.models.quantized import check_roundable, quantized_layer
from vitedge.numerics import Grid, fake_quantize, parameters

if TYPE_CHECKING:
    from vitedge.compress.lsq import Config

TINY = torch.finfo(torch.float32).tiny
BATCH = 64  # images of one forward pass
BINS = 2048
SHARES = 0.9 ** torch.arange(24)  # of the largest value, that a first step's grid may span: 1 down to 0.09


def prepare(model: nn.Module, config: Config, x_BCHW: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    """Put quantizers into a float model, in place, and start their steps; returns notes.

    Args:
        model: On the CPU.
        config: The technique's.
        x_BCHW: Calibration images as model inputs, float32.
        target: Their classes, int64 (B,).

    Raises:
        UsageError: The model is quantized already, has gates or shares weights, or `config` does not fit it.
        InputError: Activations are infinite or NaN.
    """
    check_roundable(model, "lsq")
    kinds, excluded = _find(model, config)
    starts = ("lsq", "mse") if config.start == "best" else (config.start,)
    with _calibrating(model):
        seen = {name: _Seen(kind, Grid(_bits(model, config, name)[1], signed=kind == SIGNED)) for name, kind in kinds.items()}
        float_loss = _watch(model, {name: each.observe for name, each in seen.items()}, x_BCHW, target)
        if "mse" in starts:
            _watch(model, {name: each.observe_again for name, each in seen.items()}, x_BCHW, target)
        quantizers = {name: _insert(model, config, name, seen[name]) for name in kinds}
        losses = {}
        for start in starts:
            _start(model, config, start, seen, quantizers)
            losses[start] = _loss(model, x_BCHW, target)
        best = min(losses, key=lambda start: losses[start])
        if best != starts[-1]:
            _start(model, config, best, seen, quantizers)
    return {
        **config.model_dump(exclude={"exclude"}),
        "start": best,
        "loss_at_start": {"float": round(float_loss, 4), **{start: round(loss, 4) for start, loss in losses.items()}},
        "calibration_images": len(x_BCHW),
        "layers": sum(not name.endswith(tuple(SLOTS)) for name in kinds),
        "attention_inputs": sum(name.endswith(tuple(SLOTS)) for name in kinds),
        "excluded": excluded,
    }


def _find(model: nn.Module, config: Config) -> tuple[dict[str, str], list[str]]:
    """Kinds of what is rounded, by the name of the layer or of the slot in attention; and the names that patterns left out.

    Raises:
        UsageError: A pattern matches none, nothing is left, or a layer cannot be quantized.
    """
    attention = open_attention(model) if config.attention else []
    attention = [name for name in attention if model.get_submodule(name).core is None]  # only softmax has two products
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    kinds = dict.fromkeys(layers, OFFSET) | {f"{name}.{slot}": kind for name in attention for slot, kind in SLOTS.items()}
    for pattern in config.exclude:
        if not fnmatch.filter(kinds, pattern):
            raise UsageError(
                "lsq.exclude",
                expected="patterns that match layers",
                found=f"'{pattern}', which matches none{closest(pattern, list(kinds))}",
                fix="name layers as the model does, such as blocks.0.attn.qkv or blocks.11.mlp.*",
            )
    excluded = [name for name in kinds if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.exclude)]
    kept = {name: kind for name, kind in kinds.items() if name not in excluded}
    if not kept:
        raise UsageError("lsq.exclude", expected="layers to quantize", found="all of them excluded", fix="leave the technique out")
    for name in kept:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            quantized_layer(layer, {"bits": 8}, None)  # says so now if that is no patch embedding, not after training
    return kept, excluded


def _bits(model: nn.Module, config: Config, name: str) -> tuple[int, int]:
    """Bits of a layer's weight and of what goes into it."""
    if name in classifier_names(model) or isinstance(model.get_submodule(name), nn.Conv2d):
        return config.first_last_bits, config.first_last_bits
    return config.weight_bits, config.activation_bits


def _insert(model: nn.Module, config: Config, name: str, seen: _Seen) -> LearnedQuantizer:
    """Put what rounds into the model; returns the quantizer of activations."""
    parent, _, leaf = name.rpartition(".")
    layer, made = model.get_submodule(name), LearnedQuantizer(seen.grid, has_offset=seen.kind == OFFSET)
    new: nn.Module = made
    if isinstance(layer, nn.Linear):
        new = LearnedLinear(layer, _bits(model, config, name)[0], made)
    elif isinstance(layer, nn.Conv2d):
        new = LearnedPatchEmbedding(layer, _bits(model, config, name)[0], made)
    setattr(model.get_submodule(parent), leaf, new.train(layer.training))
    return made


class _Seen:
    """What the calibration images, shown twice, said of one activation: first its ends and mean, then its histogram between them."""

    def __init__(self, kind: str, grid: Grid) -> None:
        self.kind, self.grid = kind, grid
        self.ends = observer("minmax", grid, symmetric=False)
        self.magnitude, self.count = 0.0, 0
        self.counts = torch.zeros(BINS)

    def observe(self, x: torch.Tensor) -> None:
        self.ends.observe(x)
        self.magnitude += float(x.abs().sum(dtype=torch.float64))
        self.count += x.numel()

    def observe_again(self, x: torch.Tensor) -> None:
        low, high = self.ends.range()
        self.counts += torch.histc(x, BINS, float(low), float(high))

    def start(self, method: str) -> tuple[torch.Tensor, torch.Tensor]:
        """First step and offset, scalars.

        The paper's rule is for data on both sides of zero, or on one. With an offset the step is that of the signed grid, and the
        offset is the least value, or its share of the grid's span where that is less than the values'.
        """
        low, high = self.ends.range()
        if method == "mse":
            x_N = low + (high - low) * (torch.arange(BINS) + 0.5) / BINS
            low, high = low.clamp(max=0), high.clamp(min=0)
            if self.kind == OFFSET:
                low_K, high_K = (low * SHARES).repeat_interleave(len(SHARES)), (high * SHARES).repeat(len(SHARES))
            else:
                high_K = torch.maximum(-low, high) * SHARES
                low_K = -high_K if self.kind == SIGNED else torch.zeros_like(high_K)
            step_K, zero_K = parameters(low_K, high_K, self.grid, symmetric=self.kind == SIGNED)
            rounded_KN = fake_quantize(x_N, step_K[:, None], zero_K[:, None], self.grid)
            best = ((rounded_KN - x_N).square() @ self.counts).argmin()
            return step_K[best], -step_K[best] * zero_K[best]
        step = paper_step(
            torch.tensor(self.magnitude / self.count), Grid(self.grid.bits).highest if self.kind == OFFSET else self.grid.highest
        )
        low, high = low.clamp(max=0), high.clamp(min=0)
        span = step * (self.grid.highest - self.grid.lowest)
        return step, low * torch.clamp(span / (high - low).clamp(min=TINY), max=1.0)


def paper_step(mean: torch.Tensor, highest: int) -> torch.Tensor:
    """`2 mean|x| / sqrt(Q_P)`, of Esser et al. 2020, section 2.1; 1 where all is zero."""
    step = 2.0 * mean / math.sqrt(highest)
    return torch.where(step < TINY, 1.0, step).float()


def least_error_step(w_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The step of each row, (O,), that moves its values least, of those that span a share of `SHARES` of them."""
    peak_O = w_OI.abs().amax(1)
    best_O, least_O = torch.ones_like(peak_O), torch.full_like(peak_O, math.inf)
    for share in SHARES:
        step_O, zero_O = parameters(-peak_O * share, peak_O * share, grid, symmetric=True)
        error_O = (fake_quantize(w_OI, step_O[:, None], zero_O[:, None], grid) - w_OI).square().sum(1)
        best_O, least_O = torch.where(error_O < least_O, step_O, best_O), torch.minimum(error_O, least_O)
    return best_O


def _start(model: nn.Module, config: Config, method: str, seen: dict[str, _Seen], quantizers: dict[str, LearnedQuantizer]) -> None:
    for name, quantizer in quantizers.items():
        quantizer.start(*seen[name].start(method), config.step_lr_scale)
        layer = model.get_submodule(name)
        if isinstance(layer, (LearnedLinear, LearnedPatchEmbedding)):
            w_OI, grid = layer.weight.detach().flatten(1), layer.rows.grid
            step = least_error_step(w_OI, grid) if method == "mse" else paper_step(w_OI.abs().mean(1), grid.highest)
            layer.rows.start(step, torch.zeros(()), config.step_lr_scale)


def _watch(model: nn.Module, shown: dict[str, Callable[[torch.Tensor], None]], x_BCHW: torch.Tensor, target: torch.Tensor) -> float:
    """Show what comes in at these modules, with the calibration images, to those functions; returns the model's loss on them."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, observe=observe: observe(inputs[0]))
        for name, observe in shown.items()
    ]
    try:
        return _loss(model, x_BCHW, target)
    finally:
        for hook in hooks:
            hook.remove()


def _loss(model: nn.Module, x_BCHW: torch.Tensor, target: torch.Tensor) -> float:
    """Mean cross-entropy on the calibration images.

    Raises:
        InputError: It is not finite.
    """
    total = sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in zip(x_BCHW.split(BATCH), target.split(BATCH), strict=True))
    if not math.isfinite(total):
        raise InputError("lsq: calibration", expected="a finite loss", found=f"{total}", fix="check the weights")
    return total / len(x_BCHW)


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and the mode that it was in afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
