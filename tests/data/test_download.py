"""Downloading from a server on this machine: whole, resumed, damaged, absent."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.data.made import cifar10_members, tar_of
from vitedge.data import find, load, official
from vitedge.data.download import fetch
from vitedge.errors import InputError, UsageError
from vitedge.progress import silent


@dataclass
class Served:
    """What the server has and how it behaves; `asked` collects the Range headers."""

    content: bytes = b""
    honours_ranges: bool = True
    breaks_after: int | None = None
    status: int | None = None
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


def handler_of(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            served.asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and served.honours_ranges else 0
            total = len(served.content)
            if served.status is not None:
                self.send_error(served.status)
                return
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = served.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.end_headers()
            self.wfile.write(body[: served.breaks_after])

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet."""

    return Handler


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    members, _ = cifar10_members()
    state = Served(tar_of(tmp_path / "published.tar.gz", members).read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state))
    state.url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def published(served: Served) -> official.Official:
    return replace(official.OFFICIAL["cifar10"], url=served.url, md5=hashlib.md5(served.content, usedforsecurity=False).hexdigest())


def part_of(folder: Path) -> Path:
    return folder / "cifar-10-binary.tar.gz.part"


def test_name_is_downloaded_into_the_cache_checked_and_labelled(served: Served, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(official.OFFICIAL, "cifar10", published(served))
    told: list[tuple[float, float]] = []
    source = find("cifar10", progress=lambda done, total, text="": told.append((done, total)))
    assert source.path == own_cache / "data" / "cifar-10-binary.tar.gz" and source.kind == "cifar_binary"
    assert source.path.read_bytes() == served.content and told[-1] == (len(served.content), len(served.content))
    assert load(source).label == "CIFAR-10"
    find("cifar10")
    assert served.asked == [None]  # the second call asks nobody


def test_interrupted_download_goes_on_where_it_stopped(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "to"
    served.breaks_after = 5000
    with pytest.raises(UsageError, match=r"ended after 5000 of \d+ bytes \(5000 bytes are kept, and the same command goes on from there\)"):
        fetch(published(served), folder, silent)
    assert part_of(folder).read_bytes() == served.content[:5000]
    served.breaks_after = None
    assert fetch(published(served), folder, silent).read_bytes() == served.content
    assert served.asked == [None, "bytes=5000-"] and not part_of(folder).exists()


def test_server_that_ignores_ranges_sends_the_whole_again(served: Served, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(served.content[:3000])
    served.honours_ranges = False
    assert fetch(published(served), tmp_path, silent).read_bytes() == served.content
    assert served.asked == ["bytes=3000-"]


def whole(content: bytes) -> bytes:
    return content


def longer(content: bytes) -> bytes:
    return content + b"of another file"


@pytest.mark.parametrize(("part", "requests"), [(whole, 1), (longer, 2)])
def test_part_as_long_as_the_file_or_longer(served: Served, tmp_path: Path, part: Callable[[bytes], bytes], requests: int) -> None:
    part_of(tmp_path).write_bytes(part(served.content))
    assert fetch(published(served), tmp_path, silent).read_bytes() == served.content
    assert len(served.asked) == requests


def test_wrong_checksum_is_refused_and_leaves_no_file(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "to"
    with pytest.raises(InputError, match=f"expected a file with md5 {'0' * 32}, found another checksum"):
        fetch(replace(published(served), md5="0" * 32), folder, silent)
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == []


def test_part_of_another_file_is_noticed_by_the_checksum_and_the_next_call_starts_anew(served: Served, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(b"?" * 100)
    with pytest.raises(InputError, match="another checksum"):
        fetch(published(served), tmp_path, silent)
    assert fetch(published(served), tmp_path, silent).read_bytes() == served.content


def test_file_with_another_checksum_in_the_cache_is_downloaded_again(served: Served, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"half a download")
    assert fetch(published(served), tmp_path, silent).read_bytes() == served.content


@pytest.mark.parametrize("status", [404, 503])
def test_server_without_the_file_is_one_line(served: Served, tmp_path: Path, status: int) -> None:
    served.status = status
    with pytest.raises(UsageError, match=rf"found HTTP {status} .*; put cifar-10-binary.tar.gz into .*to .*VITEDGE_DATA.*--data PATH"):
        fetch(published(served), tmp_path / "to", silent)


def test_no_network_is_one_line_that_says_where_to_put_the_file(tmp_path: Path) -> None:
    unreachable = replace(official.OFFICIAL["cifar100"], url="http://127.0.0.1:9/cifar-100-binary.tar.gz")
    with pytest.raises(
        UsageError, match=r"refused; put cifar-100-binary.tar.gz into .*to \(or into a folder that VITEDGE_DATA names\)"
    ) as caught:
        fetch(unreachable, tmp_path / "to", silent)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
