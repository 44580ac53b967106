"""What `export` and `train` share: their options, the plan they print, and one build at a time per folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitedge import launch
from vitedge.cli._output import data_option, device_option, json_option, progress_bars, say, seed_option, weights_option

if TYPE_CHECKING:
    from vitedge.artifact import Manifest
    from vitedge.pipeline import Pipeline
    from vitedge.stage import StagePlan


def build_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that builds a recipe."""
    for option in (
        json_option,
        click.option("--overwrite", is_flag=True, help="Build everything anew, also into a folder that holds other files."),
        click.option("--dry-run", is_flag=True, help="Print what would be done, why, and about how long; do nothing."),
        seed_option,
        device_option(),
        weights_option,
        data_option,
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Build folder.  [default: build/<recipe>]"),
        click.option("--recipe", "-r", required=True, metavar="NAME|PATH", help="Recipe; see `vitedge recipes list`."),
    ):
        command = option(command)
    return command


def open_pipeline(
    recipe: str,
    output: Path | None,
    data: str | None,
    weights: str | None,
    device: str,
    seed: int | None,
    overwrite: bool,
    tensorboard: bool = False,
    dry_run: bool = False,
) -> Pipeline:
    """The pipeline that the options ask for.

    Files can be built for a GPU where there is none; a recipe that times models on one is refused before any work.
    """
    from vitedge.device import load_device, require_accelerator
    from vitedge.host import probe_host
    from vitedge.pipeline import Pipeline
    from vitedge.recipe import load_recipe
    from vitedge.stage import times_models

    story = load_recipe(recipe)
    if seed is not None:
        story = story.model_copy(update={"seed": seed})
    profile = load_device(device)
    if times_models(story):
        require_accelerator(profile, probe_host())
    folder = output or Path("build") / story.name
    return Pipeline(story, profile, folder, data, weights, overwrite, tensorboard, download=not dry_run)


@contextlib.contextmanager
def only_builder(root: Path) -> Iterator[None]:
    """Hold the build folder; a second build of the same folder would write over the first."""
    from filelock import FileLock, Timeout

    from vitedge.artifact import saying_where
    from vitedge.errors import UsageError

    with saying_where(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(
                str(root),
                expected="no other build of this folder",
                found="one is running",
                fix="wait for it, or choose another folder with -o",
            ) from error
    try:
        yield
    finally:
        lock.release()


def build(pipeline: Pipeline, dry_run: bool, overwrite: bool, only: str | None = None) -> tuple[list[StagePlan], Manifest | None]:
    """Show the plan and, unless this is a dry run, carry it out; the manifest is None for a dry run."""
    if not launch.is_main():  # process 0 holds the folder, says what is done, and writes
        if overwrite:
            pipeline.clear()
        plans = pipeline.plan(only)
        return plans, None if dry_run else pipeline.run(plans)
    if dry_run:
        plans = pipeline.plan(only)
        show_plan(plans)
        return plans, None
    with only_builder(pipeline.root):
        if overwrite:
            pipeline.clear()
        plans = pipeline.plan(only)
        show_plan(plans)
        with progress_bars() as bar:
            return plans, pipeline.run(plans, bar)


def show_plan(plans: list[StagePlan]) -> None:
    """One line a stage: what, why, about how long."""
    for plan in plans:
        about = f"  about {_duration(plan.seconds)}" if plan.action == "run" else ""
        say(f"{plan.action:5}  {plan.name}: {plan.reason}{about}")


def plan_json(plans: list[StagePlan]) -> list[dict[str, Any]]:
    """The plan for programs."""
    return [{"stage": p.name, "action": p.action, "reason": p.reason, "seconds_estimated": round(p.seconds, 1)} for p in plans]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
