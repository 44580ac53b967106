"""Pictures of an inspection, 1,000 px wide: LayerNorm inputs, attention on 4-bit grids, SQNR along the network, scores of pruned units.

The first two are Figure 1 of Luo et al. for this model, the last is its Figure 3. Told apart by marker, line style and hatching as well
as by colour, in the palette of Okabe and Ito (2008), for readers without colour vision; drawn on a canvas of its own, without a display.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitedge.artifact import writing
from vitedge.errors import UnavailableError
from vitedge.inspect.attention import BITS, EDGES_LOG2, LEVELS, LOWEST_EXPONENT, PER_OCTAVE, LostValues
from vitedge.inspect.importance import Importance
from vitedge.inspect.ranges import ChannelRanges
from vitedge.inspect.run import Inspection
from vitedge.inspect.sqnr import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _VERMILLION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
_WIDTH, _DPI = 10.0, 100
_WORST = 2  # layers whose channels are drawn
_LABELS = 26  # names along an axis that can still be read
_TITLE = 110  # characters in a line over a picture
_SCORES_LOG10 = (-300.0, 300.0)  # that float64 can draw
NAMES = ("ranges.png", "attention.png", "sqnr.png", "importance.png")


def check_matplotlib() -> None:
    """Refuse to draw where matplotlib is not installed, before any work.

    Raises:
        UnavailableError: It is not.
    """
    from vitedge.host import tool_versions

    if not tool_versions(["matplotlib"]):
        raise UnavailableError(
            "pictures of vitedge inspect",
            expected="matplotlib, of the [torch] extra",
            found="it is not installed",
            fix="run: pip install 'vitedge[torch]', or add --no-pictures",
        )


def write_pictures(found: Inspection, folder: Path) -> list[Path]:
    """Write what there is something to draw of; a picture of an earlier run that is not drawn anew is removed.

    Raises:
        OutputError: The folder cannot be written.
    """
    name = found.subject.looked_at.name
    images = f"{len(found.images.x_BCHW)} train images of {found.images.label}"
    figures: dict[str, Figure] = {}
    if found.norms:
        figures["ranges.png"] = plot_ranges(found.norms, f"LayerNorm inputs of {name}, {images}")
    if found.attentions:
        figures["attention.png"] = plot_attention(found.attentions, f"attention after softmax of {name}, {images}")
    comparisons = [(file.artifact.name, file.comparison) for file in found.files if file.comparison and file.comparison.nodes]
    if comparisons:
        figures["sqnr.png"] = plot_sqnr(comparisons, f"products of quantized files against their float parent, {images}")
    if found.importances:
        build = found.subject.folder.resolve().name if found.subject.folder else name
        figures["importance.png"] = plot_importances(found.importances, f"weights of {build} by importance score, kept and removed")
    for stale in set(NAMES) - set(figures):
        (folder / stale).unlink(missing_ok=True)
    for file_name, figure in figures.items():
        with writing(folder / file_name) as temporary:
            figure.savefig(temporary, format="png")
    return [folder / file_name for file_name in figures]


def plot_ranges(norms: Sequence[ChannelRanges], title: str) -> Figure:
    """Spread of every layer, and below it each channel's range in the layers where it is largest."""
    order = sorted(range(len(norms)), key=lambda position: -norms[position].spread)
    worst = order[:_WORST]
    figure, axes = _panels([2.4, *([2.6] * len(worst))], title)
    spreads = np.array([norm.spread for norm in norms])
    highest = float(np.max(spreads[np.isfinite(spreads)], initial=1.0))
    heights = np.where(np.isfinite(spreads), spreads, 2 * highest)
    colors = [_VERMILLION if position in worst else _BLUE for position in range(len(norms))]
    hatches = ["///" if position in worst else "" for position in range(len(norms))]
    axes[0].bar(np.arange(len(norms)), heights, color=colors, hatch=hatches, edgecolor="white", linewidth=0.5)
    if heights.max() > 30 * heights.min():
        axes[0].set_yscale("log")
    axes[0].set_ylabel("spread")
    axes[0].set_title("widest channel's range over the median channel's, per layer (hatched: drawn below)", fontsize="medium", loc="left")
    _name_layers(axes[0], [norm.tap.layer for norm in norms])
    for ax, position in zip(axes[1:], worst, strict=True):
        _draw_channels(ax, norms[position])
    axes[1].legend(loc="upper right", bbox_to_anchor=(1.0, 1.16), fontsize="small", frameon=False, borderaxespad=0.0)
    axes[-1].set_xlabel("channel")
    return figure


