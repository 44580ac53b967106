"""Encoded images to uint8 HWC RGB arrays, many at a time."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from vitedge.data.members import Members
from vitedge.errors import InputError
from vitedge.progress import Progress

# Only these: Pillow would otherwise hand PostScript, which is a program, to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_CHUNK = 64  # images per job: one 32 px image is less work than handing it to a thread
_AHEAD = 8  # jobs under way: enough for any number of threads here, and few bytes held


def decode(data: bytes, where: str) -> np.ndarray:
    """One encoded image to uint8 HWC RGB, turned upright by its EXIF orientation.

    Grey, palette, CMYK and transparent images become RGB the way `Preprocessing` does it: the colour
    under transparent pixels is kept. Of an animation the first frame is taken.

    Args:
        data: The encoded file.
        where: What errors name.

    Raises:
        InputError: Damaged, of a format that is not read, or with more than 8 bits per channel.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Odd metadata is no reason to refuse pixels that decode; a bomb's size is, as an error below.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            mode = image.mode
            if not mode.startswith(("I", "F")):
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types on damaged bytes
        raise _unreadable(where, f"{type(error).__name__}: {error}") from error
    raise InputError(where, expected="8 bits per channel", found=f"mode {mode}", fix="convert it to 8 bits, choosing the range yourself")


def _unreadable(where: str, found: str) -> InputError:
    return InputError(where, expected=f"a readable image ({', '.join(FORMATS)})", found=found, fix="replace or remove it")


def decode_all(members: Members, kept: list[int], where: str, progress: Progress) -> Iterator[list[np.ndarray]]:
    """Decode images in order, in batches, with threads.

    Args:
        members: The files.
        kept: Which of them, in the order to yield.
        where: What errors name before the member.
        progress: Told after every batch.

    Raises:
        InputError: An image is damaged; names it.
    """

    def job(chunk: list[tuple[str, bytes]]) -> list[np.ndarray]:
        return [decode(data, f"{where}: {name}") for name, data in chunk]

    # Files are read here, in order, since a compressed tar can only be read forward; threads decode.
    encoded = ((members.names[position], members.read(position)) for position in kept)
    done = 0
    progress(0, len(kept), "decoding images")
    with ThreadPoolExecutor() as pool:
        for images in _in_order(pool, (pool.submit(job, chunk) for chunk in _chunks(encoded))):
            yield images
            done += len(images)
            progress(done, len(kept), "decoding images")


def _chunks(items: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    stream = iter(items)
    while chunk := list(itertools.islice(stream, _CHUNK)):
        yield chunk


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Future[list[np.ndarray]]]) -> Iterator[list[np.ndarray]]:
    """Results in order with a bounded number of jobs under way; what waits is dropped when one fails."""
    waiting = list(itertools.islice(jobs, _AHEAD))
    try:
        while waiting:
            yield waiting.pop(0).result()
            waiting += itertools.islice(jobs, 1)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class DecodedOnAccess:
    """Images of a source too large to keep decoded: each is read and decoded when it is asked for."""

    def __init__(self, members: Members, kept: list[int], where: str) -> None:
        self._members, self._kept, self._where = members, kept, where

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, position: int) -> np.ndarray:
        name = self._members.names[self._kept[position]]
        return decode(self._members.read(self._kept[position]), f"{self._where}: {name}")


def estimate_bytes(members: Members, kept: list[int]) -> int:
    """Size of all images decoded, from the headers of up to 64 of them.

    Returns:
        Bytes; images whose header cannot be read count as empty, and fail when they are decoded.
    """
    count = min(64, len(kept))
    spread = np.linspace(0, len(kept) - 1, count).astype(int) if members.random_access else np.arange(count)
    pixels = 0
    for position in spread:
        width, height = _header_size(members.read(kept[int(position)]))
        pixels += width * height
    return 3 * pixels * len(kept) // count


def _header_size(data: bytes) -> tuple[int, int]:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            return int(image.width), int(image.height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0
