"""Build and measure many recipes on many devices: one table, with the paper's figures beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._output import data_option, emit_json, json_option, progress_bars, say

if TYPE_CHECKING:
    from vitedge.study.estimate import Estimate
    from vitedge.study.plan import Options, Plan, Task

BUILD = Path("build") / "studies"


@click.command("study")
@click.argument("study", required=False, metavar="[STUDY]")
@click.option("--list", "list_studies", is_flag=True, help="List the studies that come with vitedge.")
@click.option("--dry-run", is_flag=True, help="Print the rows, what they share, and about how long and how large it gets; do nothing.")
@click.option("--only", metavar="LABEL", multiple=True, help="Only this row and those it is compared with; repeatable.")
@click.option("--retry-failed", is_flag=True, help="Try rows again that failed before.")
@click.option("--budget", metavar="SHARE|TIME", help="Less of the work, labelled so: 0.1, or about 90m or 2h. Steps and images shrink.")
@click.option("--device", "devices", metavar="NAME|PATH", multiple=True, help="Device profile in the place of the study's, repeatable.")
@data_option
@click.option("--weights", metavar="NAME|PATH", help="Weights in the place of the study's base, which is then not built.")
@click.option("--storage", metavar="URL", help="Database that workers on several machines share, as postgresql://HOST/NAME.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Study folder.  [default: build/studies/<study>]")
@json_option
def command(
    study: str | None,
    list_studies: bool,
    dry_run: bool,
    only: tuple[str, ...],
    retry_failed: bool,
    budget: str | None,
    devices: tuple[str, ...],
    data: str | None,
    weights: str | None,
    storage: str | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Build and measure every row of a study, and show one table.

    STUDY is a name or a YAML file. What rows share is built once; a row that fails says why in the table and stops nothing;
    the rows of a device are measured in turns in one run. Stopped or killed, the same command goes on where it was. Started
    several times, on one machine or on many with a shared folder and --storage, the processes share the rows. Results are in
    results.json, which `vitedge report` makes tables and pages of.

    \b
    vitedge study --list
    vitedge study cifar10_table1 --dry-run          rows, time and disk
    vitedge study cifar10_table1 --budget 0.1       a tenth of the steps, labelled so
    vitedge report build/studies/cifar10_table1 -o table1.html
    """
    if list_studies:
        return _list(as_json)
    from vitedge.errors import UsageError
    from vitedge.study.budget import Budget
    from vitedge.study.plan import Options

    if study is None:
        raise UsageError("vitedge study", expected="a study's name or file", found="none", fix="see `vitedge study --list`")
    plan = _plan(study, output, Options(devices, data, weights, Budget.parse(budget), only))
    if dry_run:
        return _show_plan(plan, storage, as_json)
    return _run(plan, storage, retry_failed, as_json)


def _plan(study: str, output: Path | None, options: Options) -> Plan:
    from vitedge.study.estimate import fitted
    from vitedge.study.plan import make_plan
    from vitedge.study.spec import load_study

    spec = load_study(study)
    folder = output or BUILD / spec.name
    return make_plan(spec, folder, fitted(spec, folder, options))


def _list(as_json: bool) -> int:
    """Names and descriptions of the studies that come with vitedge."""
    from vitedge.schema import list_files
    from vitedge.study.spec import load_study

    specs = [(load_study(name), path) for name, path in list_files("studies").items()]
    if as_json:
        rows = [{"name": spec.name, "description": spec.description, "rows": len(spec.rows), "path": str(path)} for spec, path in specs]
        emit_json({"schema_version": 1, "studies": rows})
        return 0
    width = max((len(spec.name) for spec, _ in specs), default=0)
    for spec, _ in specs:
        click.echo(f"{spec.name:{width}}  {spec.description}")
    return 0


