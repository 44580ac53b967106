"""Gates: trainable factors on what linear layers read, which at any time can be folded into the layers' weights.

Zhu, Tang and Han 2021, "Vision Transformer Pruning" (arXiv:2104.08500), multiply what goes into qkv, into the projection of
attention and into the second layer of the MLP with `Diag(a)`: a factor that is 0 says that the unit can be cut. Every gate
stands before a linear layer, so that `W (a * x) = (W Diag(a)) x`, and the layer keeps its own name and those of its weights.
Shapes: I input features of a layer, O its outputs, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

# The layer of a block that reads each kind of unit.
READERS = {"qkv_input": "attn.qkv", "value_dims": "attn.proj", "heads": "attn.proj", "mlp": "mlp.fc2"}
SKIP = "skip_gate"  # the one gate that all readers of the residual stream share, a child of the model
OPEN = 3.0  # where a soft gate's logit starts: open to 95 % at temperature 1


class Gate(nn.Module):  # type: ignore[misc]  # the library carries no types
    """A factor for each unit of what comes in.

    Args:
        units: U.
        width: Neighbouring features that are one unit.
        soft: The factor is `sigmoid(a / temperature)` in training and, hardened, 0 or 1 by the sign of `a` else; not soft: it is `a`.

    Attributes:
        a: The parameter (U,); `OPEN`, or 1.
        temperature: A scalar that training lowers from 1; not part of a checkpoint.
    """

    temperature: torch.Tensor

    def __init__(self, units: int, width: int = 1, soft: bool = False) -> None:
        super().__init__()
        self.width, self.soft = width, soft
        self.a = nn.Parameter(torch.full((units,), OPEN if soft else 1.0))
        self.register_buffer("temperature", torch.ones(()), persistent=False)

    def expected(self) -> torch.Tensor:
        """How much of each unit passes, (U,), not negative and with a gradient in either mode: |a|, or the sigmoid."""
        return torch.sigmoid(self.a / self.temperature) if self.soft else self.a.abs()

    def hard(self) -> torch.Tensor:
        """The factors (U,) as they are outside of training."""
        return (self.a > 0).to(self.a.dtype) if self.soft else self.a

    def importance(self) -> torch.Tensor:
        """Of each unit, float64 (U,) on the CPU: |a|, or the sigmoid at temperature 1, which orders units as any other does."""
        a = self.a.detach().double().cpu()
        return torch.sigmoid(a) if self.soft else a.abs()

    def spread(self, factors: torch.Tensor) -> torch.Tensor:
        """Factors of units (U,) as those of features (I,)."""
        return factors if self.width == 1 else factors.repeat_interleave(self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I), the same shape."""
        return x * self.spread(self.expected() if self.soft and self.training else self.hard())


class GatedLinear(nn.Linear):  # type: ignore[misc]  # the library carries no types
    """A linear layer, its weight and bias under their own names, that reads through gates.

    Args:
        layer: The layer as it was.
        gates: By kind of unit.
        shared: A gate that is another module's child.
    """

    def __init__(self, layer: Any, gates: Mapping[str, Gate], shared: Gate | None = None) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.gates = nn.ModuleDict(gates)
        # In a tuple it is no child of this layer: a parameter has one name in a checkpoint.
        self.shared = () if shared is None else (shared,)

    def all_gates(self) -> list[Gate]:
        """Its own gates and the shared one."""
        return [*self.gates.values(), *self.shared]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O)."""
        for gate in self.all_gates():
            x = gate(x)
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def plain(self) -> nn.Linear:
        """The layer without gates that computes what this one does outside of training; it takes over the parameters."""
        factors_I = torch.ones(self.in_features, dtype=torch.float64, device=self.weight.device)
        for gate in self.all_gates():
            factors_I *= gate.spread(gate.hard()).double()
        self.weight.copy_(self.weight.double() * factors_I)
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight, made.bias = self.weight, self.bias
        return made.train(self.training)


def gated_layers(model: nn.Module) -> dict[str, GatedLinear]:
    """The layers that read through gates, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedLinear)}


def skip_gate(model: nn.Module) -> Gate | None:
    """The gate on the residual stream, or None."""
    gate: Gate | None = getattr(model, SKIP, None)
    return gate


def ungate_(model: nn.Module) -> None:
    """Fold all gates into the weights of the layers that read through them, in place: the model is plain again."""
    for name, layer in gated_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.plain())
    if skip_gate(model) is not None:
        delattr(model, SKIP)