def _draw_channels(ax: Axes, norm: ChannelRanges) -> None:
    channels = np.arange(len(norm.low_D))
    ax.vlines(channels, norm.low_D, norm.high_D, color=_BLUE, linewidth=max(0.6, min(6.0, 600 / len(channels))))
    middle = (float(np.median(norm.low_D)), float(np.median(norm.high_D)))
    for value in middle:
        ax.axhline(
            value, color="black", linewidth=1.0, linestyle=(0, (4, 3)), label="median lowest and highest" if value == middle[0] else None
        )
    widest = norm.widest_channel
    low, high = float(norm.low_D.min()), float(norm.high_D.max())
    at = norm.high_D[widest] if norm.high_D[widest] > -norm.low_D[widest] else norm.low_D[widest]
    on_right = widest > 0.6 * len(channels)
    ax.annotate(
        f"channel {widest}",
        (widest, at),
        xytext=(-10 if on_right else 10, 0),
        textcoords="offset points",
        ha="right" if on_right else "left",
        va="center",
        color=_VERMILLION,
        fontweight="bold",
        annotation_clip=False,
    )
    margin = 0.08 * max(high - low, 1e-12)
    ax.set_ylim(low - margin, high + margin)
    ax.set_xlim(-1, len(channels))
    ax.set_ylabel("lowest to highest")
    text = f"{norm.tap.layer}: spread {norm.spread:.3g} (widest {norm.ranges.max():.3g}, median {np.median(norm.ranges):.3g})"
    ax.set_title(text, fontsize="medium", loc="left", parse_math=False)


def plot_attention(attentions: Sequence[LostValues], title: str) -> Figure:
    """What each grid loses in every layer, and the histogram of the layer where the uniform one loses most, with both grids."""
    figure, axes = _panels([4.2, 2.4], title)
    shares = [(100 * lost.uniform / lost.seen.values, 100 * lost.log2 / lost.seen.values) for lost in attentions]
    worst = max(range(len(attentions)), key=lambda position: shares[position][0])
    _draw_histogram(axes[0], attentions[worst], shares[worst])
    for position, (label, color, style, marker) in enumerate(
        ((f"uniform, {BITS} bits", _VERMILLION, "-", "o"), (f"log2, {BITS} bits", _BLUE, "--", "s"))
    ):
        axes[1].plot([share[position] for share in shares], style, color=color, marker=marker, markersize=5, label=label)
    axes[1].set_ylim(-4, 104)
    axes[1].set_ylabel("values that become 0 (%)")
    axes[1].set_title("per layer", fontsize="medium", loc="left")
    axes[1].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize="small", frameon=False, borderaxespad=0.2)
    _name_layers(axes[1], [lost.seen.tap.layer for lost in attentions])
    return figure


def _draw_histogram(ax: Axes, lost: LostValues, shares: tuple[float, float]) -> None:
    seen = lost.seen
    percent = 100 * seen.counts / seen.values
    ax.bar(EDGES_LOG2[:-1], percent, width=1 / PER_OCTAVE, align="edge", color="#BBBBBB", edgecolor="white", linewidth=0.4)
    top = max(float(percent.max()), 1e-9)
    step = seen.highest / LEVELS
    uniform = np.log2(step * np.arange(1, LEVELS + 1))
    powers = -np.arange(0, LEVELS + 1, dtype=np.float64)
    first = max(float(LOWEST_EXPONENT), float(EDGES_LOG2[np.flatnonzero(seen.counts)[0]]) if seen.counts.any() else 0.0)
    left = min(first, -LEVELS - 0.5) - 0.75
    for levels, height, color, marker, name in (
        (uniform, 1.22, _VERMILLION, "o", f"levels of the uniform grid: {shares[0]:.1f} % of values become 0"),
        (powers, 1.09, _BLUE, "s", f"levels of the log2 grid: {shares[1]:.2g} % of values become 0"),
    ):
        ax.plot(levels, np.full(len(levels), height * top), marker, color=color, markersize=5, label=name, clip_on=False)
    ax.axvspan(left, float(np.log2(step / 2)), ymax=1.0, facecolor="none", edgecolor=_VERMILLION, hatch="//", alpha=0.35, linewidth=0)
    ax.axvline(float(np.log2(step / 2)), color=_VERMILLION, linewidth=1.2)
    ax.axvline(-LEVELS - 0.5, color=_BLUE, linewidth=1.2, linestyle="--")
    ax.set_xlim(left, 0.4)
    ax.set_ylim(0, 1.3 * top)
    ticks = [int(tick) for tick in range(0, int(left) - 1, -2) if tick >= left]
    ax.set_xticks(ticks, [f"2$^{{{tick}}}$" if tick else "1" for tick in ticks])
    ax.set_xlabel("attention value; left of a vertical line its grid rounds to 0 (solid and hatched: uniform, dashed: log2)")
    ax.set_ylabel("values (% per quarter octave)")
    below = f", {100 * seen.below / seen.values:.2g} % below the axis" if seen.below else ""
    ax.set_title(f"{seen.tap.layer}, highest value {seen.highest:.3g}{below}", fontsize="medium", loc="left", parse_math=False)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False, borderaxespad=0.2)


