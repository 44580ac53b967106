"""Markdown: tables as GitHub draws them, with the paper's figure in a column of its own beside ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitedge.report.grids import Grid, Shown
    from vitedge.report.records import Table

SUFFIX = ".md"
_ESCAPED = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", **{sign: f"\\{sign}" for sign in "\\|`*_[]"}})


def render(table: Table, width: int) -> str:
    """The report as Markdown."""
    from vitedge.report.comparable import conditions_of, grouped, whom
    from vitedge.report.grids import grids

    parts = [f"# {_text(table.title)}"]
    for grid in grids(table):
        parts += [f"## {grid.title}", _text(grid.note), _draw(grid)]
    warned = [f"- {_text(text)}: {_text(whom(names))}" for text, names in grouped(table.rows)]
    warned += [f"- not read: {_text(problem)}" for problem in table.problems]
    warned += [f"- left out: {_text(line)}" for line in table.left_out]
    if warned:
        parts += ["## Warnings", "\n".join(warned)]
    conditions = ["\n".join(f"- {_text(line)}" for line in lines) for lines in conditions_of(table.rows)]
    if conditions:
        parts += ["## Conditions", *conditions]
    return "\n\n".join(parts) + "\n"


def _draw(grid: Grid) -> str:
    """One table; where a column has figures of the paper, they follow it."""
    heads: list[str] = []
    marks: list[str] = []
    papers = [any(line[index].paper for line in grid.lines) for index in range(len(grid.heads))]
    for head, has_paper in zip(grid.heads, papers, strict=True):
        mark = "---:" if head.numeric else "---"
        heads += [head.title, "paper"] if has_paper else [head.title]
        marks += [mark, mark] if has_paper else [mark]
    lines = [_line([_text(head) for head in heads]), _line(marks)]
    for cells in grid.lines:
        written: list[str] = []
        for shown, has_paper in zip(cells, papers, strict=True):
            written += [_cell(shown), _text(shown.paper or "-")] if has_paper else [_cell(shown)]
        lines.append(_line(written))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(shown: Shown) -> str:
    return _text(shown.text) + (f" ({_text(shown.note)})" if shown.note else "")


def _text(text: str) -> str:
    """Text that stays text inside a table: no tags, no columns of its own, no emphasis."""
    return " ".join(text.translate(_ESCAPED).split())
