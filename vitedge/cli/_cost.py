"""How `vitedge inspect --recipe` shows what a recipe costs: a table for the model as it starts, sentences and a table for each step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from vitedge.inspect.recipe_cost import RecipeCost
    from vitedge.models.cost import CostTable

_FIGURES = {"params": "weights", "macs": "MACs", "bytes": "bytes"}
_BLOCK_NUMBER = r"\.\d+(?=\.|$)"


def print_cost(console: Console, cost: RecipeCost, all_modules: bool) -> None:
    """The result for people, on stdout.

    Args:
        console: Where to.
        cost: What was counted.
        all_modules: A row for each module; else for each part, and one for blocks that are alike.
    """
    console.print(f"{cost.recipe}: {cost.arch} at {cost.side} px, for one image; counted in {cost.seconds:.1f} s, nothing trained")
    for sentence in cost.about:
        console.print(sentence, markup=False)
    _print_table(console, "the model as it starts", (cost.start,), all_modules)
    before = cost.start
    for step in cost.steps:
        title = f"steps.{step.index} {step.name}"
        if step.after is not None and step.after != before:
            _print_table(console, f"{title}, before and after", (before, step.after), all_modules)
            before = step.after
        else:
            console.print(f"\n[bold]{title}[/bold]: {step.outcome}")
        for sentence in step.says:
            console.print(sentence, markup=False)


def _print_table(console: Console, title: str, tables: Sequence[CostTable], all_modules: bool) -> None:
    from rich.table import Table

    console.print(f"\n[bold]{title}[/bold]")
    shown = Table()
    shown.add_column("module" if all_modules else "part", overflow="fold")
    for heading in _FIGURES.values():
        for number in range(len(tables)):
            shown.add_column("after" if number else heading, justify="right")
    for name, figures in rows(tables, all_modules):
        shown.add_row(name, *figures)
    console.print(shown)


def rows(tables: Sequence[CostTable], all_modules: bool) -> list[tuple[str, tuple[str, ...]]]:
    """A name and, figure by figure, what it is in each table; blocks that are alike are one row, and the whole model is the last.

    Args:
        tables: One, or the one before and the one after a step.
        all_modules: A row for each module instead of each part.
    """
    from vitedge.inspect.recipe_cost import short

    parts = [table.modules if all_modules else table.groups for table in tables]
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in dict.fromkeys(name for part in parts for name in part if name):
        figures = tuple(short(getattr(part[name], figure)) if name in part else "-" for figure in _FIGURES for part in parts)
        label = name if all_modules else re.sub(_BLOCK_NUMBER, ".*", name)
        alike.setdefault((label, figures), []).append(name)
    named = [(f"{label}, {len(names)} times" if len(names) > 1 else names[0], figures) for (label, figures), names in alike.items()]
    return [*named, ("whole model", tuple(short(getattr(table.total, figure)) for figure in _FIGURES for table in tables))]