def plot_sqnr(comparisons: Sequence[tuple[str, Comparison]], title: str) -> Figure:
    """SQNR of every product along the network, a curve per file."""
    figure, axes = _panels([4.2], title)
    looks = ((_BLUE, "-", "o"), (_VERMILLION, "--", "s"), (_GREEN, ":", "^"), (_ORANGE, "-.", "D"), (_GREY, "-", "x"))
    layers = list(dict.fromkeys(pair.layer for _, comparison in comparisons for pair, _ in comparison.nodes))
    for number, (name, comparison) in enumerate(comparisons):
        color, style, marker = looks[number % len(looks)]
        points = sorted((layers.index(pair.layer), noise.sqnr_db) for pair, noise in comparison.nodes if np.isfinite(noise.sqnr_db))
        label = f"{name}: answers {comparison.logits.sqnr_db:.1f} dB"
        positions, values = [position for position, _ in points], [value for _, value in points]
        if points:
            worst = int(np.argmin(values))
            label += f", worst (ringed) {layers[positions[worst]]} {values[worst]:.1f} dB"
            ring = axes[0].plot(positions[worst], values[worst], "o", color=color, markersize=12, markeredgewidth=1.4)
            ring[0].set_markerfacecolor("none")
        axes[0].plot(positions, values, style, color=color, marker=marker, markersize=4, linewidth=1.0, label=label)
    axes[0].set_ylabel("SQNR (dB); higher is closer")
    axes[0].margins(x=0.05, y=0.12)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize="small", frameon=False, borderaxespad=0.2)
    _name_blocks(axes[0], layers)
    return figure


def plot_importances(importances: Sequence[Importance], title: str) -> Figure:
    """Weights by the score of their unit, the removed ones on top of the kept: a panel for each kind of unit of each step."""
    figure, axes = _panels([2.6] * len(importances), title)
    for ax, found in zip(axes, importances, strict=True):
        edges = 10.0 ** np.clip(found.edges_log10, *_SCORES_LOG10)
        bars: dict[str, Any] = {"width": np.diff(edges), "align": "edge", "edgecolor": "white", "linewidth": 0.4}
        ax.bar(edges[:-1], found.kept_N, color=_BLUE, label=f"kept: {found.kept:,}", **bars)
        label = f"removed: {found.params - found.kept:,} ({found.removed_percent:.1f} %)"
        ax.bar(edges[:-1], found.params_N - found.kept_N, bottom=found.kept_N, color=_VERMILLION, hatch="///", label=label, **bars)
        ax.set_xscale("log")
        if found.threshold is not None:
            ax.axvline(found.threshold, color="black", linewidth=1.2, linestyle="--", label=f"threshold {found.threshold:.3g}")
        ax.set_ylabel("weights")
        beside = f"; of score 0, not drawn: {found.zeros:,}" if found.zeros else ""
        ax.set_title(f"step {found.step}, {found.technique}: {found.unit}{beside}", fontsize="medium", loc="left", parse_math=False)
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize="small", frameon=False, borderaxespad=0.2)
    axes[-1].set_xlabel("importance score")
    return figure


def _panels(heights: Sequence[float], title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 1.0 + sum(heights)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, _TITLE), fontweight="bold", parse_math=False, fontsize="medium")
    axes = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))[:, 0])
    for ax in axes:
        ax.grid(True, axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _name_layers(ax: Axes, layers: Sequence[str]) -> None:
    """Names along the axis, as many as can be read."""
    every = -(-len(layers) // _LABELS)
    positions = list(range(0, len(layers), every))
    ax.set_xticks(
        positions,
        [layers[position] for position in positions],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        fontsize="small",
        parse_math=False,
    )


def _name_blocks(ax: Axes, layers: Sequence[str]) -> None:
    """A line and a name where a block begins."""
    blocks = [found.group(1) if (found := re.match(r"(.*?\.\d+)\.", layer)) else layer for layer in layers]
    starts = [position for position, block in enumerate(blocks) if position == 0 or block != blocks[position - 1]]
    shown: list[int] = []
    for start in starts:
        ax.axvline(start, color="#dddddd", linewidth=0.8, zorder=0)
        if shown and start - shown[-1] < len(layers) / _LABELS:
            shown.pop()  # what stands alone before a block, such as the patch embedding
        shown.append(start)
    ax.set_xticks(
        shown, [blocks[start] for start in shown], rotation=45, ha="right", rotation_mode="anchor", fontsize="small", parse_math=False
    )
