"""Data sets: put them in the cache, say what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vitedge.cli._output import data_option, emit_json, json_option, progress_bars, say

if TYPE_CHECKING:
    from vitedge.data import Dataset, Source


@click.group()
def command() -> None:
    """Data sets: put them in the cache, say what is in them.

    \b
    vitedge data fetch cifar10          download it, or check what is there
    vitedge data info photos/           a folder of your own: train/<class>/*, test/<class>/*

    A data set is looked for by --data, then in the folder VITEDGE_DATA, then in the cache
    (VITEDGE_CACHE), then downloaded. There it may be called NAME/, NAME.tar, NAME.tar.gz, NAME.tgz,
    NAME.zip or, for CIFAR, by its official name (cifar-10-binary.tar.gz).
    """


@command.command()
@click.argument("name")
@json_option
def fetch(name: str, as_json: bool) -> None:
    """Put a data set in the cache, checked and decoded.

    Says where it is. What is there already, in VITEDGE_DATA or the cache, is checked and kept. An interrupted download
    goes on where it stopped.
    """
    from vitedge.data import find
    from vitedge.data.identity import check

    with progress_bars() as bar:
        source = find(name, progress=bar(f"download {name}"))
        checked = check(source)
        dataset = _load(source, bar)
    if as_json:
        emit_json({"schema_version": 1, **_identity(source, dataset), "checked": checked})
        return
    say(f"{dataset.label}: {source.path} ({checked}; every image decoded)")


@command.command()
@click.argument("name", metavar="[NAME|PATH]", default="cifar10")
@data_option
@json_option
def info(name: str, data: str | None, as_json: bool) -> None:
    """Say what is in a data set.

    Its classes, images per split, image sizes, and mean and standard deviation of the pixels.
    """
    from dataclasses import asdict
    from pathlib import Path

    from vitedge.data import find
    from vitedge.data.describe import describe

    source = find(name, data or (name if Path(name).exists() else None), download=False)
    with progress_bars() as bar:
        dataset = _load(source, bar)
        figures = describe(dataset)
    if as_json:
        emit_json({"schema_version": 1, **_identity(source, dataset), "classes": dataset.classes, **asdict(figures)})
        return
    shown = ", ".join(dataset.classes[:12]) + (", ..." if len(dataset.classes) > 12 else "")
    say(f"{dataset.label}: {source.path} ({source.kind})")
    say(f"  classes  {len(dataset.classes)}: {shown}")
    say(f"  images   {', '.join(f'{part} {count}' for part, count in figures.counts.items())}")
    say(f"  sizes    {_size(figures.smallest)}" + (f" to {_size(figures.largest)}" if figures.smallest != figures.largest else ""))
    say(f"  mean     {_channels(figures.mean)} of RGB in [0, 1], over {figures.sampled} train images")
    say(f"  std      {_channels(figures.std)}")
    say(f"  digest   {dataset.digest}")
    for note in dataset.notes:
        say(f"  note     {note}")


def _load(source: Source, bar: Any) -> Dataset:
    from vitedge.data import load

    return load(source, progress=bar(f"read {source.name}"))


def _identity(source: Source, dataset: Dataset) -> dict[str, Any]:
    facts = {"name": source.name, "path": str(source.path.resolve()), "kind": source.kind}
    return {**facts, "label": dataset.label, "digest": dataset.digest, "notes": dataset.notes}


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} px"


def _channels(values: tuple[float, float, float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
