"""Power-of-two factors for what LayerNorm takes in, and LayerNorm on the integers they make.

Lin et al. 2022, FQ-ViT (arXiv:2111.13824), section 3.3. One scale and zero point of the layer and an exponent of each channel:

    X_q = clamp(round(X_c / (2^a_c s)) + z, 0, 2^b - 1)        s = (max X - min X) / (2^b - 1) / 2^A

LayerNorm then sees (X_q - z) << a_c, integers in which s has dropped out. Shapes: S tokens of all images, D channels, A exponents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitedge.models.quantized import ActivationQuantizer
from vitedge.numerics import Grid, fake_quantize, parameters


def layer_grid(low: torch.Tensor, high: torch.Tensor, bits: int, most: int) -> tuple[float, int]:
    """Step s and zero point z of a layer whose values lie in low..high; 2^most s is the step that spans all of them.

    Raises:
        InputError: The range is not finite.
    """
    scale, zero_point = parameters(low, high, Grid(bits, signed=False), symmetric=False)
    # Halved in float64 and stored as a float32 that is not subnormal: the model divides by it.
    step = max(float(scale) / 2**most, float(torch.finfo(torch.float32).tiny))
    return float(torch.tensor(step, dtype=torch.float32)), int(zero_point)


class ExponentSearch:
    """Finds each channel's exponent: that of the least squared error over all that is shown.

    Sums are kept in float64 for every channel and exponent, and no activation is. The clamp is part of the error: without
    it the finest step would win for every channel.

    Args:
        step, zero_point, bits: Of the layer; see `layer_grid`.
        most: The largest exponent A.
    """

    def __init__(self, step: float, zero_point: int, bits: int, most: int) -> None:
        self.step, self.zero_point, self.grid, self.most = step, torch.tensor(zero_point), Grid(bits, signed=False), most
        self.power = 0.0
        self.errors_AD: torch.Tensor | None = None

    def observe(self, x: torch.Tensor) -> None:
        """Takes in a batch whose last axis are the channels."""
        x_SD = x.detach().reshape(-1, x.shape[-1])
        scaled_SD = x_SD / self.step
        errors = []
        for exponent in range(self.most + 1):
            scale = torch.tensor(2.0**exponent)
            rounded_SD = fake_quantize(scaled_SD, scale, self.zero_point, self.grid)
            errors.append((rounded_SD - scaled_SD).double().square().sum(0).cpu())
        found_AD = torch.stack(errors)
        self.errors_AD = found_AD if self.errors_AD is None else self.errors_AD + found_AD
        self.power += float(scaled_SD.double().square().sum())

    def exponents(self) -> torch.Tensor:
        """One per channel, int64 (D,); of equal errors that of the finer step.

        Raises:
            ValueError: Nothing was observed.
        """
        # The first of the least: numpy says so, torch leaves it open.
        return torch.from_numpy(self._errors().numpy().argmin(0))

    def sqnr_db(self) -> tuple[float, float] | None:
        """Of the layer's values with the exponents and with one step for the whole layer; None where one of them is exact."""
        errors_AD = self._errors()
        noise = torch.stack([errors_AD.amin(0).sum(), errors_AD[-1].sum()])
        if not self.power or not bool((noise > 0).all()):
            return None
        own, whole = (10 * torch.log10(self.power / noise)).tolist()
        return own, whole

    def _errors(self) -> torch.Tensor:
        if self.errors_AD is None:
            raise ValueError("exponents of a LayerNorm that has seen nothing")
        return self.errors_AD


class PowerOfTwoLayerNorm(nn.Module):  # type: ignore[misc]  # the library carries no types
    """LayerNorm on integers: what comes in is rounded with a power-of-two factor per channel.

    Since (x - mean) / std does not change with the unit, LayerNorm of the integers with eps / step^2 is that of the values
    they stand for. Their sum is exact in float32 up to 8,224 channels of 8 bits and an exponent of 3; squares are rounded.
    The factors stand outside of the rounding, which has one scale for all channels: OpenVINO 2026.4 cannot quantize the last
    axis by channels, ONNX Runtime does it slowly, and being powers of two they change no bit of the result.

    Args:
        features: D.
        step: s.
        eps: Of the LayerNorm it replaces.
        bits: Of the integers before the shift.
        weight, bias: Whether it has them.
    """

    factor: torch.Tensor

    def __init__(self, features: int, step: float, eps: float, bits: int = 8, weight: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.features, self.step, self.eps, self.bits = features, step, eps, bits
        # Bounds that float32 and a constant row of integers (variance 0) can bear; variances other than 0 are from 1 / D on.
        self.integer_eps = min(max(eps / step**2, 1e-9), 1e30)
        self.inputs = ActivationQuantizer(bits, signed=False)
        self.register_buffer("factor", torch.ones(features))
        self.weight = nn.Parameter(torch.ones(features)) if weight else None
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    @classmethod
    def of(cls, norm: Any, step: float, zero_point: int, bits: int, exponents_D: torch.Tensor) -> PowerOfTwoLayerNorm:
        """The twin of a LayerNorm over the last axis."""
        (features,) = norm.normalized_shape
        made = cls(features, step, norm.eps, bits, norm.weight is not None, norm.bias is not None)
        made.load_state_dict(norm.state_dict(), strict=False)
        made.inputs.set(torch.tensor(1.0), torch.tensor(zero_point))
        made.factor.copy_(torch.exp2(exponents_D.float()))
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D), normalized."""
        integers = self.inputs(x / (self.factor * self.step)) * self.factor
        return nn.functional.layer_norm(integers, (self.features,), self.weight, self.bias, self.integer_eps)

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "features": self.features,
            "step": self.step,
            "eps": self.eps,
            "bits": self.bits,
            "weight": self.weight is not None,
            "bias": self.bias is not None,
        }
