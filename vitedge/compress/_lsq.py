"""What LSQ puts into a model: quantizers whose step is a parameter, the layers that use them, and what they become in the end.

Forward, a quantizer computes what `vitedge.numerics.fake_quantize` does, and so what the converted model and a runtime do,
to the bit. Backward, with v = x / s and an integer zero point z = round(-beta / s) (0 where there is no offset beta):

                          lowest - z < v < highest - z     v <= lowest - z     v >= highest - z
    d x~ / d x            1                                0                   0
    d x~ / d s            round(v) - v                     lowest              highest
    d x~ / d beta         0                                1                   1

which is equations 3 and 5 of Esser et al. 2020 (lowest = -Q_N, highest = Q_P) and, with beta, equations 5 and 6 of Bhalgat et
al. 2020 taken at the offset -s z, which is always a whole number of steps: zero is exact, and rounding z at the end changes nothing.

Choices of this implementation:
- The parameter is log s, as Jain et al. 2020 (arXiv:1903.08066, section 5.2 and appendix B) found best with Adam: s stays
  positive, and a step of the optimizer changes it by a share of itself, whether s is 0.001 or 1. The gradient by s is LSQ's.
- Weights use all of -2^(b-1)..2^(b-1)-1, as the paper and ONNX do, not the narrow grid: of 2 bits it would lose a quarter.
- What goes into a linear layer, on both sides of zero as LayerNorm's and GELU's outputs are, is unsigned with an offset: uint8
  activations by int8 weights is the product that x86 and ARM kernels are made for, and an offset fits unlike sides. Of the
  products of attention, weights after softmax are unsigned without an offset, queries, keys and values signed: OpenVINO's
  fused attention takes those three as int8 (with an offset it goes back to float32 for the query), ONNX Runtime any.
- Rounding is computed in the steps' own type, float32, under autocast too: a bfloat16 v has not the bits to be rounded to 8.
Shapes: B batch, C channels or classes, H height, W width, O rows (outputs) of a weight, I inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.models.quantized import ActivationQuantizer, LearnsToRound, QuantizedLinear, QuantizedPatchEmbedding, quantized_layer
from vitedge.numerics import Grid, quantize

# Which activations have a sign, and which an offset.
OFFSET, SIGNED, POSITIVE = "offset", "signed", "positive"
SLOTS = {"on_query": SIGNED, "on_key": SIGNED, "on_weights": POSITIVE, "on_value": SIGNED}


class Rounding(torch.autograd.Function):  # type: ignore[misc]  # the library carries no types
    """Fake-quantization with LSQ's gradients; one node of the graph, which keeps x as it came and no intermediate results."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor | None, lowest: int, highest: int, gradient_scale: float
    ) -> torch.Tensor:
        """The shape and type of x.

        Args:
            x: Any shape.
            step: s, a scalar or (O, 1) for x of (O, I); the type computed in.
            offset: beta, a scalar, or None.
            lowest, highest: The grid's.
            gradient_scale: What the gradients of step and offset are multiplied by.
        """
        ctx.save_for_backward(x, step, offset)
        ctx.lowest, ctx.highest, ctx.gradient_scale = lowest, highest, gradient_scale
        rounded = (x.to(step.dtype) / step).round_()
        if offset is None:
            rounded.clamp_(lowest, highest)
        else:
            zero_point = zero_point_of(step, offset, lowest, highest)
            rounded.add_(zero_point).clamp_(lowest, highest).sub_(zero_point)
        return rounded.mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The table above, times `grad`; those of step and offset summed and scaled."""
        x, step, offset = ctx.saved_tensors
        zero_point = 0 if offset is None else zero_point_of(step, offset, ctx.lowest, ctx.highest)
        wide, v = grad.to(step.dtype), x.to(step.dtype) / step
        below, above = v <= ctx.lowest - zero_point, v >= ctx.highest - zero_point
        by_step = (v.round() - v).masked_fill_(below, ctx.lowest).masked_fill_(above, ctx.highest).mul_(wide)
        outside = below.logical_or_(above)
        grad_step = by_step.sum_to_size(step.shape) * ctx.gradient_scale
        grad_offset = None if offset is None else torch.where(outside, wide, 0.0).sum() * ctx.gradient_scale
        grad_x = grad.masked_fill(outside, 0.0) if ctx.needs_input_grad[0] else None
        return grad_x, grad_step, grad_offset, None, None, None


def zero_point_of(step: torch.Tensor, offset: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """z = round(-beta / s) on the grid, in the step's type; straight-through as a function of beta."""
    return torch.round(-offset / step).clamp(lowest, highest)


