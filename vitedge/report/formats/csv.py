"""CSV: one line per measurement, every column of `vitedge.report.columns`, with the unit in its name."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitedge.report.records import Table

SUFFIX = ".csv"


def render(table: Table, width: int) -> str:
    """The report as CSV; an empty cell is what is not known."""
    from vitedge.report.columns import COLUMNS, cells

    stream = io.StringIO()
    writer = csv.DictWriter(stream, [column.name for column in COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(row) for row in table.rows)
    return stream.getvalue()
