"""Quantize any ONNX classifier to int8, and say what really became int8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._guard import show_guards
from vitedge.cli._output import data_option, device_option, emit_json, json_option, progress_bars, say, seed_option, show_integers

if TYPE_CHECKING:
    from vitedge.artifact import Artifact
    from vitedge.quantize._alone import TrainImages
    from vitedge.recipe import GuardConfig


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--scheme", "schemes", multiple=True, metavar="LIBRARY.SCHEME", help="What to build, repeatable; all by default.")
@device_option()
@data_option
@click.option("--recipe", metavar="NAME|PATH", help="Take the preprocessing and the data set from it, for a file that carries none.")
@click.option("--images", type=click.IntRange(1), default=256, show_default=True, help="Calibration images, of the train split.")
@click.option("--method", type=click.Choice(["minmax", "percentile", "entropy"]), help="How ONNX Runtime's static scheme chooses ranges.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Nodes that stay in float, by name (*, ?), repeatable.")
@click.option("--smooth-quant-alpha", type=click.FloatRange(0, 1), help="SmoothQuant of OpenVINO's static scheme.")
@click.option("--max-top1-drop", type=click.FloatRange(0, 100), help="Leave layers in float until no more points are lost on validation.")
@click.option("--guard-minutes", type=click.FloatRange(0), help="Time for that, each file.  [default: 10]")
@seed_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder.  [default: FILE's name + .int8, here]")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@json_option
def command(
    file: Path,
    schemes: tuple[str, ...],
    device: str,
    data: str | None,
    recipe: str | None,
    images: int,
    method: str | None,
    exclude: tuple[str, ...],
    smooth_quant_alpha: float | None,
    max_top1_drop: float | None,
    guard_minutes: float | None,
    seed: int | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Quantize FILE, a float ONNX classifier of vitedge or not, for a device.

    Static schemes read activation ranges off train images (--data or VITEDGE_DATA), preprocessed as the
    file says; a file that does not say takes a recipe's with --recipe. Agreement with fp32 is measured
    on train images that calibration did not see. Exit code 3: a file loses more than --max-top1-drop.
    """
    from vitedge.device import load_device, resolve_rules
    from vitedge.errors import UsageError
    from vitedge.host import probe_host
    from vitedge.model_file import open_artifact
    from vitedge.quantize import _alone
    from vitedge.recipe import load_recipe

    story = load_recipe(recipe) if recipe else None
    limit = _guard_config(max_top1_drop, guard_minutes)
    given = {"method": method, "exclude": exclude or None, "smooth_quant_alpha": smooth_quant_alpha}
    chosen = _alone.configure(list(schemes) or _alone.all_schemes(), {k: v for k, v in given.items() if v is not None})
    source = _alone.with_contract(_open_float(open_artifact(file)), story)
    folder = output or Path(f"{file.stem}.int8")
    check_outputs(file, folder, [name for name, _ in chosen], overwrite)
    host = probe_host()
    profile = load_device(device)
    rules, threads = resolve_rules(profile, host), profile.threads or host.usable_cores
    skipped = _not_installed([name for name, _ in chosen], asked_for=bool(schemes))
    todo = [(name, config) for name, config in chosen if name not in skipped]
    pictures: TrainImages | None = None
    why_none = ""
    try:
        data_source, spec = _alone.find_data(source, data, story)
        if limit and story is None and not (source.path.parent / "recipe.yaml").is_file():
            say("caution: the model may have seen the tenth of train that the limit is held on; --recipe says which part it has not")
        pictures = _alone.load_images(source, data_source, spec, images, seed or 0)
    except UsageError as error:
        if data or limit or any(_alone.needs_images(name) for name in schemes):
            raise
        why_none = str(error)
        skipped |= {name: f"no calibration images ({why_none})" for name, _ in todo if _alone.needs_images(name)}
    with progress_bars() as bar:
        wanted = [entry for entry in todo if entry[0] not in skipped]
        built = _build(source, wanted, rules, pictures, seed or 0, folder, bar, limit, threads)
    rows = _judge(source, built, pictures, why_none, threads)
    if as_json:
        emit_json(_plain(source, profile.name, rows, skipped))
    else:
        print_table(rows, source, folder)
    for name, reason in skipped.items():
        say(f"not built: {name}: {reason}")
    return show_guards(artifact for _, artifact in built)


def _not_installed(names: list[str], asked_for: bool) -> dict[str, str]:
    """Schemes whose library is not here, each with why; one that was asked for by name is an error."""
    from vitedge.errors import UnavailableError
    from vitedge.quantize import _alone

    missing: dict[str, str] = {}
    for name in names:
        try:
            _alone.check_installed(name)
        except UnavailableError as error:
            if asked_for:
                raise
            missing[name] = str(error)
    return missing


def _guard_config(max_top1_drop: float | None, minutes: float | None) -> GuardConfig | None:
    from vitedge.errors import UsageError
    from vitedge.recipe import GuardConfig

    if max_top1_drop is None:
        if minutes is not None:
            raise UsageError("--guard-minutes", expected="--max-top1-drop beside it", found="no limit", fix="add --max-top1-drop POINTS")
        return None
    return GuardConfig(max_top1_drop=max_top1_drop, **({} if minutes is None else {"minutes": minutes}))


