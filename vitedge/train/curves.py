"""The picture of a training: loss and learning rate, validation top-1 of each head, and pace, over all its stages.

Told apart by line style and marker as well as by colour, in the palette of Okabe and Ito (2008), for readers
without colour vision. Drawn on a canvas of its own: no display, and no state of matplotlib's is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _VERMILLION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
_MANY = 100  # points from which on a noisy curve is drawn with its running mean
_MARKERS = 12  # per curve and stage

Curve = list[tuple[np.ndarray, np.ndarray]]
"""Steps over all stages, and values (NaN where not finite), per stage."""


@dataclass(frozen=True)
class _Metrics:
    """The lines of a training by stage.

    Attributes:
        stages: Lines of each stage.
        first: Steps taken before each stage; one more, of all, at the end.
    """

    stages: list[list[dict[str, Any]]]
    first: list[int]

    @classmethod
    def of(cls, lines: list[dict[str, Any]]) -> _Metrics:
        indices = sorted({line["stage"] for line in lines})
        stages = [[line for line in lines if line["stage"] == index] for index in indices]
        first = [0]
        for stage in stages:
            first.append(first[-1] + max(line["step"] for line in stage))
        return cls(stages, first)

    def curve(self, name: str) -> Curve:
        """A metric's curve; empty where no line has a number of it."""
        curve = []
        for first, stage in zip(self.first, self.stages, strict=False):
            points = [(first + line["step"], line[name]) for line in stage if name in line]
            values = np.array([np.nan if value is None else value for _, value in points], dtype=np.float64)
            if np.isfinite(values).any():
                curve.append((np.array([step for step, _ in points]), values))
        return curve

    def note(self) -> str:
        """Steps and time of the whole, and the part of it that was spent waiting for images."""
        timed = [[line for line in stage if line.get("seconds") is not None] for stage in self.stages]
        last = [stage[-1]["seconds"] for stage in timed if stage]
        note = f"{self.first[-1]:,} in all"
        if not last:
            return note
        note += f", {sum(last):.0f} s" if sum(last) < 90 else f", {sum(last) / 60:.1f} min"
        shares = [[line for line in stage if line.get("data_share") is not None] for stage in timed]
        waited = [stage[-1]["data_share"] * stage[-1]["seconds"] for stage in shares if stage]
        return f"{note}, {100 * sum(waited) / sum(last):.0f} % of it waiting for images" if waited and sum(last) else note


