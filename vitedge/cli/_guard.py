"""What the accuracy guard did, for people: every layer with its sensitivity and fate, and why the search stopped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vitedge.cli._output import console, say

if TYPE_CHECKING:
    from vitedge.artifact import Artifact


def show_guards(artifacts: Iterable[Artifact]) -> int:
    """Print what the guard says of each artifact that it made; the exit code: 3 where a limit was not met."""
    from vitedge.errors import GateError

    missed = False
    for artifact in artifacts:
        found = artifact.notes.get("guard")
        if found:
            _show(artifact.name, found)
            missed |= not found["met"]
    return GateError.exit_code if missed else 0


def _show(name: str, found: dict[str, Any]) -> None:
    if found["layers"]:
        from rich.table import Table

        table = Table(title=f"{name}: layers by what quantizing each alone does")
        for heading in ("layer", "op", "SQNR, dB", "loss change", "decision"):
            table.add_column(heading, justify="right" if heading in ("SQNR, dB", "loss change") else "left")
        for layer in found["layers"]:
            sqnr, loss = layer["sqnr_db"], layer["loss_change"]
            table.add_row(
                layer["module"],
                layer["op"],
                "-" if sqnr is None else f"{sqnr:.1f}",
                "no time" if loss is None else f"{loss:+.5f}",
                layer["decision"],
            )
        console().print(table)
    low, high = found["top1_drop_interval"]
    say(
        f"guard of {name}: {found['stopped']}; top-1 drop {found['top1_drop']:.2f} points (95 % {low:.2f} to {high:.2f}) of at most "
        f"{found['max_top1_drop']:g}, on {found['images']:,} {found['split']} images; {len(found['float_layers'])} layers in float, "
        f"{found['quantized_layers']} quantized, {len(found['trials'])} files tried in {found['seconds']:.0f} s"
    )
    for caution in found["cautions"]:
        say(f"  {caution}")
    if not found["met"]:
        say(f"warning: {name} loses more than the guard's limit; the best file found was written")