class LearnedQuantizer(LearnsToRound, nn.Module):  # type: ignore[misc]
    """Rounds to a grid whose step, and offset where there is one, are learned.

    Args:
        grid: The integers.
        rows: Rows of a weight (O, I), each with a step; None for one step of the whole tensor.
        has_offset: Whether an offset is learned too.
    """

    def __init__(self, grid: Grid, rows: int | None = None, has_offset: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.log_step = nn.Parameter(torch.zeros(() if rows is None else (rows, 1)))
        self.offset = nn.Parameter(torch.zeros(())) if has_offset else None

    def start(self, step: torch.Tensor, offset: torch.Tensor, lr_scale: float) -> None:
        """Begin with these; a step's learning rate is relative to itself, an offset's to the whole range."""
        with torch.no_grad():
            self.log_step.copy_(step.reshape(self.log_step.shape).log())
            self.log_step.lr_scale = lr_scale
            if self.offset is not None:
                self.offset.copy_(offset)
                self.offset.lr_scale = lr_scale * float(step) * (self.grid.highest - self.grid.lowest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape and type, rounded; an activation's first axis is the batch."""
        sharing = x.shape[-1] if self.log_step.ndim else x.numel() // max(1, len(x))
        scale = 1.0 / math.sqrt(max(1, sharing) * self.grid.highest)
        rounded: torch.Tensor = Rounding.apply(x, self.log_step.exp(), self.offset, self.grid.lowest, self.grid.highest, scale)
        return rounded

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def frozen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (int32) that it rounds with now, both () or (O, 1)."""
        step = self.log_step.exp()
        zero = torch.zeros_like(step) if self.offset is None else zero_point_of(step, self.offset, self.grid.lowest, self.grid.highest)
        return step, zero.to(torch.int32)


class LearnedLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer, its weight and bias under their own names, that rounds its weight and what comes in."""

    def __init__(self, layer: Any, bits: int, inputs: LearnedQuantizer) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.rows, self.inputs = LearnedQuantizer(Grid(bits), rows=len(layer.weight)), inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O)."""
        return F.linear(self.inputs(x), self.rows(self.weight), self.bias)


class LearnedPatchEmbedding(nn.Conv2d):  # type: ignore[misc]
    """A patch embedding's convolution that rounds its weight and what comes in."""

    def __init__(self, layer: Any, bits: int, inputs: LearnedQuantizer) -> None:
        has_bias = layer.bias is not None
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, bias=has_bias, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.rows, self.inputs = LearnedQuantizer(Grid(bits), rows=len(layer.weight)), inputs

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """BCHW to BOhw."""
        weight = self.rows(self.weight.flatten(1)).reshape(self.weight.shape)
        return F.conv2d(self.inputs(x_BCHW), weight, self.bias, self.stride)


def convert(model: nn.Module) -> nn.Module:
    """Put integers and scales where a prepared model rounds, in place; it computes the same."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, (LearnedLinear, LearnedPatchEmbedding)):
            made = quantized_layer(module, {"bits": module.rows.grid.bits, "signed": True, "group": None}, _converted(module.inputs))
            linear: QuantizedLinear = made.linear if isinstance(made, QuantizedPatchEmbedding) else made
            scale, zero_point = module.rows.frozen()
            weight: Any = linear.weight
            weight.set(quantize(module.weight.detach().flatten(1), scale, zero_point, module.rows.grid).T, scale)
        elif isinstance(module, LearnedQuantizer) and leaf in SLOTS:
            made = _converted(module)
        else:
            continue
        setattr(model.get_submodule(parent), leaf, made.train(module.training))
    return model


def _converted(quantizer: LearnedQuantizer) -> ActivationQuantizer:
    made = ActivationQuantizer(quantizer.grid.bits, quantizer.grid.signed)
    made.to(quantizer.log_step.device)
    return made.set(*quantizer.frozen())
