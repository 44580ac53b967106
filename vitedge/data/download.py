"""Downloading a known data set: checksum, progress, and going on where an interrupted download stopped."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

import vitedge
from vitedge import artifact
from vitedge.data.official import Official
from vitedge.errors import InputError, UsageError
from vitedge.progress import Progress

TIMEOUT = 30  # seconds without a byte
_BLOCK = 1 << 18


def fetch(official: Official, folder: Path, progress: Progress) -> Path:
    """The archive in `folder`, downloaded where it is not there with the right checksum.

    What has arrived is kept as `<file>.part` when the connection breaks or the process is killed, and
    the next call goes on from there where the server can.

    Args:
        official: Which data set.
        folder: Where the file is to be.
        progress: Told bytes.

    Raises:
        UsageError: No network, or the server does not have it; the fix says where to put the file.
        InputError: What arrived has another checksum; it is removed.
        OutputError: The folder cannot be written.
    """
    import pooch
    from filelock import FileLock

    pooch.get_logger().setLevel("WARNING")  # it prints otherwise, and only vitedge.cli may
    target = folder / official.file_name
    with artifact.saying_where(target):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            try:
                pooch.retrieve(
                    official.url,
                    known_hash=f"md5:{official.md5}",
                    fname=target.name,
                    path=folder,
                    downloader=_Resuming(target, progress),
                )
            except ValueError as error:
                raise InputError(
                    official.url,
                    expected=f"a file with md5 {official.md5}",
                    found="another checksum",
                    fix=f"try again, or put {target.name} into {folder}",
                ) from error
    return target


class _Resuming:
    """A downloader for pooch that keeps what it has: pooch's own starts from nothing each time."""

    def __init__(self, target: Path, progress: Progress) -> None:
        self._target, self._progress = target, progress
        self._part = target.with_name(f"{target.name}.part")

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        try:
            self._download(url)
        except urllib.error.HTTPError as error:
            error.close()
            raise self._no_network(url, f"HTTP {error.code} {error.reason}") from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise self._no_network(url, str(getattr(error, "reason", "") or error)) from error
        self._part.replace(output_file)

    def _download(self, url: str) -> None:
        have = self._part.stat().st_size if self._part.exists() else 0
        try:
            response = self._ask(url, have)
        except urllib.error.HTTPError as error:
            if not (have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE):
                raise
            # The part is as long as the file, or longer and so of another file; the checksum tells.
            error.close()
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            have, response = 0, self._ask(url, 0)
        with response:
            if response.headers.get("Content-Range", "").partition("-")[0] != f"bytes {have}":
                have = 0  # the server sends the whole file, whatever was asked
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else 0
            with self._part.open("ab" if have else "wb") as stream:
                while block := response.read(_BLOCK):
                    have += stream.write(block)
                    self._progress(have, total, f"{self._target.name}, {have / 1e6:.0f} MB")
        if have < total:
            raise ConnectionError(f"the connection ended after {have} of {total} bytes")

    @staticmethod
    def _ask(url: str, start: int) -> http.client.HTTPResponse:
        headers = {"User-Agent": f"vitedge/{vitedge.__version__}", **({"Range": f"bytes={start}-"} if start else {})}
        response: http.client.HTTPResponse = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
        return response

    def _no_network(self, url: str, found: str) -> UsageError:
        kept = f" ({self._part.stat().st_size} bytes are kept, and the same command goes on from there)" if self._part.exists() else ""
        return UsageError(
            f"download of {url}",
            expected="an answer with the file",
            found=f"{found}{kept}",
            fix=f"put {self._target.name} into {self._target.parent} (or into a folder that VITEDGE_DATA names), or give --data PATH",
        )