def _plain(source: Artifact, device: str, rows: list[dict[str, Any]], skipped: dict[str, str]) -> dict[str, Any]:
    """The result for programs."""
    return {
        "schema_version": 1,
        "source": {"path": str(source.path), "sha256": source.sha256, "size_bytes": source.size_bytes},
        "device": device,
        "artifacts": rows,
        "not_built": [{"scheme": name, "reason": reason} for name, reason in skipped.items()],
    }


def _open_float(artifact: Artifact) -> Artifact:
    from vitedge.errors import InputError

    if artifact.format != "onnx" or artifact.scheme != "fp32":
        raise InputError(
            str(artifact.path),
            expected="an ONNX file in fp32",
            found=f"{artifact.format} in {artifact.scheme}",
            fix="name the fp32 .onnx file",
        )
    return artifact


def check_outputs(file: Path, folder: Path, names: list[str], overwrite: bool) -> None:
    """Refuse to write over the input, or over anything without --overwrite, before any work."""
    from vitedge.errors import UsageError
    from vitedge.quantize._alone import output_path

    targets = [output_path(folder, name) for name in names]
    if file.resolve() in (folder.resolve(), *(target.resolve() for target in targets)):
        raise UsageError(str(folder), expected="another place than the input", found=str(file), fix="choose another folder with -o")
    if folder.is_file():
        raise UsageError(str(folder), expected="a folder", found="a file of that name", fix="choose another folder with -o")
    there = [target for target in targets if target.exists()]
    if there and not overwrite:
        raise UsageError(str(there[0]), expected="no such file yet", found="one that is there", fix="add --overwrite, or choose another -o")


def _build(
    source: Any,
    todo: Any,
    rules: Any,
    pictures: TrainImages | None,
    seed: int,
    folder: Path,
    bar: Any,
    limit: GuardConfig | None,
    threads: int,
) -> list[tuple[str, Artifact]]:
    from dataclasses import replace

    from vitedge import plugins
    from vitedge.guard import GuardJob, can_guard, guard
    from vitedge.quantize import Job
    from vitedge.quantize._alone import needs_images
    from vitedge.recipe import CalibrationConfig

    built = []
    for name, config in todo:
        library, _, scheme = name.partition(".")
        progress = bar(name)
        progress(0, 1)
        calibration = pictures.calibration if pictures is not None and needs_images(name) else None
        job = Job(source, scheme, config, rules, calibration, CalibrationConfig().batch_size, folder, progress)
        if limit is not None and pictures is not None and can_guard(config):
            artifact = guard(GuardJob(job, library, limit, pictures.validation, threads))
        else:
            artifact = plugins.load("quantize", library).quantize(job)
        if pictures is not None and calibration is not None:
            used = {"images": len(calibration), "seed": seed, "data": pictures.label, "split": "train"}
            artifact = replace(artifact, notes={**artifact.notes, "calibration": used})
        progress(1, 1)
        built.append((name, artifact))
    return built


def _judge(
    source: Any, built: list[tuple[str, Artifact]], pictures: TrainImages | None, why_none: str, threads: int
) -> list[dict[str, Any]]:
    """One plain row per file; agreement is None, with the reason, where there are no images."""
    from vitedge.quantize import _alone

    reference_BC = _alone.logits(source, pictures.held_out, threads) if pictures is not None else None
    rows = []
    for name, artifact in built:
        found = None
        if pictures is not None and reference_BC is not None:
            found = _alone.agreement(reference_BC, artifact, pictures.held_out, threads)
        rows.append(
            {
                "scheme": name,
                "path": str(artifact.path),
                "sha256": artifact.sha256,
                "size_bytes": artifact.size_bytes,
                "size_ratio": artifact.notes["size_ratio"],
                "node_counts": artifact.notes["node_counts"],
                "settings": artifact.notes["settings"],
                "calibration": artifact.notes.get("calibration"),
                "guard": artifact.notes.get("guard"),
                "top1_agreement": found.top1_agreement if found else None,
                "sqnr_db": found.sqnr_db if found else None,
                "agreement_images": len(reference_BC) if reference_BC is not None else 0,
                "agreement_reason": why_none or None,
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], source: Artifact, folder: Path) -> None:
    """The result for people, on stdout."""
    from rich.table import Table

    from vitedge.cli.bench import result_console

    table = Table(title=f"{source.path.name}, {source.size_bytes / 1e6:.2f} MB in fp32")
    for heading in ("scheme", "MB", "smaller", "integer nodes", "float nodes", "same class", "SQNR"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for row in rows:
        counts = row["node_counts"]
        same, sqnr = row["top1_agreement"], row["sqnr_db"]
        table.add_row(
            row["scheme"],
            f"{row['size_bytes'] / 1e6:.2f}",
            f"{row['size_ratio']:.2f} x",
            show_integers(counts) or "0",
            str(counts.get("float", "?")),
            "-" if same is None else f"{same:.2f} %",
            "-" if sqnr is None else f"{sqnr:.1f} dB",
        )
    console = result_console()
    console.print(table)
    images = rows[0]["agreement_images"] if rows else 0
    of = f"agreement with fp32 on {images} held-out train images" if images else "agreement not measured: no images"
    console.print(f"{of}; written to {folder}")
