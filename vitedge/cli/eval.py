"""Top-1 and top-5 of one model on a data set, with the interval."""

from __future__ import annotations

from pathlib import Path

import click

from vitedge.cli._output import data_option, device_option, emit_json, json_option, progress_bars, say


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@device_option()
@data_option
@click.option("--runtime", metavar="NAME", help="Runtime of the profile; the first that opens the file by default.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Float precision asked of the runtime.")
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True, help="Which images.")
@click.option("--samples", type=click.IntRange(1), help="This many images at random; the whole split by default.")
@click.option("--min-top1", type=click.FloatRange(0, 100), metavar="PERCENT", help="Exit with 3 when top-1 is below.")
@json_option
def command(
    path: Path,
    device: str,
    data: str | None,
    runtime: str | None,
    precision: str | None,
    split: str,
    samples: int | None,
    min_top1: float | None,
    as_json: bool,
) -> int:
    """Evaluate one model file, PATH, with its own preprocessing, in the runtime it will ship in.

    The data set is that of the build folder the file is in, or --data. What was evaluated before is
    read from the cache.
    """
    from vitedge.bench.quality import find_images, judge
    from vitedge.bench.rows import check_runtimes, find_candidates, one_row
    from vitedge.device import load_device, require_accelerator, usable_runtimes
    from vitedge.errors import GateError, UsageError
    from vitedge.host import probe

    profile = load_device(device)
    check_runtimes([runtime] if runtime else [], profile)
    candidates, _, _ = find_candidates([path], Path())
    if len(candidates) != 1:
        raise UsageError(str(path), expected="one model file", found=f"a build folder of {len(candidates)}", fix="name one of its files")
    candidate = candidates[0]
    images = find_images(candidate.folder, data, split, samples)
    if split == "validation" and candidate.folder is None:
        say("caution: nothing says which train images this model was not trained on: validation is taken to be a tenth of them")
    host = probe()
    require_accelerator(profile, host)
    uses = [use for use in usable_runtimes(profile, host) if runtime in (None, use[0].runtime)]
    row = one_row(candidate, profile, uses, precision, profile.threads or host.usable_cores)
    with progress_bars() as bar:
        quality, label = judge(row, images, bar(f"{row.artifact.name} in {row.runtime}"))
    low, high = quality.top1_interval
    plain = {
        "schema_version": 1,
        "artifact": row.artifact.name,
        "sha256": row.artifact.sha256,
        "runtime": row.runtime,
        "provider": row.provider,
        "float_precision": row.precision,
        "device": profile.name,
        "split": split,
        "images": quality.images,
        "data": label,
        "top1": quality.top1,
        "top5": quality.top5,
        "top1_interval": [low, high],
    }
    if as_json:
        emit_json(plain)
    else:
        top5 = "" if quality.top5 is None else f", top-5 {quality.top5:.2f} %"
        click.echo(f"top-1 {quality.top1:.2f} % (95 %: {low:.2f} to {high:.2f}){top5}")
        click.echo(f"{row.artifact.name} in {row.runtime}, {row.provider}, {row.precision} for what is float; {label}")
    if min_top1 is not None and quality.top1 < min_top1:
        error = GateError(
            row.artifact.name,
            expected=f"top-1 of at least {min_top1:g} %",
            found=f"{quality.top1:.2f} %",
            fix="train longer, or choose a milder scheme",
        )
        say(f"error: {error}")  # a line, not an exception: under --json the result is already the whole of stdout
        return error.exit_code
    return 0
