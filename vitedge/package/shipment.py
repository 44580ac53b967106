"""What a build folder ships to a device: the artifact, how it is run there, and on what grounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitedge import plugins
from vitedge.artifact import MANIFEST, Artifact, Manifest, hash_files, read_json
from vitedge.device import Device
from vitedge.errors import InputError, UsageError, closest
from vitedge.package.choose import BUNDLE_RUNTIMES, Measured, choose, current_rows, read_rows, why_not
from vitedge.recipe import Limits, Recipe, load_recipe
from vitedge.runtimes import Target

REPORT = "report.json"
# Of a row, what travels: the figures and their conditions, not the thousands of raw samples and answers.
RAW = ("samples_ms", "rounds", "answers")


@dataclass(frozen=True)
class Shipment:
    """The decision.

    Attributes:
        artifact: Its files are there and are those of the manifest.
        runtime: Engine the bundle is for.
        target: Where and in which float precision it was measured; at batch 1.
        measured: The row of the report, without raw samples; None where the artifact was named and never measured.
        why: One line.
        passed_over: One line for each faster measurement that was not taken.
        remarks: What a user must know: no measured top-1, a limit missed, an emulated or unstable figure.
    """

    artifact: Artifact
    runtime: str
    target: Target
    measured: dict[str, Any] | None
    why: str
    passed_over: tuple[str, ...]
    remarks: tuple[str, ...]


def open_build(build: Path) -> tuple[Manifest, Recipe]:
    """Manifest and recipe of a build folder.

    Raises:
        UsageError: Nothing was built there, or its recipe is not valid.
        InputError: The manifest is damaged.
    """
    manifest = Manifest.load(build)
    recipe = build / "recipe.yaml"
    if not manifest.artifacts or not recipe.is_file():
        found = f"no {MANIFEST} with artifacts" if not manifest.artifacts else "no recipe.yaml"
        raise UsageError(
            str(build),
            expected="a folder that `vitedge export` built",
            found=found,
            fix="run: vitedge export --recipe deit_tiny_int8, or name its folder",
        )
    return manifest, load_recipe(str(recipe))


def decide(build: Path, manifest: Manifest, recipe: Recipe, device: Device, artifact_name: str | None) -> Shipment:
    """Take the artifact that was named, else the fastest measured one inside the limits.

    A named artifact is shipped even where it misses a limit or was never measured; `remarks` says so.

    Raises:
        UsageError: No artifact of that name, nothing measured on the device, or no runtime to run it with.
        GateError: No measured artifact is inside the limits.
        InputError: The report, or the artifact's file, is damaged.
    """
    report = build / REPORT
    rows = read_rows(read_json(report), device.name, str(report)) if report.exists() else []
    hashes = {name: artifact.sha256 for name, artifact in manifest.artifacts.items()}
    if artifact_name is None:
        choice = choose(current_rows(rows, hashes, device.name), recipe.limits, device.budgets)
        return _measured_shipment(manifest.artifacts[choice.row.artifact], choice.row, choice.why, choice.passed_over, (), recipe.limits)
    if artifact_name not in manifest.artifacts:
        known = sorted(manifest.artifacts)
        raise UsageError(
            "--artifact",
            expected=f"one of {', '.join(known)}",
            found=f"'{artifact_name}'{closest(artifact_name, known)}",
            fix="use a name from that list",
        )
    artifact = manifest.artifacts[artifact_name]
    own = [row for row in rows if row.sha256 == artifact.sha256 and row.artifact == artifact_name and row.runtime in BUNDLE_RUNTIMES]
    if not own:
        return _unmeasured_shipment(artifact, device)
    row = max(own, key=lambda row: row.iterations_per_s)
    missed = why_not(row, recipe.limits, device.budgets, has_top1=False)
    remarks = (f"shipped because --artifact names it, although {missed}",) if missed else ()
    return _measured_shipment(
        artifact, row, f"{row.label} named by --artifact, {row.iterations_per_s:.1f} it/s", (), remarks, recipe.limits
    )


def _measured_shipment(
    artifact: Artifact, row: Measured, why: str, passed_over: tuple[str, ...], remarks: tuple[str, ...], limits: Limits
) -> Shipment:
    threads = int(row.plain["conditions"].get("threads") or 1)
    return Shipment(
        artifact=_checked(artifact),
        runtime=row.runtime,
        # What AUTO chose where it was measured is what is shipped: the processor it needs is then known.
        target=Target(row.provider.removeprefix("AUTO:"), row.float_precision, threads, batch_size=1),
        measured={name: value for name, value in row.plain.items() if name not in RAW},
        why=why,
        passed_over=passed_over,
        remarks=remarks + _remarks(row.plain, limits),
    )


def _remarks(row: Mapping[str, Any], limits: Limits) -> tuple[str, ...]:
    """What a row leaves open."""
    remarks = []
    drop = row.get("top1_drop")
    if drop and drop.get("high", 0.0) > limits.max_top1_drop >= drop["points"]:
        remarks.append(
            f"on these images the drop may be up to {drop['high']:.2f} points (95 %), beyond the limit of {limits.max_top1_drop:.2f}"
        )
    if row.get("top1") is None:
        reason = row.get("top1_reason") or "no labelled images"
        remarks.append(f"top-1 was not measured ({reason}), so the recipe's drop limit was not checked")
    if row.get("emulated"):
        remarks.append("the figures were measured on another host than the profile describes: emulated")
    if row.get("unstable"):
        remarks.append(f"the speed is not to be trusted: {row['unstable']}")
    return tuple(remarks)


def _unmeasured_shipment(artifact: Artifact, device: Device) -> Shipment:
    library = str(artifact.notes.get("library", ""))
    for use in device.runtimes:
        fits = artifact.format in plugins.load("runtimes", use.runtime).FORMATS and library in ("", "vitedge", use.runtime)
        if use.runtime in BUNDLE_RUNTIMES and fits:
            return Shipment(
                artifact=_checked(artifact),
                runtime=use.runtime,
                target=Target(use.provider, "fp32", 1, batch_size=1),
                measured=None,
                why=f"{artifact.name} ({use.runtime}) named by --artifact, never measured on '{device.name}'",
                passed_over=(),
                remarks=(f"neither speed nor top-1 was measured on '{device.name}': run `vitedge bench --device {device.name}`",),
            )
    offered = ", ".join(use.runtime for use in device.runtimes)
    raise UsageError(
        f"--artifact {artifact.name}",
        expected=f"a file that {' or '.join(BUNDLE_RUNTIMES)} runs on '{device.name}'",
        found=f"{artifact.format}{f' for {library}' if library else ''}, and the device has {offered}",
        fix="name another artifact or device",
    )


def _checked(artifact: Artifact) -> Artifact:
    """The artifact, after comparing its files with the manifest's hash."""
    missing = [str(path) for path in artifact.files if not path.is_file()]
    if missing or hash_files(artifact.files) != artifact.sha256:
        raise InputError(
            str(artifact.path),
            expected=f"the file with sha256 {artifact.sha256[:12]}...",
            found=f"no {', '.join(missing)}" if missing else "other contents",
            fix="export the recipe again",
        )
    if artifact.format == "onnx" and len(artifact.files) > 1:
        raise InputError(
            str(artifact.path),
            expected="an ONNX file with its weights inside",
            found="external data",
            fix="export it without external data",
        )
    return artifact
