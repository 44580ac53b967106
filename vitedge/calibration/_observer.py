"""What every observer does, and min-max. Shapes: C channels (1 per tensor), N values of a batch in one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from vitedge.errors import InputError
from vitedge.numerics import Grid


class Observer(ABC):
    """Sees values and says which range of them to quantize.

    Args:
        grid: The integers they will become.
        symmetric: Whether the range will lie symmetric about 0.
        axis: The channels' axis, each with a range of its own; None for one range.
    """

    def __init__(self, grid: Grid, symmetric: bool, axis: int | None = None) -> None:
        self.grid, self.symmetric, self.axis = grid, symmetric, axis
        self._channels = 0

    def observe(self, x: torch.Tensor) -> None:
        """Takes in a batch of any shape, on any device; of the axis' length where there is an axis.

        Raises:
            InputError: When it is empty, has an infinite value or a NaN, or another number of channels than before.
        """
        if not x.numel():
            raise InputError("calibration batch", expected="values", found=f"none in {tuple(x.shape)}", fix="pass a batch that has some")
        x = x.detach()
        rows_CN = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
        if not bool(torch.isfinite(rows_CN).all()):
            raise InputError(
                "calibration batch", expected="finite values", found="infinite ones or NaN", fix="find the layer that diverged"
            )
        if self._channels not in (0, len(rows_CN)):
            raise InputError("calibration batch", expected=f"{self._channels} channels", found=f"{len(rows_CN)}", fix="check the axis")
        self._add(rows_CN)
        self._channels = len(rows_CN)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high, float32 on the CPU: shape () per tensor, (C,) per channel.

        Raises:
            InputError: When nothing was observed.
        """
        if not self._channels:
            raise InputError("calibration", expected="at least one batch", found="none", fix="show the observer some images")
        low_C, high_C = (bound.float() for bound in self._bounds())
        return (low_C[0], high_C[0]) if self.axis is None else (low_C, high_C)

    @abstractmethod
    def _add(self, rows_CN: torch.Tensor) -> None: ...

    @abstractmethod
    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor]: ...


class MinMax(Observer):
    """Everything that was seen: the least and the greatest value."""

    _low: torch.Tensor
    _high: torch.Tensor

    def _add(self, rows_CN: torch.Tensor) -> None:
        low, high = (bound.double().cpu() for bound in torch.aminmax(rows_CN, dim=1))
        self._low = torch.minimum(self._low, low) if self._channels else low
        self._high = torch.maximum(self._high, high) if self._channels else high

    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._low, self._high
