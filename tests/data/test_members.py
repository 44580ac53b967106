"""Reading folders and archives, and refusing what no archive of images holds."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.data.made import pack, tar_of, write_images
from vitedge.data import members
from vitedge.data.members import archive_stem, first_names, open_members
from vitedge.errors import InputError


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.tgz", "set.zip"])
def test_archive_holds_what_the_folder_holds(tmp_path: Path, name: str) -> None:
    root = tmp_path / "set"
    write_images(root, {"train/cat": 3, "train/dog": 2})
    archive, folder = open_members(pack(root, tmp_path / name)), open_members(root)
    assert sorted(archive.names) == sorted(folder.names) and len(archive.names) == 5
    for position, member in enumerate(archive.names):
        assert archive.read(position) == folder.read(folder.names.index(member)) == (root / member).read_bytes()


def test_names_of_a_tar_made_inside_its_folder_lose_the_dot(tmp_path: Path) -> None:
    assert open_members(tar_of(tmp_path / "x.tar", {"./train/a/1.png": b"1"})).names == ["train/a/1.png"]


def test_first_names_stop_early(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {f"a/{n}.png": b"x" for n in range(9)})
    path.write_bytes(path.read_bytes()[: 6 * 1024])  # the rest is gone, and was not needed
    assert first_names(path, 3) == ["a/0.png", "a/1.png", "a/2.png"]


def test_archive_stem() -> None:
    assert [archive_stem(Path(name)) for name in ("a/x.tar.gz", "x.v2.zip", "x")] == ["x", "x.v2", "x"]


def link_tar(path: Path, kind: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("train/cat/link.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    return path


def link_zip(path: Path) -> Path:
    info = zipfile.ZipInfo("train/cat/link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    return path


def zip_of(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return path


def cut(path: Path, keep: float | int) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


IMAGES = {f"train/cat/{n}.png": bytes([n]) * 700 for n in range(5)}
BAD = {
    "tar_climbs": (lambda d: tar_of(d / "x.tar", {"../evil.png": b"x"}), r"x.tar: ../evil.png: .* leads out"),
    "tar_climbs_inside": (lambda d: tar_of(d / "x.tar", {"a/../../evil.png": b"x"}), "leads out"),
    "tar_absolute": (lambda d: tar_of(d / "x.tar", {"/etc/evil.png": b"x"}), "leads out"),
    "zip_climbs": (lambda d: zip_of(d / "x.zip", "../evil.png"), "leads out"),
    "zip_absolute": (lambda d: zip_of(d / "x.zip", "/etc/evil.png"), "leads out"),
    "tar_symlink": (lambda d: link_tar(d / "x.tar", tarfile.SYMTYPE), "link or special file"),
    "tar_hardlink": (lambda d: link_tar(d / "x.tar", tarfile.LNKTYPE), "link or special file"),
    "tar_device": (lambda d: link_tar(d / "x.tar", tarfile.CHRTYPE), "link or special file"),
    "zip_symlink": (lambda d: link_zip(d / "x.zip"), "found a link"),
    "tar_cut_in_a_file": (lambda d: cut(tar_of(d / "x.tar", IMAGES), 3 * 1536 + 700), "whole .tar"),
    "tar_cut_between_files": (lambda d: cut(tar_of(d / "x.tar", IMAGES), 3 * 1536), "whole .tar"),
    "tar_overwritten": (lambda d: written(d / "x.tar", tar_of(d / "y.tar", IMAGES).read_bytes()[:1536] + b"?" * 4096), "whole .tar"),
    "gz_cut": (lambda d: cut(tar_of(d / "x.tar.gz", IMAGES), 0.6), "whole .tar"),
    "zip_cut": (lambda d: cut(zip_of(d / "x.zip", *IMAGES), 0.6), "whole .tar, .tar.gz or .zip archive"),
    "not_a_zip": (lambda d: written(d / "x.zip", b"PK but not really"), "whole .tar, .tar.gz or .zip archive"),
    "not_a_tar": (lambda d: written(d / "x.tar", b"text" * 500), "whole .tar"),
    "empty_file": (lambda d: written(d / "x.tar", b""), "whole .tar"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_archives(tmp_path: Path, case: str) -> None:
    make, text = BAD[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=text) as caught:
        open_members(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_name_stored_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.png: expected each name once"):
        open_members(zip_of(tmp_path / "x.zip", "a.png", "a.png"))


def test_member_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "LARGEST_MEMBER", 100)
    with pytest.raises(InputError, match="700 bytes"):
        open_members(tar_of(tmp_path / "x.tar", IMAGES))


def test_zip_member_with_a_changed_byte_is_named(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", "train/cat/1.png")
    content = bytearray(path.read_bytes())
    content[content.index(b"1.png") + len("1.png")] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"x.zip: train/cat/1.png: .*CRC"):
        open_members(path).read(0)


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", "a.png")
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1  # the flag bit that says encrypted
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="encrypted"):
        open_members(path).read(0)


def test_folder_reached_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "again").symlink_to(tmp_path / "set")
    with pytest.raises(InputError, match="each folder once"):
        open_members(tmp_path / "set")


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 1, ".trash/cat": 2})
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    assert open_members(tmp_path).names == ["cat/000.png"]


def test_file_of_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 1})
    listed = open_members(tmp_path)
    (tmp_path / "cat" / "000.png").unlink()
    with pytest.raises(InputError, match=r"000\.png"):
        listed.read(0)


def test_compressed_tar_says_that_it_is_read_forward(tmp_path: Path) -> None:
    assert open_members(tar_of(tmp_path / "x.tar", IMAGES)).random_access
    assert not open_members(tar_of(tmp_path / "x.tar.gz", IMAGES)).random_access
    assert open_members(tmp_path / "x.tar.gz").read(4) == IMAGES["train/cat/4.png"]
