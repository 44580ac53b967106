"""The terminal: the grids' main columns, a note under each figure, and below them warnings and conditions."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from vitedge.report.grids import Grid
    from vitedge.report.records import Table

SUFFIX = ".txt"


def render(table: Table, width: int) -> str:
    """The report as text of at most `width` columns where its words allow that."""
    from rich.console import Console

    from vitedge.report.comparable import conditions_of, grouped, whom
    from vitedge.report.grids import grids

    stream = io.StringIO()
    console = Console(file=stream, width=width, no_color=True, highlight=False, emoji=False)
    for grid in grids(table):
        console.print(f"{grid.title}: {table.title}", markup=False)
        console.print(_draw(grid))
        console.print(grid.note, markup=False)
        console.print()
    for row in table.rows:
        if row.failure:
            console.print(f"not measured: {row.label}{f' on {row.device}' if row.device else ''}: {row.failure}", markup=False)
    for text, names in grouped(table.rows):
        console.print(f"! {text}: {whom(names)}", markup=False)
    for line in (*(f"not read: {problem}" for problem in table.problems), *(f"left out: {line}" for line in table.left_out)):
        console.print(line, markup=False)
    for lines in conditions_of(table.rows):
        for line in lines:
            console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _draw(grid: Grid) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    from vitedge.report.grids import brief

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True)
    heads, lines = brief(grid)
    for head in heads:
        drawn.add_column(Text(head.title), justify="right" if head.numeric else "left", overflow="fold")
    for line in lines:
        drawn.add_row(
            *(
                Text("\n".join(part for part in (shown.text, shown.note, shown.paper and f"paper {shown.paper}") if part), overflow="fold")
                for shown in line
            )
        )
    return drawn
