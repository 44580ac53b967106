"""Bundles from a stranger: each is refused with one line and the right exit code, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitedge.cli.main import run
from vitedge.errors import InputError
from vitedge.host import architecture
from vitedge.package.archive import EPOCH
from vitedge.package.verify import verify

Members = dict[str, bytes]


def read(path: Path) -> Members:
    with zipfile.ZipFile(path) as bundle:
        return {info.filename: bundle.read(info) for info in bundle.infolist()}


def write(path: Path, members: Members, extra: list[tuple[zipfile.ZipInfo, bytes]] | None = None, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as bundle:
        for name, content in members.items():
            bundle.writestr(zipfile.ZipInfo(name, EPOCH), content, method)
        for info, content in extra or []:
            bundle.writestr(info, content)


def relist(members: Members, **fields: Any) -> Members:
    """The members with a manifest that vouches for them, as someone who knows the format would forge it."""
    manifest = json.loads(members["manifest.json"])
    manifest["files"] = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in members.items()
        if name != "manifest.json"
    }
    return {**members, "manifest.json": json.dumps({**manifest, **fields}).encode()}


def manifest_with(members: Members, change: Callable[[dict[str, Any]], object]) -> Members:
    manifest = json.loads(members["manifest.json"])
    change(manifest)
    return {**members, "manifest.json": json.dumps(manifest).encode()}


def link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    """A member that a Unix unpacker makes a symbolic link."""
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


def directory_offset(content: bytes, name: str) -> int:
    """Where the central directory's entry of a member begins."""
    start = content.index(b"PK\x01\x02")
    while content[start + 46 : start + 46 + len(name)] != name.encode():
        start = content.index(b"PK\x01\x02", start + 4)
    return start


def encrypted(content: bytes) -> bytes:
    """The zip with the encryption bit of labels.txt set in both of its headers."""
    entry = directory_offset(content, "labels.txt")
    local = struct.unpack_from("<I", content, entry + 42)[0]
    changed = bytearray(content)
    changed[entry + 8] |= 1
    changed[local + 6] |= 1
    return bytes(changed)


def grown(content: bytes) -> bytes:
    """The zip whose directory claims that labels.txt holds a gigabyte."""
    changed = bytearray(content)
    struct.pack_into("<II", changed, directory_offset(content, "labels.txt") + 20, 1 << 30, 1 << 30)
    return bytes(changed)


def npy(shape: tuple[int, ...], kind: str = "<f4", rows: int = 4) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue() + b"\0" * 16 * rows


Maker = Callable[[Path, Path], object]


def raw(change: Callable[[bytes], bytes]) -> Maker:
    """A bundle made from a good one's bytes."""
    return lambda good, bad: bad.write_bytes(change(good.read_bytes()))