def _show_plan(plan: Plan, storage: str | None, as_json: bool) -> int:
    """What would be done, what rows share, and about how long and how large it gets."""
    from vitedge.study.available import find_unavailable
    from vitedge.study.estimate import estimate_measuring, estimate_task
    from vitedge.study.measure import is_measured

    unavailable = find_unavailable(plan)
    states = _states(plan, storage)
    shown = [(task, states.get(task.key, "waiting"), estimate_task(plan, task)) for task in plan.tasks]
    here = [device for _, device in plan.devices if device.name not in unavailable]
    measuring = {device.name: 0.0 if is_measured(plan, device, states) else estimate_measuring(plan, device) for device in here}
    building = sum(guess.seconds for task, state, guess in shown if state != "done" and task.device not in unavailable)
    new = [guess for task, state, guess in shown if state != "done" and not guess.built and task.device not in unavailable]
    disk = sum(guess.mib or 0.0 for guess in new)
    unknown = sum(guess.mib is None for guess in new)
    if as_json:
        emit_json(
            {
                "schema_version": 1,
                "study": plan.spec.name,
                "folder": str(plan.folder),
                "budget": plan.budget.label,
                "tasks": [_task_json(plan, task, state, guess) for task, state, guess in shown],
                "measuring_seconds_estimated": {name: round(seconds) for name, seconds in measuring.items()},
                "unavailable": unavailable,
                "seconds_estimated": round(building + sum(measuring.values())),
                "mib_estimated": round(disk, 1),
            }
        )
        return 0
    names = {task.key: task.label for task in plan.tasks}
    for task, state, guess in shown:
        if state != "done" and task.device in unavailable:
            continue
        needs = ", ".join(names[key] for key in task.needs)
        about = "done" if state == "done" else f"about {_minutes(guess.seconds)}"
        click.echo(f"{task.name}: {about}{f'; starts from {needs}' if needs else ''}")
    for name, reason in unavailable.items():
        count = sum(task.device == name and state != "done" for task, state, _ in shown)
        click.echo(f"not on {name}: {count} row{'' if count == 1 else 's'}: {reason}")
    for name, seconds in measuring.items():
        click.echo(f"measuring all rows on {name}: {f'about {_minutes(seconds)}' if seconds else 'done'}")
    size = f"{disk:.0f} MiB of new files{f', {unknown} builds of unknown size not counted' if unknown else ''}"
    label = f" ({plan.budget.label})" if plan.budget.label else ""
    click.echo(f"in all about {_minutes(building + sum(measuring.values()))} on one machine{label}, {size}; into {plan.folder}")
    return 0


def _states(plan: Plan, storage: str | None) -> dict[str, str]:
    """How far each task is, where the study was begun in its folder or in a storage of its own; a dry run makes no file."""
    from vitedge.study.storage import STORAGE_FILE

    if storage is None and not (plan.folder / STORAGE_FILE).is_file():
        return {}
    from vitedge.study.queue import Queue
    from vitedge.study.rows import is_built

    with Queue(plan.folder, storage, plan.spec.name) as queue:
        states = {key: state.name for key, state in queue.states().items()}
    gone = [task.key for task in plan.tasks if states.get(task.key) == "done" and not is_built(plan, task)]
    return {**states, **dict.fromkeys(gone, "waiting")}


def _task_json(plan: Plan, task: Task, state: str, guess: Estimate) -> dict[str, Any]:
    return {
        "label": task.label,
        "device": task.device,
        "shared": task.shared,
        "state": state,
        "build": str(plan.root(task)),
        "needs": list(task.needs),
        "key": task.key,
        "seconds_estimated": round(guess.seconds),
        "mib_estimated": None if guess.mib is None else round(guess.mib, 1),
    }


def _run(plan: Plan, storage: str | None, retry_failed: bool, as_json: bool) -> int:
    """Work until nothing is left, show the table, and return the exit code of the first row that failed."""
    from vitedge.study.run import run_study

    content, path, failed = run_study(plan, storage, say, progress_bars, retry_failed)
    if as_json:
        emit_json(content)
    else:
        _show_table(path)
        say(f"wrote {path}; next: vitedge report {path if plan.narrowed else plan.folder}")
    if failed:
        say(f"error: {len(failed)} tasks of the study failed; the table says why, and --retry-failed tries them again")
        return failed[0].exit_code
    return 0


def _show_table(path: Path) -> None:
    """The report's terminal table."""
    import shutil

    from vitedge.report.against import with_comparisons
    from vitedge.report.comparable import with_warnings
    from vitedge.report.formats.table import render
    from vitedge.report.reading import read

    table = with_warnings(with_comparisons(read([path])))
    click.echo(render(table, shutil.get_terminal_size((100, 24)).columns).rstrip())


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
