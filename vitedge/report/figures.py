"""The plots of the page as plain data in Plotly's terms: Pareto fronts, latencies, training curves.

Told apart by shape as well as by colour, in the palette of Okabe and Ito (2008) without its yellow, which
is lost on white. Names are escaped here: Plotly reads tags in text.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitedge.bench.records import Measurement
from vitedge.report.cells import MIB, short
from vitedge.report.curves import Curve, read_curves
from vitedge.report.places import Place, place_names, place_of
from vitedge.report.records import Row, Table, file_of

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#888888")
SHAPES = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "pentagon", "hexagram", "hexagon")
SYMBOLS = tuple(f"{shape}{fill}" for fill in ("", "-open", "-dot") for shape in SHAPES)
MARKED = 8  # points of a curve that have a marker, so that curves differ by more than colour and dashes
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
DRAWN_SAMPLES = 200  # of a row's inferences
DRAWN_BOXES = 40  # rows whose latencies are drawn
NAME = 30  # characters of each of the two lines beside a box


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        name: For anchors.
        title: For people, who may not see the plot.
        note: What it shows and what it leaves out.
        traces: Plotly's data.
        layout: Plotly's layout; the page adds colours.
        height: Pixels.
    """

    name: str
    title: str
    note: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 440


def figures(table: Table) -> tuple[list[Figure], list[str]]:
    """All there is to draw, and what could not be read for it."""
    top1, problems = read_curves(table.builds, "validation_top1")
    loss, _ = read_curves(table.builds, "loss")
    drawn = [*pareto_speed(table), *pareto_size(table), *latencies(table)]
    drawn += curve_figure("curves-top1", "Validation top-1 while training", "top-1 on validation images, %", top1)
    drawn += curve_figure("curves-loss", "Loss while training", "training loss", loss)
    budgets = ", ".join(dict.fromkeys(row.budget for row in table.rows if row.budget))
    return [replace(one, title=f"{one.title} ({budgets})") for one in drawn] if budgets else drawn, problems


def front(points: Sequence[tuple[float, float]], more_is_better: bool) -> list[int]:
    """Indices of the points that no other beats, in ascending order of x; y is better when larger.

    Args:
        points: x and y.
        more_is_better: Whether a larger x is better.
    """
    best_first = sorted(range(len(points)), key=lambda i: (-points[i][0] if more_is_better else points[i][0], -points[i][1]))
    kept: list[int] = []
    for index in best_first:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return sorted(kept, key=lambda i: points[i][0])


def pareto_speed(table: Table) -> list[Figure]:
    """Top-1 against images per second, a plot per place and batch size: other places are other axes."""
    names = place_names(table.rows)
    groups: dict[tuple[Place, int], list[Row]] = {}
    for row in table.measured:
        if row.measurement:
            groups.setdefault((place_of(row), row.measurement.batch_size), []).append(row)
    made: list[Figure] = []
    for (place, batch), rows in groups.items():
        title = f"Top-1 against images/s on {names[place]}, batch {batch}"
        made += _paretos(f"pareto-speed-{len(made)}", title, "images per second", rows, lambda m: m.images_per_s, True)
    return made


def pareto_size(table: Table) -> list[Figure]:
    """Top-1 against MiB: one point per file, runtime and precision, of the first place it was judged in."""
    firsts: dict[tuple[str, str, str], Row] = {}
    for row in sorted(table.measured, key=lambda row: row.measurement is None or row.measurement.top1 is None):
        firsts.setdefault((row.study, row.source, row.name), row)
    return _paretos("pareto-size", "Top-1 against size", "MiB on disk", list(firsts.values()), lambda m: m.size_bytes / MIB, False)


def _paretos(name: str, title: str, x_title: str, rows: Sequence[Row], x_of: Any, more_is_better: bool) -> list[Figure]:
    """A plot for each set of images: accuracies on different images have no front in common."""
    sets: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        m = row.measurement
        if m is not None and m.top1 is not None:
            sets.setdefault((m.top1_images, str((m.answers or {}).get("images"))), []).append(row)
    left = len(rows) - sum(len(known) for known in sets.values())
    note = "Points of the dotted front are beaten by none in both; bars are 95 % intervals."
    note += f" {left} {'row has' if left == 1 else 'rows have'} no top-1 and no point." if left else ""
    made = []
    for number, ((images, _), known) in enumerate(sets.items()):
        own_title, own_name = (f"{title}, {images}", f"{name}-{number}") if len(sets) > 1 else (title, name)
        made.append(_pareto(own_name, own_title, note, x_title, known, x_of, more_is_better))
    return made


