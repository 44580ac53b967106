"""The papers' figures of a build, as `vitedge inspect` draws them, made small enough to travel inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitedge.report.records import Table

WIDTH = 900  # pixels
COLOURS = 64
BUDGET = 700_000  # bytes of all pictures, in base64
CAPTIONS = {
    "importance": "Weights by importance score, kept and removed (Figure 3 of the paper)",
    "ranges": "Ranges of LayerNorm inputs (Figure 1 of the paper)",
    "attention": "Attention after softmax on 4-bit grids (Figure 1 of the paper)",
    "sqnr": "Signal to quantization noise along the network",
}


@dataclass(frozen=True)
class Picture:
    """One picture as it stands in the page.

    Attributes:
        title: Whose it is.
        caption: What it shows.
        uri: `data:` URI of a PNG.
        width, height: Pixels.
    """

    title: str
    caption: str
    uri: str
    width: int
    height: int


def load_pictures(table: Table) -> tuple[list[Picture], list[str]]:
    """The pictures found beside the build folders and in the folder that was named, and a line for each that is left out."""
    pictures: list[Picture] = []
    left_out: list[str] = []
    used = 0
    for path, title in _find(table):
        try:
            content, size = _small(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            left_out.append(f"{path}: no picture that can be read ({error})")
            continue
        uri = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
        if used + len(uri) > BUDGET:
            left_out.append(f"{path}: the page's pictures are limited to {BUDGET // 1000} KB")
            continue
        used += len(uri)
        pictures.append(Picture(title, CAPTIONS.get(path.stem, path.stem), uri, *size))
    return pictures, left_out


def _find(table: Table) -> Iterator[tuple[Path, str]]:
    """Paths and whose they are: `<build>.inspect/` beside the build or where the command runs, and the folder that was named."""
    seen: set[Path] = set()
    named = table.pictures
    folders = [
        (place, build.name) for build in table.builds for place in (build.with_name(f"{build.name}.inspect"), Path(f"{build.name}.inspect"))
    ]
    if named is not None:
        folders += [(named, named.name), *((child, child.name.removesuffix(".inspect")) for child in sorted(named.glob("*.inspect")))]
    for folder, title in folders:
        wanted = sorted(folder.glob("*.png")) if folder == named else [folder / f"{name}.png" for name in CAPTIONS]
        for path in wanted:
            if path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path, title


def _small(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The picture as a PNG of at most WIDTH pixels and few colours: plots have few."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, max(1, round(picture.height * WIDTH / picture.width))), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue(), picture.size
