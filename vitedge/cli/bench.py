"""Measure speed, memory and top-1 of models, with a verdict against fp32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitedge.cli._output import data_option, device_option, emit_json, json_option, progress_bars, say

if TYPE_CHECKING:
    from rich.console import Console

    from vitedge.bench.run import BenchResult
    from vitedge.errors import VitedgeError

EXISTING = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("paths", nargs=-1, type=EXISTING)
@device_option()
@click.option(
    "--build",
    type=click.Path(path_type=Path),
    default=Path("build"),
    show_default=True,
    help="Folder of build folders, where no PATH is given.",
)
@data_option
@click.option(
    "--batch-size", "batch_sizes", type=click.IntRange(1), multiple=True, help="Batch size, repeatable; the profile's by default."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Times every row is measured, in turns, each in a new process."
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="Shortest timed span of a round.")
@click.option("--iterations", type=click.IntRange(1), default=10, show_default=True, help="Fewest timed inferences of a round.")
@click.option("--threads", type=click.IntRange(1), help="Threads of an inference; the profile's, else all usable cores.")
@click.option("--runtime", "runtimes", metavar="NAME", multiple=True, help="Only this runtime of the profile, repeatable.")
@click.option("--no-top1", is_flag=True, help="Speed and memory only.")
@click.option("--samples", type=click.IntRange(1), help="Test images for top-1, at random; the whole split by default.")
@click.option("--require-stable", is_flag=True, help="Exit with 5 when a row did not settle.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random input that is timed.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON to this file too.")
@json_option
def command(
    paths: tuple[Path, ...],
    device: str,
    build: Path,
    data: str | None,
    batch_sizes: tuple[int, ...],
    rounds: int,
    seconds: float,
    iterations: int,
    threads: int | None,
    runtimes: tuple[str, ...],
    no_top1: bool,
    samples: int | None,
    require_stable: bool,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure models, each row in its own process, and compare with fp32 of the same runtime.

    PATHS are .onnx, .xml or .safetensors files (of vitedge or not) and build folders; without any,
    everything in build/. Rows are measured in turns over several rounds, so a verdict is paired:
    faster, same or slower, with the ratio's 95 % interval. Results of a build folder are kept in its
    report.json, which `vitedge package` reads.
    """
    from vitedge.bench.conditions import Settings
    from vitedge.bench.run import BenchRequest, bench
    from vitedge.bench.timing import TimingSettings

    settings = Settings(rounds=rounds, timing=TimingSettings(iterations, seconds), seed=seed)
    request = BenchRequest(paths, build, device, data, runtimes, batch_sizes, threads, settings, not no_top1, samples)
    check_output(output)
    with progress_bars() as bar:
        result = bench(request, say, bar)
    return show(result, output, as_json, require_stable)


def check_output(output: Path | None) -> None:
    """Refuse an output that cannot be written before minutes of measuring."""
    import os

    from vitedge.errors import OutputError

    if output is None:
        return
    folder = output.parent if output.parent.is_dir() else None
    if folder is None or not os.access(folder, os.W_OK) or output.is_dir():
        raise OutputError(
            str(output), expected="a file in a folder that can be written", found="none such", fix="choose another place with -o"
        )


def show(result: BenchResult, output: Path | None, as_json: bool, require_stable: bool) -> int:
    """Keep and print what was measured; returns the exit code.

    Errors that come after a result are lines here and not exceptions: under --json the result is
    already the whole of stdout.
    """
    from vitedge.artifact import write_text
    from vitedge.errors import UnstableError
    from vitedge.report.json_file import dump, to_plain

    plain = to_plain(result.measurements, result.skipped)
    if output:
        write_text(output, dump(plain))
    if as_json:
        emit_json(plain)
    else:
        from vitedge.report.table import print_table

        print_table(result_console(), result.measurements, result.skipped)
    unstable = [m for m in result.measurements if m.unstable]
    errors = _keep(result)
    if result.errors:
        say(f"error: {len(result.errors)} of the rows failed; their reasons are above")
    if errors or result.errors:
        return (*result.errors, *errors)[0].exit_code
    if require_stable and unstable:
        first = unstable[0]
        error = UnstableError(
            f"{first.artifact} in {first.runtime} b{first.batch_size}",
            expected="a measurement that settles",
            found=first.unstable,
            fix="close other programs, or measure longer with --seconds and --rounds",
        )
        say(f"error: {error}")
        return error.exit_code
    return 0


def _keep(result: BenchResult) -> list[VitedgeError]:
    """Put the measurements into their build folders' reports; those that cannot take them are lines."""
    from vitedge.errors import VitedgeError
    from vitedge.report.json_file import merge_report

    errors: list[VitedgeError] = []
    for folder in dict.fromkeys(folder for folder in result.folders if folder):
        own = [m for m, place in zip(result.measurements, result.folders, strict=True) if place == folder]
        try:
            say(f"kept in {merge_report(folder, own)}")
        except VitedgeError as error:
            say(f"error: not kept: {error}")
            errors.append(error)
    return errors


def result_console() -> Console:
    """The terminal for a command's result: stdout, 100 columns where it is no terminal."""
    import os
    import sys

    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    return Console(highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None, width=width)