def plot_curves(lines: list[dict[str, Any]], title: str) -> Figure | None:
    """Draw a training.

    Args:
        lines: What `vitedge.train.watch.read_metrics` gives.
        title: Written on top.

    Returns:
        The figure, 9 by 3 to 8 inches at 100 dots an inch; None where no line has anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    metrics = _Metrics.of(lines)
    panels: list[tuple[float, Callable[[Axes, _Metrics], None]]] = []
    if metrics.curve("loss") or metrics.curve("lr") or metrics.curve("validation_loss"):
        panels.append((3.0, _loss_panel))
    if metrics.curve("validation_top1"):
        panels.append((2.6, _top1_panel))
    if metrics.curve("images_per_s"):
        panels.append((1.2, _pace_panel))
    if not panels:
        return None
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(9.0, 1.2 + sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold", parse_math=False)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (_, draw_panel) in zip(axes, panels, strict=True):
        draw_panel(ax, metrics)
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        for first in metrics.first[1:-1]:
            ax.axvline(first, color=_GREY, linewidth=1.0, linestyle=(0, (2, 2)))
    if len(metrics.stages) > 1:
        _name_stages(axes[-1], metrics)
    axes[-1].set_xlabel(f"optimizer step ({metrics.note()})")
    axes[-1].set_xlim(0, 1.02 * max(1, metrics.first[-1]))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=9))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def _loss_panel(ax: Axes, metrics: _Metrics) -> None:
    _draw(ax, metrics.curve("loss"), "training loss", _BLUE, "-", "o")
    _draw(ax, metrics.curve("validation_loss"), "validation loss", _VERMILLION, "--", "s")
    ax.set_ylabel("loss")
    handles, labels = ax.get_legend_handles_labels()
    if curve := metrics.curve("lr"):
        right = ax.twinx()
        _draw(right, curve, "learning rate (right)", _GREY, "-.", "", mean=False)
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0.0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        more = right.get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
        ax.set_zorder(right.get_zorder() + 1)  # curves of the loss lie above the learning rate's
        ax.patch.set_visible(False)
    _legend(ax, handles, labels)


def _top1_panel(ax: Axes, metrics: _Metrics) -> None:
    heads = {
        "validation_top1_class": ("class head", _ORANGE, "--", "^"),
        "validation_top1_distill": ("distillation head", _GREEN, ":", "s"),
    }
    drawn = {name: curve for name in heads if (curve := metrics.curve(name))}
    whole = metrics.curve("validation_top1")
    steps, values = np.concatenate([steps for steps, _ in whole]), np.concatenate([values for _, values in whole])
    best = int(np.nanargmax(values))
    name = "average of both heads" if drawn else "top-1"
    _draw(ax, whole, f"{name}, best {values[best]:.2f} % at step {steps[best]:,}", _BLUE, "-", "o", mean=False)
    for head, curve in drawn.items():
        _draw(ax, curve, *heads[head], mean=False)
    ax.plot(steps[best], values[best], marker="*", markersize=13, color=_BLUE, markeredgecolor="white", linestyle="none", zorder=5)
    ax.set_ylabel("validation top-1 (%)")
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, -1.0), min(high, 101.0))  # a margin, but no percentages that cannot be
    _legend(ax, *ax.get_legend_handles_labels())


def _pace_panel(ax: Axes, metrics: _Metrics) -> None:
    curve = metrics.curve("images_per_s")
    _draw(ax, curve, "images/s", _BLUE, "-", "")
    ax.set_ylabel("images/s")
    ax.set_ylim(0.0, 1.15 * max(1.0, *(np.nanmax(values) for _, values in curve)))


def _legend(ax: Axes, handles: list[Any], labels: list[str]) -> None:
    """In a row over the plot, where it hides no curve."""
    ax.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(labels), fontsize="small", frameon=False, borderaxespad=0.2
    )


def _draw(ax: Axes, curve: Curve, label: str, color: str, style: str, marker: str, mean: bool = True) -> None:
    """One curve, each stage a piece of its own; a long noisy one pale, under its running mean."""
    lines = sum(len(values) for _, values in curve)
    window = lines // 50 if mean and lines > _MANY else 1
    label = f"{label}, mean of {window} lines" if window > 1 else label
    for number, (steps, values) in enumerate(curve):
        if window > 1:
            ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            values = _running_mean(values, min(window, len(values)))
        every = max(1, len(values) // _MARKERS)
        ax.plot(
            steps,
            values,
            style,
            color=color,
            label=None if number else label,
            linewidth=1.6,
            marker=marker or ("." if len(values) == 1 else ""),
            markersize=4.5,
            markevery=every,
        )


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite among up to `window` values around each; NaN where there is none."""
    finite, ones = np.isfinite(values), np.ones(window)
    counts = np.convolve(finite, ones, mode="same")
    sums = np.convolve(np.where(finite, values, 0.0), ones, mode="same")
    means: np.ndarray = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)
    return means


def _name_stages(ax: Axes, metrics: _Metrics) -> None:
    """The stages' labels at the foot of the plot, where they have the room."""
    for first, end, stage in zip(metrics.first, metrics.first[1:], metrics.stages, strict=False):
        if end - first > 0.07 * metrics.first[-1]:
            label = stage[0].get("label", f"stage {stage[0]['stage']}")
            ax.text(first, 0.06, f" {label}", transform=ax.get_xaxis_transform(), fontsize="small", color=_GREY, parse_math=False)
