"""What a PyTorch model holds and does, module by module: weights, multiply-accumulates for one image, bytes as float32.

Counted as a file's are (`vitedge.bench.cost`): matrix products and convolutions, once per use; not normalization, softmax,
activation functions or additions. PyTorch's own counter sees every product that really runs, whatever module it stands in.
Shapes: C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FLOAT_BYTES = 4


@dataclass(frozen=True)
class ModuleCost:
    """What a module and all inside it hold and do.

    Attributes:
        params: Weights, each once however often it is used.
        macs: Multiply-accumulates for one image.
    """

    params: int
    macs: int

    @property
    def bytes(self) -> int:
        """Of the weights as float32."""
        return self.params * FLOAT_BYTES


def count_modules(model: nn.Module, shape_CHW: tuple[int, int, int]) -> dict[str, ModuleCost]:
    """Cost of every module by name, the whole model under `""`; modules that hold and do nothing are left out.

    Args:
        model: Any model; it is left in the mode and with the weights it has.
        shape_CHW: Of one image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    parameter = next(model.parameters())
    x_BCHW = torch.zeros(1, *shape_CHW, device=parameter.device, dtype=parameter.dtype)
    counter: Any = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model.eval()(x_BCHW)
    finally:
        model.train(training)
    # The counter names modules by their path below the class of the model, and counts two operations for a multiply-accumulate.
    root = type(model).__name__
    flops = {path.removeprefix(root).removeprefix("."): sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
    costs = {}
    for name, module in model.named_modules():
        params = sum(p.numel() for p in {*module.parameters()})
        macs = (counter.get_total_flops() if name == "" else flops.get(name, 0)) // 2
        if params or macs:
            costs[name] = ModuleCost(params, macs)
    return costs


def count(model: nn.Module, shape_CHW: tuple[int, int, int]) -> ModuleCost:
    """Cost of the whole model; see `count_modules`."""
    return count_modules(model, shape_CHW)[""]
