"""A linear layer as two thin ones, one after the other: how a weight of low rank is kept and computed with.

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitedge.errors import UsageError


class FactoredLinear(nn.Module):  # type: ignore[misc]  # the library carries no types
    """A linear layer whose weight (O, I) is `left_OR right_RI`, which are never multiplied out.

    It takes R (O + I) multiply-accumulates for a token where the whole weight takes O I.

    Args:
        in_features, out_features: I and O.
        rank: R.
        bias: Whether there is one, (O,), after both.
        device, dtype: Of the weights, as `nn.Linear` takes them.

    Attributes:
        in_features, out_features, rank: I, O and R.
        reduce: I to R, without a bias; its weight is `right_RI`.
        expand: R to O; its weight is `left_OR`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O)."""
        y: torch.Tensor = self.expand(self.reduce(x))
        return y

    def set(self, left_OR: torch.Tensor, right_RI: torch.Tensor) -> FactoredLinear:
        """Take over both factors, in the type of the weights."""
        with torch.no_grad():
            self.expand.weight.copy_(left_OR)
            self.reduce.weight.copy_(right_RI)
        return self


def factored_layer(linear: nn.Linear, rank: int) -> FactoredLinear:
    """What takes a linear layer's place: of its sizes, type, device and mode, with its bias; the factors are still to be set.

    Args:
        linear: Left as it is.
        rank: R.
    """
    weight, bias = linear.weight, linear.bias
    made = FactoredLinear(linear.in_features, linear.out_features, rank, bias is not None, weight.device, weight.dtype)
    for factor in (made.reduce.weight, made.expand.weight):
        factor.requires_grad_(weight.requires_grad)
    if bias is not None:
        with torch.no_grad():
            made.expand.bias.copy_(bias)
        made.expand.bias.requires_grad_(bias.requires_grad)
    made.train(linear.training)
    return made


def rebuild(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Put factored layers, values still to be loaded, where a saved model had them.

    Args:
        model: With a plain linear layer at every one of these names, of whatever size.
        ranks: R by the layer's name.

    Raises:
        UsageError: There is no such layer.
    """
    for name, rank in ranks.items():
        parent, _, leaf = name.rpartition(".")
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise _missing(name, "none") from error
        if type(layer) is not nn.Linear:
            raise _missing(name, type(layer).__name__)
        setattr(model.get_submodule(parent), leaf, factored_layer(layer, rank))
    return model


def _missing(name: str, found: str) -> UsageError:
    return UsageError("checkpoint", expected=f"a linear layer {name}", found=found, fix="train it again")
