"""Train a recipe's model and write the checkpoint that `export` reuses."""

from __future__ import annotations

from pathlib import Path

import click

from vitedge.cli._build import build_options, only_builder, open_pipeline, plan_json, show_plan
from vitedge.cli._output import emit_json, progress_bars, say


@click.command("train")
@build_options
def command(
    recipe: str,
    output: Path | None,
    data: str | None,
    weights: str | None,
    device: str,
    seed: int | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a recipe's model and write the checkpoint that `export` reuses.

    Trains on a GPU if torch finds one, else on the CPU. Interrupted (Ctrl-C, kill -9), the same
    command goes on from the last checkpoint. The validation split chooses the weights; the test
    split is not looked at.

    \b
    vitedge train --recipe deit_tiny_112_int8
    vitedge eval build/deit_tiny_112_int8/checkpoint.safetensors
    """
    pipeline = open_pipeline(recipe, output, data, weights, device, seed, overwrite)
    if dry_run:
        plans = pipeline.plan(only="checkpoint")
        show_plan(plans)
        if as_json:
            emit_json({"schema_version": 1, "recipe": pipeline.recipe.name, "stages": plan_json(plans)})
        return
    with only_builder(pipeline.root):
        if overwrite:
            pipeline.clear()
        plans = pipeline.plan(only="checkpoint")
        show_plan(plans)
        with progress_bars() as bar:
            manifest = pipeline.run(plans, bar)
    checkpoint = manifest.artifacts["checkpoint.safetensors"]
    if as_json:
        emit_json(
            {
                "schema_version": 1,
                "recipe": pipeline.recipe.name,
                "stages": plan_json(plans),
                "checkpoint": checkpoint.to_plain(manifest.root),
            }
        )
        return
    for step in checkpoint.notes["steps"]:
        for name, notes in step.items():
            speed = f"{notes['steps']} steps, {notes['seconds']} s, {notes['images_per_s']} img/s"
            say(f"  {name}: {speed}, validation top-1 {notes['validation_top1']} % of {notes['validation_images']}")
    say(f"wrote {checkpoint.path}; next: vitedge export --recipe {recipe}")
