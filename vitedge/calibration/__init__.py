"""How a quantization range is chosen from values that arrive batch after batch, in constant memory.

An observer is shown every batch and then asked for a range, which `vitedge.numerics.parameters` turns into scale and zero
point. No activation is kept: min-max and the moving average hold two numbers a channel, the other three a histogram of
fixed size as well (16 bytes a channel for each of its bins, 48 for mse).
"""

from __future__ import annotations

import inspect

from vitedge.calibration._observer import MinMax, Observer
from vitedge.calibration.entropy import Entropy
from vitedge.calibration.moving_average import MovingAverage
from vitedge.calibration.mse import MeanSquaredError
from vitedge.calibration.percentile import Percentile
from vitedge.errors import UsageError, closest
from vitedge.numerics import Grid

_METHODS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MeanSquaredError,
}
METHODS = tuple(_METHODS)


def observer(method: str, grid: Grid, symmetric: bool, axis: int | None = None, **options: float) -> Observer:
    """A new observer.

    Args:
        method: One of `METHODS`.
        grid: The integers the values will become.
        symmetric: Whether the range will lie symmetric about 0.
        axis: The channels' axis, each with a range of its own; None for one range.
        options: `momentum` of moving_average, `percentile` of percentile, `bins` of percentile, entropy and mse.

    Raises:
        UsageError: On an unknown method or option, or an option out of its range.
    """
    if method not in _METHODS:
        raise UsageError(
            "calibration method", expected=" | ".join(METHODS), found=method + closest(method, list(METHODS)), fix="choose one"
        )
    kind = _METHODS[method]
    known = [name for name, option in inspect.signature(kind).parameters.items() if option.kind is option.KEYWORD_ONLY]
    for name in options.keys() - set(known):
        raise UsageError(f"{method}: {name}", expected=" | ".join(known) or "no option", found=name + closest(name, known), fix="remove it")
    return kind(grid, symmetric, axis, **options)
