"""Build a recipe: train what has to be trained, export to ONNX, quantize to int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._build import build, build_options, open_pipeline, plan_json
from vitedge.cli._guard import show_guards
from vitedge.cli._output import emit_json, say, show_integers

if TYPE_CHECKING:
    from vitedge.artifact import Manifest
    from vitedge.pipeline import Pipeline
    from vitedge.stage import StagePlan


@click.command("export")
@build_options
def command(recipe: str, device: str, dry_run: bool, overwrite: bool, as_json: bool, **where: Any) -> int:
    """Build a recipe: train what has to be trained, export to ONNX, quantize to int8.

    Only stages that are missing or stale run; an interrupted build goes on where it stopped. Exit code 3: a file
    loses more than the recipe's `quantize.guard` allows; it is written all the same.

    \b
    vitedge export --recipe deit_tiny_int8                the embedded model; needs no data and no network
    vitedge export --recipe deit_tiny_112_int8            fine-tunes ImageNet weights first
    vitedge export --recipe deit_tiny_112_int8 --dry-run  what would be done, why, and about how long
    """
    pipeline = open_pipeline(recipe, device=device, overwrite=overwrite, dry_run=dry_run, **where)
    plans, manifest = build(pipeline, dry_run, overwrite)
    plain = {"schema_version": 1, "recipe": pipeline.recipe.name, "build": str(pipeline.root), "stages": plan_json(plans)}
    if manifest is not None:
        plain["artifacts"] = [artifact.to_plain(manifest.root) for artifact in manifest.artifacts.values()]
    if as_json:
        emit_json(plain)
    elif manifest is not None:
        _show(manifest, plans, device)
    return show_guards(manifest.artifacts[name] for name in _guarded(pipeline, manifest)) if manifest is not None else 0


def _guarded(pipeline: Pipeline, manifest: Manifest) -> list[str]:
    """Names of the files that this recipe makes; a folder may hold others from before."""
    from vitedge.stage import artifact_name

    return [artifact_name(scheme) for scheme, _ in pipeline.recipe.quantize.schemes if artifact_name(scheme) in manifest.artifacts]


def _show(manifest: Manifest, plans: list[StagePlan], device: str) -> None:
    """What was built, what was not and why, and the next command."""
    base = manifest.artifacts["model.fp32.onnx"]
    for artifact in manifest.artifacts.values():
        ratio = f"1/{base.size_bytes / artifact.size_bytes:.2f} of fp32" if artifact.scheme != "fp32" else ""
        nodes = show_integers(artifact.notes.get("node_counts") or {})
        say(f"  {artifact.name:28} {artifact.size_bytes / 2**20:6.2f} MiB  {ratio:16} {nodes}".rstrip())
        used = artifact.notes.get("calibration") or {}
        if used.get("stored"):
            say(f"  {'':28} without images: activation ranges stored with the model, of {used['images']} train images of {used['data']}")
    for plan in plans:
        if plan.action == "skip":
            say(f"  {plan.name}: not built, {plan.reason}")
    say(f"built {manifest.root}; next: vitedge bench {manifest.root} --device {device}")
