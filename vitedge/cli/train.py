"""Train a recipe's model and write the checkpoint that `export` reuses."""

from __future__ import annotations

from pathlib import Path

import click

from vitedge.cli._build import build, build_options, open_pipeline, plan_json
from vitedge.cli._output import emit_json, say


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
    plans, manifest = build(pipeline, dry_run, overwrite, only="checkpoint")
    plain = {"schema_version": 1, "recipe": pipeline.recipe.name, "build": str(pipeline.root), "stages": plan_json(plans)}
    checkpoint = manifest.artifacts["checkpoint.safetensors"] if manifest is not None else None
    if as_json:
        emit_json({**plain, "checkpoint": checkpoint.to_plain(pipeline.root)} if checkpoint else plain)
        return
    if checkpoint is None:
        return
    for step in checkpoint.notes["steps"]:
        for name, notes in step.items():
            speed = f"{notes['steps']} steps, {notes['seconds']} s, {notes['images_per_s']} img/s"
            say(f"  {name}: {speed}, validation top-1 {notes['validation_top1']} % of {notes['validation_images']}")
    say(f"wrote {checkpoint.path}; next: vitedge export --recipe {recipe}")
