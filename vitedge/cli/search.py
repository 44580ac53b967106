"""Search a space of settings for recipes that are fast, small and still right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._output import data_option, emit_json, json_option, progress_bars, say, seed_option, time_left, weights_option

if TYPE_CHECKING:
    from vitedge.study.outcome import Outcome
    from vitedge.study.point import Point
    from vitedge.study.search import News


@click.command("search")
@click.argument("space", metavar="SPACE", required=False)
@click.option("--trials", type=click.IntRange(1), help="Different settings to try, over all workers; the file's by default.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Start no trial that would probably end later than this.")
@click.option("--device", metavar="NAME|PATH", help="Device profile; the file's by default. See `vitedge devices list`.")
@data_option
@weights_option
@seed_option
@click.option("--storage", metavar="URL", help="Database that several machines share; study.db in the folder by default.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the search.  [default: build/searches/<name>]")
@click.option("--dry-run", is_flag=True, help="Print what would be tried and about how long it takes; do nothing.")
@click.option("--list", "as_list", is_flag=True, help="Print the searches that come with vitedge.")
@json_option
def command(
    space: str | None,
    trials: int | None,
    minutes: float | None,
    device: str | None,
    data: str | None,
    weights: str | None,
    seed: int | None,
    storage: str | None,
    output: Path | None,
    dry_run: bool,
    as_list: bool,
    as_json: bool,
) -> int:
    """Search a space of settings (techniques, ratios, schemes) for the recipes worth having.

    SPACE is a YAML file or the name of one that comes with vitedge. Its recipe is measured first, as the baseline; then each
    trial is built, timed in turns with the baseline's fastest file, and judged on validation images. It ends with the Pareto
    set as recipes in FOLDER/pareto/, and with one winner: among the files that miss no limit (the file's constraints, the
    device's budgets) the one with the largest product of times as fast and times as small, if its speed settled. That one is judged
    on the test split, and timed again in more rounds, once.

    Interrupted or killed, the same command goes on. Run it again beside itself, or on machines like this one with --storage
    and a shared folder, and the workers share the trials. Exit code 3: no file is inside the limits.

    \b
    vitedge search --list
    vitedge search deit_tiny_112 --weights my.safetensors --minutes 60
    vitedge export --recipe build/searches/deit_tiny_112/pareto/01_<name>.yaml --weights my.safetensors
    """
    from vitedge.errors import UsageError

    if as_list:
        return list_searches(as_json)
    if space is None:
        raise UsageError("vitedge search", expected="a search by name or path", found="none", fix="see `vitedge search --list`")
    from vitedge.study.request import SearchRequest, forecast

    request = SearchRequest(space, output, storage, device, data, weights, seed, trials, minutes)
    if dry_run:
        plain = forecast(request, say)
        if as_json:
            emit_json(plain)
        else:
            show_forecast(plain)
        return 0
    from vitedge.study.search import search

    outcome = search(request, say, tell, progress_bars)
    if as_json:
        emit_json(outcome.plain)
    else:
        print_outcome(outcome)
    return verdict(outcome)


def list_searches(as_json: bool) -> int:
    """Names and descriptions of the searches that come with vitedge."""
    from vitedge.schema import list_files, load_yaml

    rows = [
        {"name": name, "description": str(load_yaml(path).get("description", "")), "path": str(path)}
        for name, path in list_files("searches").items()
    ]
    if as_json:
        emit_json({"schema_version": 1, "searches": rows})
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        click.echo(f"{row['name']:{width}}  {row['description']}")
    return 0


def show_forecast(plain: dict[str, Any]) -> None:
    """What would be done, for people."""
    count = plain["combinations"]
    say(f"search {plain['search']}: {'endless' if count is None else f'{count:,}'} combinations, {plain['trials']} to be tried")
    for path, text in plain["space"].items():
        say(f"  {path}: {text}")
    for settings in plain["first"]:
        say(f"first: {', '.join(f'{path} {value}' for path, value in settings.items()) or 'what the sampler draws'}")
    limits = ", ".join(f"{name} {value:g}" for name, value in plain["limits"].items())
    say(f"on device {plain['device']}, batch {plain['batch_size']}, for {', '.join(plain['objectives'])}; limits: {limits or 'none'}")
    baseline, trial = plain["seconds_baseline"], plain["seconds_trial"]
    say(f"baseline {plain['baseline']}: about {_minutes(baseline)}; a trial: about {_minutes(trial)}")
    say(f"in all about {_minutes(plain['seconds_estimated'])}, in {plain['folder']}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def tell(news: News) -> None:
    """One line for a trial that ended."""
    left = "" if not news.seconds_left else f"; about {time_left(news.seconds_left)}"
    head = f"trial {news.number} ({news.done} of {news.limit}, {news.seconds:.0f} s)"
    if news.duplicate_of is not None:
        say(f"{head}: the settings of trial {news.duplicate_of}{left}")
    elif news.point is None:
        say(f"{head}: failed: {' '.join(news.failure.split())}{left}")
    else:
        say(f"{head}: {figures(news.point)}{left}")


def figures(point: Point) -> str:
    """A point in a line."""
    speed = f"x{point.speed_ratio:.2f} the images/s"
    if point.speed_low is not None and point.speed_low <= 1 <= (point.speed_high or 1):
        speed = f"same images/s (x{point.speed_ratio:.2f})"
    missed = ", ".join(name for name, miss in point.misses.items() if miss > 0)
    mark = "!" if point.unstable else ""
    lost = f"{point.top1_drop:.2f} lost{', inside the noise' if _same_top1(point) else ''}"
    return (
        f"{point.label}: {speed}{mark}, {point.size_mib:.2f} MiB (x{point.size_ratio:.2f}), {point.top1:.2f} % "
        f"({lost}), {f'misses {missed}' if missed else 'inside the limits'}"
    )


def _same_top1(point: Point) -> bool:
    return point.drop_low <= 0 <= point.drop_high


def print_outcome(outcome: Outcome) -> None:
    """The Pareto set as a table, where its recipes are, and the winner; on stdout."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vitedge.cli.bench import result_console

    console = result_console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, collapse_padding=True)
    for heading in ("trial", "file", "img/s", "95 %", "MiB", "size", "top-1 %", "lost", "95 %", "limits"):
        table.add_column(heading, justify="left" if heading in ("file", "limits") else "right", overflow="fold")
    for point in outcome.front:
        table.add_row(*(Text(cell) for cell in cells(point)))
    console.print(table)
    for line in notes(outcome):
        console.print(Text(line))


