"""CSV: one line per measurement, every column of `vitedge.report.columns`, with the unit in its name.

Text that a spreadsheet would take for a formula stands behind an apostrophe, which it reads as "this is text".
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitedge.report.columns import Cell
    from vitedge.report.records import Table

SUFFIX = ".csv"
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def render(table: Table, width: int) -> str:
    """The report as CSV; an empty cell is what is not known."""
    from vitedge.report.columns import COLUMNS, cells

    stream = io.StringIO()
    writer = csv.DictWriter(stream, [column.name for column in COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _as_text(cell) for name, cell in cells(row).items()} for row in table.rows)
    return stream.getvalue()


def _as_text(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
