"""Train a recipe's model and write the checkpoint that `export` reuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._build import build, build_options, open_pipeline, plan_json
from vitedge.cli._output import emit_json, say

if TYPE_CHECKING:
    from vitedge.artifact import Artifact


@click.command("train")
@build_options
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes on this machine: a GPU each, or a share of the cores.",
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard files too, into the build folder.")
def command(recipe: str, dry_run: bool, overwrite: bool, as_json: bool, processes: int, tensorboard: bool, **where: Any) -> int:
    """Train a recipe's model and write the checkpoint that `export` reuses.

    Trains on a GPU if torch finds one (CUDA_VISIBLE_DEVICES= hides it), else on the CPU; --device is
    the target that files are built for. Stopped (Ctrl-C, SIGTERM, kill -9), the same command without
    --overwrite goes on from the last checkpoint. The validation split chooses the weights; the test
    split is looked at once, at the end. Metrics go to metrics.jsonl, their curves to curves.png.

    \b
    vitedge train --recipe deit_tiny_112_int8
    vitedge train --recipe deit_tiny_112_int8 --processes 4     four GPUs, or four shares of the cores
    torchrun --nproc-per-node 4 -m vitedge train --recipe deit_tiny_112_int8
    accelerate launch -m vitedge train --recipe deit_tiny_112_int8
    """
    from vitedge import launch
    from vitedge.pipeline import require_torch

    pipeline = open_pipeline(recipe, overwrite=overwrite, tensorboard=tensorboard, dry_run=dry_run, **where)
    if processes > 1 and not dry_run:
        if pipeline.plan("checkpoint")[0].action == "run":  # what is wrong is said here, once
            require_torch("vitedge train")
        from vitedge.train.launcher import start

        code = start(processes, _arguments(click.get_current_context()))
        if code and as_json:
            emit_json({"schema_version": 1, "error": {"exit_code": code, "message": "a process failed; stderr says why"}})
        return code
    plans, manifest = build(pipeline, dry_run, overwrite, only="checkpoint")
    if not launch.is_main():
        return 0
    plain = {"schema_version": 1, "recipe": pipeline.recipe.name, "build": str(pipeline.root), "stages": plan_json(plans)}
    checkpoint = manifest.artifacts["checkpoint.safetensors"] if manifest is not None else None
    if as_json:
        emit_json({**plain, "checkpoint": checkpoint.to_plain(pipeline.root)} if checkpoint else plain)
    elif checkpoint is not None:
        if tensorboard and plans[0].action == "reuse":
            say("nothing was trained, so no TensorBoard files were written; metrics.jsonl has the figures")
        _tell(checkpoint)
        say(f"wrote {checkpoint.path}; next: vitedge export --recipe {recipe}")
    return 0


def _arguments(context: click.Context) -> list[str]:
    """The command line of one process of many: this one's, without --processes."""
    arguments = ["train"]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if option.name == "processes" or value is None or value is False:
            continue
        arguments += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return arguments


def _tell(checkpoint: Artifact) -> None:
    """How the training went, for people."""
    for step in checkpoint.notes["steps"]:
        for name, notes in step.items():
            if name != "train":
                continue
            speed = f"{notes['steps']} steps of {notes['batch_size']}, {notes['seconds']} s, {notes['images_per_s']} img/s"
            say(f"  {name}: {speed}, validation top-1 {notes['validation_top1']} % of {notes['validation_images']}")
    test: dict[str, Any] = checkpoint.notes.get("test", {})
    heads = ", ".join(f"{name.removeprefix('top1_')} head {test[name]:.2f} %" for name in ("top1_class", "top1_distill") if name in test)
    if test:
        say(f"  test: top-1 {test['top1']:.2f} % of {test['images']}{f' ({heads}; both averaged)' if heads else ''}, in fp32")
