"""Make one table of any measurements: terminal, CSV, JSON, Markdown, or a page that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitedge.cli._output import json_option, say
from vitedge.plugins import names

if TYPE_CHECKING:
    from vitedge.report.records import Table

FORMATS = "report.formats"
EXISTING = click.Path(exists=True, path_type=Path)


@click.command("report")
@click.argument("paths", nargs=-1, required=True, type=EXISTING, metavar="PATH...")
@click.option("--format", "format_", type=click.Choice(names(FORMATS)), help="Format.  [default: by the ending of -o, else table]")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file; stdout by default.")
@click.option(
    "--baseline",
    metavar="LABEL",
    help="What rows are compared with: a label, or a row's whole name.  [default: the study's, else fp32]",
)
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of further pictures for the page; those of vitedge inspect beside a build are found.",
)
@json_option
def command(
    paths: tuple[Path, ...], format_: str | None, output: Path | None, baseline: str | None, pictures: Path | None, as_json: bool
) -> int:
    """Make one table of any measurements.

    PATHS are build folders, the JSON of `vitedge bench -o`, studies (their folder or results.json) and
    folders of those. Rows that do not belong beside each other are shown with a warning that says why.

    \b
    vitedge report build/                                    everything that was measured here
    vitedge report build/ -o report.html                     one page with plots, opens offline
    vitedge report results.json --format markdown            for a README
    vitedge report a.json b.json --baseline deit_tiny_int8   against one recipe's fastest artifact

    Speed is compared with the baseline's fastest artifact of the same run, device and batch size,
    top-1 with its fp32 file on the same images. A difference inside the noise is `same`.
    """
    from vitedge.plugins import load
    from vitedge.report.against import with_comparisons
    from vitedge.report.comparable import with_warnings
    from vitedge.report.reading import read

    form = load(FORMATS, _choose(format_, output, as_json))
    if output is not None:
        from vitedge.cli.bench import check_output

        check_output(output)
    table = with_warnings(with_comparisons(read(paths, pictures), baseline))
    text: str = form.render(table, _width())
    if output is not None:
        from vitedge.artifact import write_text

        write_text(output, text)
        say(f"wrote {output}")
    else:
        click.echo(text, nl=False)
    return _tell_problems(table)


def _choose(asked: str | None, output: Path | None, as_json: bool) -> str:
    """The format: the one asked for, else that of the file's ending, else the terminal's.

    Raises:
        UsageError: Two that differ, --json with a file, or an ending that no format has.
    """
    from vitedge.errors import UsageError
    from vitedge.plugins import load

    if as_json and (output is not None or asked not in (None, "json")):
        other = f"--format {asked}" if asked not in (None, "json") else f"-o {output}"
        raise UsageError("vitedge report --json", expected="JSON on stdout alone", found=other, fix="leave out one of them")
    if asked is not None or as_json:
        return asked or "json"
    if output is None:
        return "table"
    endings = {load(FORMATS, name).SUFFIX: name for name in names(FORMATS)}
    if output.suffix.lower() not in endings:
        raise UsageError(
            f"-o {output}",
            expected=f"a file that ends in {', '.join(sorted(endings))}",
            found=f"'{output.suffix}'",
            fix="name it so, or say --format",
        )
    return endings[output.suffix.lower()]


def _width() -> int:
    """Columns of the terminal; 100 where there is none."""
    import shutil
    import sys

    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100


def _tell_problems(table: Table) -> int:
    """What could not be read, a line each; the rest is in the report all the same.

    Returns:
        The exit code: 1 where a file that should have been read was not.
    """
    from vitedge.errors import InputError

    for problem in table.problems:
        say(f"error: {problem}")
    return InputError.exit_code if table.problems else 0