def _pareto(name: str, title: str, note: str, x_title: str, known: Sequence[Row], x_of: Any, more_is_better: bool) -> Figure:
    points = [(float(x_of(row.measurement)), float(row.measurement.top1 or 0.0)) for row in known if row.measurement]
    best = front(points, more_is_better)
    line = {"color": "#888888", "dash": "dot", "width": 2, "shape": "vh" if more_is_better else "hv"}
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [points[i][0] for i in best],
            "y": [points[i][1] for i in best],
            "line": line,
            "hoverinfo": "skip",
        }
    ]
    groups = _groups(known)
    for place, group in enumerate(dict.fromkeys(groups)):
        own = [i for i, name in enumerate(groups) if name == group]
        traces.append(_markers(group, place, [known[i] for i in own], [points[i] for i in own]))
    layout = {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": "top-1, %"}}, "hovermode": "closest"}
    return Figure(name, title, note, traces, layout)


def _groups(rows: Sequence[Row]) -> list[str]:
    """What has a marker of its own: a method, or where there is but one, each file, runtime and precision."""
    if len({row.label for row in rows}) > 1:
        return [row.label for row in rows]
    return [row.name.removeprefix(f"{row.label}: ") for row in rows]


def _markers(group: str, place: int, rows: Sequence[Row], points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """One group's points, each with its interval and, on hover, what it was measured under."""
    bounds = [_bounds(row, y) for row, (_, y) in zip(rows, points, strict=True)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(group, quote=False),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - y for (_, high), (_, y) in zip(bounds, points, strict=True)],
            "arrayminus": [y - low for (low, _), (_, y) in zip(bounds, points, strict=True)],
            "thickness": 1,
            "width": 3,
        },
        "marker": {"color": COLOURS[place % len(COLOURS)], "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 11, "line": {"width": 1}},
        "hoverinfo": "text",
        "hovertext": [_hover(row) for row in rows],
    }


def _bounds(row: Row, y: float) -> tuple[float, float]:
    interval = row.measurement.top1_interval if row.measurement else None
    return interval or (y, y)


def _hover(row: Row) -> str:
    """Recipe, figures and conditions, in lines."""
    m = row.measurement
    assert m is not None
    c = m.conditions
    lines = [
        row.name,
        f"recipe {row.recipe or '-'}{f', {row.budget}' if row.budget else ''}",
        f"top-1 {m.top1:.2f} %" if m.top1 is not None else "",
        f"{short(m.images_per_s)} images/s at batch {m.batch_size}, {short(m.size_bytes / MIB)} MiB",
        f"{row.device}{' (emulated)' if m.emulated else ''}: {c.get('cpu')}, {c.get('threads')} threads",
        f"{c.get('date')}, commit {c.get('commit')}",
        f"unstable: {m.unstable}" if m.unstable else "",
    ]
    return "<br>".join(html.escape(line, quote=False) for line in lines if line)


def latencies(table: Table) -> list[Figure]:
    """Times of single inferences, a box per row, a plot per place at its smallest batch size."""
    made: list[Figure] = []
    for place, name in place_names(table.rows).items():
        own = [row for row in table.measured if place_of(row) == place and row.measurement and any(row.measurement.samples_ms)]
        if not own:
            continue
        batch = min(row.measurement.batch_size for row in own if row.measurement)
        rows = [row for row in own if row.measurement and row.measurement.batch_size == batch]
        drawn = rows[:DRAWN_BOXES]
        # The first row stands on top; Plotly counts categories from below.
        traces = [_box(row, index) for index, row in reversed(list(enumerate(drawn)))]
        note = f"Each box is drawn from at most {DRAWN_SAMPLES} of a row's inferences, evenly spaced from the shortest to the longest."
        note += f" {len(rows) - len(drawn)} further rows are not drawn." if len(rows) > len(drawn) else ""
        layout = {
            "xaxis": {"title": {"text": "ms"}, "type": "log", "dtick": "D2"},  # labels at 1, 2 and 5: a phone has no room for more
            "yaxis": {"automargin": True, "type": "category"},
            "showlegend": False,
            "hovermode": "closest",
        }
        title = f"Latency on {name}, batch {batch}"
        made.append(Figure(f"latency-{len(made)}", title, note, traces, layout, 160 + 38 * len(drawn)))
    return made


def _box(row: Row, place: int) -> dict[str, Any]:
    assert row.measurement is not None
    # Rows of one label differ in their files: both are said, each cut to a line of its own.
    m = row.measurement
    file = file_of(m).removeprefix("model.").removeprefix(f"{m.runtime}.").replace(".onnx in ", ", ").replace(" in ", ", ")
    short_name = "<br>".join(html.escape(_cut(text), quote=False) for text in (row.label, file))
    return {
        "type": "box",
        "orientation": "h",
        # Two names cut to the same length must not share a box.
        "name": f"{place + 1}. {short_name}",
        "x": spaced(row.measurement),
        "boxpoints": "outliers",
        "marker": {"color": COLOURS[place % len(COLOURS)], "size": 3},
        "line": {"width": 1.5},
    }


def _cut(text: str) -> str:
    return text if len(text) <= NAME else f"{text[: NAME - 1]}…"


def spaced(measurement: Measurement) -> list[float]:
    """Order statistics of the row's inferences, ms: all where they are few, else evenly spaced with both ends."""
    ordered = sorted(sample for samples in measurement.samples_ms for sample in samples)
    if len(ordered) <= DRAWN_SAMPLES:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(i * last / (DRAWN_SAMPLES - 1))] for i in range(DRAWN_SAMPLES)]


def curve_figure(name: str, title: str, y_title: str, curves: Sequence[Curve]) -> list[Figure]:
    """The curves of one metric; nothing where no build has any."""
    if not curves:
        return []
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": html.escape(curve.build, quote=False),
            "x": list(curve.steps),
            "y": list(curve.values),
            "line": {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place % len(DASHES)], "width": 2},
            "marker": {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7, "maxdisplayed": MARKED},
        }
        for place, curve in enumerate(curves)
    ]
    thinned = [curve for curve in curves if curve.of > len(curve.steps)]
    note = f"Thinned to {max(len(curve.steps) for curve in thinned)} points of up to {max(c.of for c in thinned):,}." if thinned else ""
    layout = {
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {"title": {"text": y_title}},
        "hovermode": "closest",
        "showlegend": True,
    }
    return [Figure(name, title, note, traces, layout)]
