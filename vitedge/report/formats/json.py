"""JSON: the cells of the CSV with what each column says, warnings and conditions; numbers stay numbers."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitedge.report.records import Table

SUFFIX = ".json"
SCHEMA_VERSION = 1


def render(table: Table, width: int) -> str:
    """The report as JSON."""
    from vitedge.report.columns import cells, docs
    from vitedge.report.comparable import conditions_of, grouped

    content = {
        "schema_version": SCHEMA_VERSION,
        "title": table.title,
        "baselines": table.baselines(),
        "columns": docs(),
        "rows": [{name: _finite(value) for name, value in cells(row).items()} for row in table.rows],
        "warnings": [{"text": text, "rows": names} for text, names in grouped(table.rows)],
        "conditions": conditions_of(table.rows),
        "problems": list(table.problems),
        "left_out": list(table.left_out),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
