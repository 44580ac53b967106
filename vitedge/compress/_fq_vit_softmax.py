"""Log-int-softmax: attention in integers from 8-bit scores to weights that are powers of two.

Lin et al. 2022, "FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer" (arXiv:2111.13824), section 3.4; the
exponential is I-BERT's (Kim et al. 2021, arXiv:2101.01321, section 3.4). All integers lie in float32, where those below 2^24
are exact, so that no operation here rounds: PyTorch and every runtime get the same integers, in whatever order they
add and whatever they fuse. Shapes: B batch, H heads, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitedge.models.quantized import ActivationQuantizer

SCORE_BITS = 8
# I-BERT, equation 11: exp(p) = A ((p + B)^2 + C) within 1.9e-3 for p in -ln 2..0.
A, B, C = 0.3585, 1.353, 0.344 / 0.3585
# 181 / 128 is the square root of 2 less 1.1e-4 of it: where two powers of two are equally near in log2.
ROOT_TWO, ROOT_TWO_UNIT = 181, 128
EXACT_BITS = 24  # of float32's significand
LN2_UNITS = 1024  # the most units that ln 2 is divided into
MOST_SHIFT = 15  # from there on one step of the scores is more than any exponential but the greatest survives


def least_step() -> float:
    """The finest step of scores that is of use: below it exp changes by less than the polynomial's own error."""
    return math.log(2) / LN2_UNITS


@dataclass(frozen=True)
class IntegerExp:
    """The integers of i-exp for scores of one step and rows of one length.

    A distance d from the row's greatest score, 0..255, becomes d << shift units of which `ln2` make up ln 2. With
    p = q ln2 + r it is `((r + b)^2 + c) >> (q - rise)`, at most 2^`bits`; the sum of a row stays below 2^24.

    Attributes:
        shift, ln2, b, c: Of the units.
        rise: Left shift of the polynomial where q is 0; negative for a right shift.
        bits: Of the result.
    """

    shift: int
    ln2: int
    b: int
    c: int
    rise: int
    bits: int

    @classmethod
    def of(cls, step: float, tokens: int) -> IntegerExp:
        """The integers for a step of scores, at least `least_step()`, and so many of them in a row."""
        shift = min(max(math.floor(math.log2(LN2_UNITS * step / math.log(2))), 0), MOST_SHIFT)
        unit = step / 2**shift
        b, c = round(B / unit), max(round(C / unit**2), 1)
        # 181 times an exponential must be exact too, which 16 bits leave room for.
        bits = min(16, EXACT_BITS - math.ceil(math.log2(tokens)))
        return cls(shift, max(round(math.log(2) / unit), 1), b, c, bits - math.ceil(math.log2(b**2 + c)), bits)

    @property
    def last(self) -> int:
        """The q from which on every result is 0."""
        return self.bits + 1

    @property
    def greatest(self) -> int:
        """The exponential of distance 0."""
        return math.floor((self.b**2 + self.c) * 2.0**self.rise)

    def __call__(self, distance: torch.Tensor) -> torch.Tensor:
        """Exponentials, integers in float32, of distances, the same; any shape."""
        units = (distance * 2**self.shift).clamp(max=self.last * self.ln2 + self.ln2 - 1)
        # Half a unit keeps the quotient away from integers, so that a product with the inverse is as good as a division.
        q = torch.floor((units + 0.5) * (1 / self.ln2))
        r = q * self.ln2 - units
        root = r + self.b
        return torch.floor((root * root + self.c) * torch.exp2(self.rise - q))


def log2_weights(exponentials: torch.Tensor, total: torch.Tensor | int, bits: int) -> torch.Tensor:
    """Powers of two 2^-k, k = clamp(round(-log2(e / sum)), 0, 2^bits - 1), the shape of e.

    The code k is found bit by bit, as a priority encoder does it and with no logarithm: k is at least j where the sum is
    at least 2^(j - 1/2) e, a comparison of integers. An exponential of 0 gets the last code.

    Args:
        exponentials: Integers in float32, up to 2^16.
        total: Their sums, up to 2^24, broadcasting; or what else they are to be compared with, at least the greatest of them.
        bits: Of the codes.
    """
    threshold = exponentials * ROOT_TWO
    total = total * (2 * ROOT_TWO_UNIT)
    first = 2.0 ** -(2 ** (bits - 1))
    weights = torch.where(threshold <= total * first, first, 1.0)
    for bit in reversed(range(bits - 1)):
        shifted = weights * 2.0 ** -(2**bit)
        weights = torch.where(threshold <= total * shifted, shifted, weights)
    return weights


class LogIntSoftmax(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Softmax of scores rounded to 8 bits, in integers, with weights rounded in log2.

    Args:
        step: Of the scores' integers.
        zero_point: Of the scores' integers.
        tokens: Scores in a row.
        bits: Of the codes.
        normalize: Codes are counted from the row's greatest weight, which so has no error, and a row of weights is divided by its sum,
            which is exact; else they are counted from 1, and rounding leaves the sum of a row between 0.7 and 1.4.
    """

    def __init__(self, step: float, zero_point: int, tokens: int, bits: int = 4, normalize: bool = False) -> None:
        super().__init__()
        self.step, self.zero_point, self.tokens, self.bits, self.normalize = step, zero_point, tokens, bits, normalize
        self.exp = IntegerExp.of(step, tokens)
        self.inputs = ActivationQuantizer(SCORE_BITS, signed=False).set(torch.tensor(1.0), torch.tensor(zero_point))

    def forward(self, scores_BHNN: torch.Tensor) -> torch.Tensor:
        """Weights in the shape of the scores: powers of two, or powers of two times one factor for the row."""
        integers_BHNN = self.inputs(scores_BHNN / self.step)
        exponentials_BHNN = self.exp(integers_BHNN.amax(-1, keepdim=True) - integers_BHNN)
        if not self.normalize:
            return log2_weights(exponentials_BHNN, exponentials_BHNN.sum(-1, keepdim=True), self.bits)
        weights_BHNN = log2_weights(exponentials_BHNN, self.exp.greatest, self.bits)
        return weights_BHNN / weights_BHNN.sum(-1, keepdim=True)

    def describe(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "step": self.step,
            "zero_point": self.zero_point,
            "tokens": self.tokens,
            "bits": self.bits,
            "normalize": self.normalize,
        }