def cells(point: Point) -> list[str]:
    """One row of the table."""
    same = point.speed_low is not None and point.speed_high is not None and point.speed_low <= 1 <= point.speed_high
    return [
        "base" if point.trial is None else str(point.trial),
        point.label,
        f"{'same' if same else f'x{point.speed_ratio:.2f}'}{'!' if point.unstable else ''}",
        "-" if point.speed_low is None else f"{point.speed_low:.2f}-{point.speed_high:.2f}",
        f"{point.size_mib:.2f}",
        f"x{point.size_ratio:.2f}",
        f"{point.top1:.2f}",
        "same" if _same_top1(point) else f"{point.top1_drop:.2f}",
        f"{point.drop_low:.2f}~{point.drop_high:.2f}",
        "inside" if point.inside else "missed",
    ]


def notes(outcome: Outcome) -> list[str]:
    """What must be said below the table."""
    plain = outcome.plain
    base, conditions = plain["baseline"], plain["conditions"]
    tried = [record for record in outcome.records if record.ended and record.duplicate_of is None]
    failed = [record for record in tried if record.failure]
    lines = [
        f"Pareto set in {', '.join(plain['objectives'])} of {len(outcome.points)} files, the baseline's among them, of {len(tried)} trials",
        f"ended: {outcome.ended}",
        f"img/s: ratio to {base['fastest']} of {base['recipe']}, timed in turns in the same run; size: to its smallest file; "
        f"lost: points below {base['best']}",
        f"{conditions['cpu']}, {conditions['threads']} threads, batch {plain['batch_size']}, device {plain['device']}; "
        f"{outcome.points[0].images}",
    ]
    lines += [f"trial {record.number} failed: {record.failure}" for record in failed[:5]]
    lines += [f"{len(failed) - 5} more failed; search.json says why"] if len(failed) > 5 else []
    lines += [f"recipes: {path}" for path in outcome.recipes.values()]
    if outcome.winner is not None:
        where = outcome.recipes.get(outcome.winner.settings, "the baseline itself")
        lines.append(f"winner: {figures(outcome.winner)}: {where}")
    if outcome.test and "top1" in outcome.test:
        test = outcome.test
        low, high = test["top1_drop_interval"]
        lost = (
            f"{test['top1_drop']:.2f} points below {test['baseline']} ({low:.2f} to {high:.2f}{', the same' if low <= 0 <= high else ''})"
        )
        lines.append(f"winner on {test['images']}: {test['top1']:.2f} %, {lost}")
        lines += [f"winner timed again: {timed_again(test['speed'])}"] if test.get("speed") else []
    elif outcome.test:
        lines.append(f"winner not judged on the test split: {outcome.test['reason']}")
    return lines


def timed_again(speed: dict[str, Any]) -> str:
    """The winner's speed in a run of its own, beside which the search's figure is the largest of many."""
    if "ratio" not in speed:
        return f"not possible: {speed['reason']}"
    low, high = speed["interval"]
    within = "same images/s" if low <= 1 <= high else f"x{speed['ratio']:.2f} the images/s"
    unstable = f"; unstable: {speed['unstable']}" if speed["unstable"] else ""
    return f"{within} ({low:.2f} to {high:.2f}, {speed['rounds']} rounds){unstable}"


def verdict(outcome: Outcome) -> int:
    """The exit code; errors that come after a result are a line here, for under --json the result is all of stdout."""
    from vitedge.errors import GateError

    if outcome.winner is not None:
        return 0
    nearest = min(outcome.points, key=lambda point: point.missed)
    error = GateError(
        "search",
        expected="a file inside the limits",
        found=f"none; the nearest is {figures(nearest)}",
        fix="search on with more --trials, or loosen the constraints in a folder of its own",
    )
    say(f"error: {error}")
    return error.exit_code
