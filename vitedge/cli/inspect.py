"""Look inside a model: ranges, attention, SQNR, where int8 really runs; or what a recipe makes of one, before training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._output import data_option, emit_json, json_option, progress_bars, say, seed_option, weights_option

if TYPE_CHECKING:
    from rich.console import Console

    from vitedge.inspect.placement import Placed
    from vitedge.inspect.run import Inspection, QuantizedFile

JSON_NAME = "inspect.json"
_ROWS = 8  # of a table; the rest is in the JSON file


@click.command()
@click.argument("model", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="FP32.onnx", help="Float parent of quantized files.  [default: the manifest's]"
)
@data_option
@click.option(
    "--recipe",
    metavar="NAME|PATH",
    help="Alone: what its techniques make of its model. With MODEL: preprocessing and data set, for a file that carries none.",
)
@weights_option
@click.option("--all", "all_modules", is_flag=True, help="A recipe's cost for every module, not summed up by part.")
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="Train images to look at MODEL with.")
@seed_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder.  [default: MODEL's name + .inspect, here; for a recipe alone none]"
)
@click.option("--no-pictures", is_flag=True, help="Write no PNG files; matplotlib is then not needed.")
@json_option
def command(
    model: Path | None,
    against: Path | None,
    data: str | None,
    recipe: str | None,
    weights: str | None,
    all_modules: bool,
    images: int,
    seed: int | None,
    output: Path | None,
    no_pictures: bool,
    as_json: bool,
) -> int:
    """Look inside MODEL: a build folder, a checkpoint, an ONNX file, or an OpenVINO .xml or its folder; or at a recipe before training.

    Shown, and written into a folder as JSON and pictures: how far the channels of each LayerNorm's input reach, what 4 bits keep of
    attention values on a uniform and on a log2 grid, SQNR of each product of a quantized file against its float parent, which
    products the runtime really runs in int8, and of a build that was pruned the scores of what was kept and removed. Values are those of
    train images (--data or VITEDGE_DATA).

    Without MODEL, --recipe shows what each technique makes of the recipe's model: weights, multiply-accumulates (MACs) and bytes before and
    after, and where it becomes larger or slower. Nothing is trained or downloaded; without data or weights both are random.

    \b
    vitedge inspect build/deit_tiny_112_int8
    vitedge inspect --recipe deit_tiny_lsq_w4a8
    """
    _check_question(model, recipe, against, weights, all_modules)
    if model is None:
        return _inspect_recipe(str(recipe), data, weights, seed, output, all_modules, as_json)
    from vitedge.artifact import write_json
    from vitedge.cli.bench import result_console
    from vitedge.host import probe_host
    from vitedge.inspect.images import load_images
    from vitedge.inspect.pictures import check_matplotlib, write_pictures
    from vitedge.inspect.run import find_subject, inspect_model, with_contract
    from vitedge.recipe import load_recipe

    story = load_recipe(recipe) if recipe else None
    folder = output or Path(f"{model.resolve().name if model.is_dir() else model.stem}.inspect")
    check_folder(folder)
    if not no_pictures:
        check_matplotlib()
    subject = with_contract(find_subject(model, against), story.contract() if story else None)
    pictures = load_images(subject.looked_at, subject.folder, data, story, images, seed or 0)
    with progress_bars() as bar:
        found = inspect_model(subject, pictures, probe_host().usable_cores, bar)
    plain = found.to_plain()
    drawn = [] if no_pictures else [path.name for path in write_pictures(found, folder)]
    plain["folder"], plain["pictures"] = str(folder), drawn
    write_json(folder / JSON_NAME, plain)
    if as_json:
        emit_json(plain)
    else:
        print_tables(result_console(), found)
    for name, reason in found.subject.left_out:
        say(f"not looked at: {name}: {reason}")
    say(f"written to {folder}: {', '.join([JSON_NAME, *drawn])}")
    return 0


def _check_question(model: Path | None, recipe: str | None, against: Path | None, weights: str | None, all_modules: bool) -> None:
    """Refuse options that say nothing about what is asked.

    Raises:
        UsageError: Neither a model nor a recipe, or an option of the one for the other.
    """
    from vitedge.errors import UsageError

    if model is None and recipe is None:
        raise UsageError("vitedge inspect", expected="MODEL, or --recipe NAME|PATH", found="neither", fix="name what to look at")
    stray = {"--against": against} if model is None else {"--weights": weights, "--all": all_modules}
    for option, value in stray.items():
        if value:
            expected, found = ("MODEL beside it", "a recipe alone") if model is None else ("--recipe without MODEL", str(model))
            raise UsageError(option, expected=expected, found=found, fix="leave one of them out")


def _inspect_recipe(
    recipe: str, data: str | None, weights: str | None, seed: int | None, output: Path | None, all_modules: bool, as_json: bool
) -> int:
    """What a recipe costs before training; returns the exit code.

    A technique that refuses ends with its error's code, after what was counted so far: under --json that is the whole of stdout.
    """
    from vitedge.artifact import write_json
    from vitedge.cli._cost import print_cost
    from vitedge.cli.bench import result_console
    from vitedge.host import probe_host
    from vitedge.pipeline import require_torch
    from vitedge.recipe import load_recipe

    story = load_recipe(recipe)
    if seed is not None:
        story = story.model_copy(update={"seed": seed})
    if output is not None:
        check_folder(output)
    require_torch("vitedge inspect --recipe")
    from vitedge.inspect.recipe_cost import estimate_cost

    with progress_bars() as bar:
        cost = estimate_cost(story, data, weights, Path("build"), probe_host().usable_cores, bar)
    plain = cost.to_plain()
    if output is not None:
        write_json(output / JSON_NAME, plain)
        say(f"written to {output}: {JSON_NAME}")
    if as_json:
        emit_json(plain)
    else:
        print_cost(result_console(), cost, all_modules)
    if cost.error is not None:
        say(f"error: {cost.error}")
        return cost.error.exit_code
    return 0


def check_folder(folder: Path) -> None:
    """Refuse to write beside files of something else, before any work.

    Raises:
        UsageError: A file of that name, or a folder with other files in it.
    """
    from vitedge.errors import UsageError

    if folder.is_file():
        raise UsageError(str(folder), expected="a folder", found="a file of that name", fix="choose another folder with -o")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JSON_NAME).is_file():
        raise UsageError(
            str(folder),
            expected="an empty folder or one of an earlier inspection",
            found="other files",
            fix="choose another folder with -o",
        )


def print_tables(console: Console, found: Inspection) -> None:
    """The result for people, on stdout."""
    name, images = found.subject.looked_at.name, found.images
    console.print(f"{name} with {len(images.x_BCHW)} train images of {images.label}, seed {images.seed}")
    _print_norms(console, found)
    _print_attention(console, found)
    _print_importance(console, found)
    for file in found.files:
        _print_placement(console, file)
        _print_sqnr(console, file)


def _table(console: Console, title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Any:
    from rich.table import Table

    console.print(f"\n[bold]{title}[/bold]")
    table = Table()
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _print_norms(console: Console, found: Inspection) -> None:
    if not found.norms:
        console.print(f"LayerNorm inputs: {found.missing_norms}")
        return
    rows = sorted((norm.to_plain() for norm in found.norms), key=lambda row: -row["spread"])
    headings = ("channels", "median range", "widest range", "of channel", "spread")
    table = _table(console, "LayerNorm inputs, widest spread first", ("layer",), headings)
    for row in rows[:_ROWS]:
        figures = (str(row["channels"]), f"{row['median_range']:.3g}", f"{row['widest_range']:.3g}", str(row["widest_channel"]))
        table.add_row(row["layer"], *figures, f"{row['spread']:.1f}")
    console.print(table)
    _print_rest(console, len(rows))
    console.print("spread: range of the widest channel over the median channel's; one scale for a layer has to cover the widest")


def _print_attention(console: Console, found: Inspection) -> None:
    if not found.attentions:
        console.print(f"attention: {found.missing_attentions}")
        return
    rows = sorted((lost.to_plain() for lost in found.attentions), key=lambda row: -row["uniform_zero_percent"])
    headings = ("highest", "uniform to 0", "weight lost", "log2 to 0", "weight lost")
    table = _table(console, "attention values on 4-bit grids, most lost first", ("layer",), headings)
    for row in rows[:_ROWS]:
        shares = [row[f"{grid}_{what}_percent"] for grid in ("uniform", "log2") for what in ("zero", "lost_attention")]
        table.add_row(row["layer"], f"{row['highest']:.3f}", *(_percent(share) for share in shares))
    console.print(table)
    _print_rest(console, len(rows))
    console.print("to 0: share of values the grid rounds to zero; weight lost: their share in the sum of all attention")


def _print_importance(console: Console, found: Inspection) -> None:
    if not found.importances:
        console.print(f"importance scores: {found.missing_importances}")
        return
    table = _table(console, "weights that pruning scored", ("step", "units"), ("weights", "removed", "threshold"))
    for importance in found.importances:
        threshold = "" if importance.threshold is None else f"{importance.threshold:.3g}"
        removed = f"{importance.params - importance.kept:,} ({_percent(importance.removed_percent)})"
        table.add_row(f"{importance.step} {importance.technique}", importance.unit, f"{importance.params:,}", removed, threshold)
    console.print(table)


def _percent(share: float) -> str:
    return f"{share:.1f} %" if share >= 0.05 or share == 0 else f"{share:.1g} %"


def _print_rest(console: Console, rows: int) -> None:
    if rows > _ROWS:
        console.print(f"{rows - _ROWS} more in {JSON_NAME}")


def _print_placement(console: Console, file: QuantizedFile) -> None:
    placement = file.placement
    headings = ("layer", "in the file", "runs as", "kernel")
    table = _table(console, f"{file.artifact.name} in {placement.runtime}, batch 1", headings, ("layers", "Q/DQ left"))
    for layer, alike in collapse(placement.products):
        first = alike[0]
        table.add_row(layer, first.in_file, first.runs_as, first.operator, str(len(alike)), str(sum(one.quantize_left for one in alike)))
    console.print(table)
    in_file = ", ".join(f"{count} {kind}" for kind, count in placement.in_file.items()) or "no Q/DQ"
    left = ", ".join(f"{count} {kind}" for kind, count in placement.left.items()) or "none"
    counts = ", ".join(f"{count} {kind}" for kind, count in placement.counts().items() if count and kind != "quantize_left")
    console.print(f"{in_file} in the file, {left} left in the running graph; products that run: {counts}")


def collapse(products: tuple[Placed, ...]) -> list[tuple[str, list[Placed]]]:
    """Products that are alike in all but the number of their block, under one name: `blocks.*.mlp.fc1`."""
    groups: dict[tuple[Any, ...], list[Placed]] = {}
    for product in products:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", product.layer)
        groups.setdefault((name, product.in_file, product.runs_as, product.operator, product.quantize_left), []).append(product)
    return [(key[0] if len(alike) > 1 else alike[0].layer, alike) for key, alike in groups.items()]


def _print_sqnr(console: Console, file: QuantizedFile) -> None:
    if file.comparison is None:
        console.print(f"SQNR: {file.reason}")
        return
    plain = file.comparison.to_plain()
    table = _table(
        console, f"{file.artifact.name} against {plain['against']}, worst product first", ("layer",), ("SQNR", "signal", "noise")
    )
    for row in plain["nodes"][:_ROWS]:
        table.add_row(row["layer"], _decibel(row["sqnr_db"]), f"{row['signal_rms']:.3g}", f"{row['noise_rms']:.3g}")
    console.print(table)
    _print_rest(console, len(plain["nodes"]))
    answers = plain["logits"]
    without = f"; {len(plain['unmatched'])} products have no counterpart (why: {JSON_NAME})" if plain["unmatched"] else ""
    console.print(
        f"answers: {_decibel(answers['sqnr_db'])}, same class on {answers['top1_agreement']:.2f} % of {plain['images']} images{without}"
    )
    console.print("a product's SQNR has the noise of all before it in it; signal and noise are root mean squares")


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"