def swap(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> Maker:
    """One member changed or added; the manifest does not know."""
    return lambda good, bad: write(bad, {**read(good), name: content}, method=method)


def without(name: str, *extra: tuple[zipfile.ZipInfo, bytes]) -> Maker:
    """One member left out, and others put in."""
    return lambda good, bad: write(bad, {key: value for key, value in read(good).items() if key != name}, list(extra))


def forge(name: str, content: bytes) -> Maker:
    """One member changed or added, and a manifest that vouches for it."""
    return lambda good, bad: write(bad, relist({**read(good), name: content}))


def claim(change: Callable[[dict[str, Any]], object]) -> Maker:
    """A manifest that says something else."""
    return lambda good, bad: write(bad, manifest_with(read(good), change))


OTHER = "aarch64" if architecture() == "x86_64" else "x86_64"
# name: (what makes it, exit code, what the line says)
BAD: dict[str, tuple[Maker, int, str]] = {
    "not a zip": (raw(lambda good: b"PK but no zip"), 1, "not a zip"),
    "empty": (raw(lambda good: b""), 1, "not a zip"),
    "absent": (lambda good, bad: None, 2, "no such file"),
    "a folder": (lambda good, bad: bad.mkdir(), 1, "directory"),
    "truncated": (raw(lambda good: good[:-200]), 1, "not a zip"),
    "front cut off": (raw(lambda good: good[200:]), 1, "expected"),
    "compressed": (lambda good, bad: write(bad, read(good), method=zipfile.ZIP_DEFLATED), 1, "stored member"),
    "bomb": (swap("labels.txt", b"0" * (64 << 20), zipfile.ZIP_DEFLATED), 1, "unpacks to"),
    "encrypted": (raw(encrypted), 1, "encrypted"),
    "claims a gigabyte": (raw(grown), 1, "declared"),
    "file missing": (without("labels.txt"), 1, "missing: labels.txt"),
    "link": (without("labels.txt", link("labels.txt", "/etc/passwd")), 1, "a link"),
    "no manifest": (without("manifest.json"), 1, "manifest.json"),
    "unknown file": (swap("extra.py", b"1"), 1, "unknown: extra.py"),
    "unknown file, vouched for": (forge("extra.py", b"1"), 1, "manifest.json"),
    "climbs out": (swap("../evil.py", b"1"), 1, "climb out"),
    "climbs out further in": (swap("golden/../../evil.py", b"1"), 1, "climb out"),
    "absolute": (swap("/tmp/evil.py", b"1"), 1, "climb out"),
    "backslash": (swap("..\\evil.py", b"1"), 1, "climb out"),
    "drive": (swap("C:evil.py", b"1"), 1, "climb out"),
    "folder member": (swap("golden/", b""), 1, "climb out"),
    "oversize member": (swap("labels.txt", b"ant\n" * 5000), 1, "bytes, as the manifest says"),
    "oversize manifest": (swap("manifest.json", b" " * (2 << 20)), 1, "bytes at most"),
    "changed byte": (swap("labels.txt", b"ape\nbee\ncat\ndog\n"), 1, "labels.txt: expected sha256"),
    "manifest not JSON": (swap("manifest.json", b"{"), 1, "manifest.json"),
    "manifest not text": (swap("manifest.json", b"\xff\xfe\x00"), 1, "manifest.json"),
    "manifest a list": (swap("manifest.json", b"[]"), 1, "manifest.json"),
    "manifest nested": (swap("manifest.json", b"[" * 200_000), 1, "manifest.json"),
    "other version": (claim(lambda m: m.update(schema_version=99)), 1, "schema_version 1"),
    "unknown field": (claim(lambda m: m.update(run_as_root=True)), 1, "run_as_root"),
    "field missing": (claim(lambda m: m.pop("runtime")), 1, "runtime"),
    "foreign pip line": (claim(lambda m: m.update(pip="pip install evil")), 1, "pip"),
    "bad preprocessing": (claim(lambda m: m["preprocessing"].update(size=-1)), 1, "preprocessing"),
    "other preprocessing": (claim(lambda m: m["preprocessing"].update(interpolation="nearest")), 1, "interpolation: nearest, bicubic"),
    "not a model": (forge("model.onnx", b"no model"), 1, "model.onnx"),
    "label missing": (forge("labels.txt", b"ant\nbee\n"), 1, "a column per label"),
    "labels not text": (forge("labels.txt", b"\xff\n\xff\n"), 1, "UTF-8"),
    "pickled logits": (forge("golden/expected.npy", npy((4, 4), "|O")), 1, "expected.npy"),
    "endless logits": (forge("golden/expected.npy", npy((1 << 40, 4))), 1, "expected.npy"),
    "other logits": (forge("golden/expected.npy", npy((4, 4))), 1, "selftest"),
    "golden picture broken": (forge("golden/00.png", b"no picture"), 1, "00.png"),
    "stranger's program": (forge("run.py", b"print('owned')"), 1, "not executed"),
    "stranger's preprocessing": (forge("preprocess.py", b"print('owned')"), 1, "not executed"),
    "instruction set lacking": (claim(lambda m: m["isa"].update(needed=[["avx9000"]])), 4, "avx9000"),
    "other processor": (claim(lambda m: m["isa"].update(arch=OTHER)), 4, "processor"),
    "provider lacking": (claim(lambda m: m.update(provider="AbacusExecutionProvider")), 4, "Abacus"),
}


@pytest.mark.parametrize("case", BAD)
def test_is_refused(case: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    bad = tmp_path / "bad.zip"
    make, code, says = BAD[case]
    make(bundle, bad)
    before = sorted(tmp_path.rglob("*"))
    assert run(["verify", str(bad)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_twice_is_refused(bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    with pytest.warns(UserWarning, match="Duplicate name"):
        write(bad, read(bundle), [(zipfile.ZipInfo("labels.txt", EPOCH), b"ant\nbee\ncat\ndog\n")])
    with pytest.raises(InputError, match="the name twice"):
        verify(bad, run=False)


def test_a_strangers_program_passes_only_unrun(bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    write(bad, relist({**read(bundle), "run.py": b"print('owned')"}))
    assert "not this vitedge's program; not run" in verify(bad, run=False).checks[-1].detail


def member_data(path: Path) -> list[int]:
    """Positions of every byte of the members' contents."""
    content = path.read_bytes()
    positions: list[int] = []
    with zipfile.ZipFile(path) as bundle:
        for info in bundle.infolist():
            name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
            start = info.header_offset + 30 + name_length + extra_length
            positions += range(start, start + info.file_size)
    return positions


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found(data: st.DataObject, bundle: Path, tmp_path: Path) -> None:
    positions = member_data(bundle)
    position = positions[data.draw(st.integers(0, len(positions) - 1))]
    content = bytearray(bundle.read_bytes())
    content[position] ^= data.draw(st.integers(1, 255))
    bad = tmp_path / "flipped.zip"
    bad.write_bytes(content)
    with pytest.raises(InputError):
        verify(bad, run=False)
