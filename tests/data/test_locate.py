"""Where a data set is looked for, and what is said when it is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.made import SPLITS, cifar10_members, pack, tar_of, write_images
from vitedge.data import Source, find
from vitedge.data.locate import candidates
from vitedge.errors import InputError, UsageError, VitedgeError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder `made/` with the folder data set `photos`, and the same as `packed.tar`."""
    write_images(tmp_path / "made" / "photos", SPLITS)
    pack(tmp_path / "made" / "photos", tmp_path / "made" / "packed.tar")
    return tmp_path / "made"


@pytest.mark.parametrize("file_name", ["cifar10.tar", "cifar10.tar.gz", "cifar10.zip", "cifar10.tgz"])
def test_archive_is_found_by_name_in_the_data_folder(made: Path, monkeypatch: pytest.MonkeyPatch, file_name: str) -> None:
    path = pack(made / "photos", made / file_name)
    monkeypatch.setenv("VITEDGE_DATA", str(made))
    assert find("cifar10") == Source("cifar10", path, "archive_folder")


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar-10-batches-bin", "cifar10"])
def test_official_records_are_found_by_their_own_name(made: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    members, _ = cifar10_members(per_file=1)
    if name.endswith(".gz"):
        tar_of(made / name, members)
    else:
        (made / name).mkdir()
        for member, content in members.items():
            (made / name / Path(member).name).write_bytes(content)
    monkeypatch.setenv("VITEDGE_DATA", str(made))
    assert find("cifar10") == Source("cifar10", made / name, "cifar_binary")


def test_option_wins_over_the_data_folder_and_that_over_the_cache(made: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(own_cache / "data" / "pets", SPLITS)
    assert find("pets").path == own_cache / "data" / "pets"
    write_images(made / "pets", SPLITS)
    monkeypatch.setenv("VITEDGE_DATA", str(made))
    assert find("pets").path == made / "pets"
    assert find("pets", "photos").path == made / "photos"
    assert find("pets", str(made / "packed.tar")) == Source("packed", made / "packed.tar", "archive_folder")


def test_option_may_be_a_data_set_or_a_folder_of_them(made: Path) -> None:
    assert find("cifar10", str(made / "photos")) == Source("photos", made / "photos", "image_folder")
    assert find("photos", str(made)) == Source("photos", made / "photos", "image_folder")
    assert find("packed", str(made)).path == made / "packed.tar"
    write_images(made / "flat", {"cat": 2, "dog": 2})
    assert find("cifar10", str(made / "flat")).path == made / "flat"


def test_name_may_be_a_path(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert find("./photos").name == "photos" and find("packed.tar").path == Path("packed.tar")
    assert find("photos", "photos").path == Path("photos")


@pytest.mark.parametrize(
    ("name", "option", "text"),
    [
        (
            "phots",
            None,
            r"data set 'phots': expected a path, or one of .*photos.*did you mean 'photos'\?.*put phots/ or phots.tar into .*made",
        ),
        ("cifar10", None, r"put cifar-10-binary.tar.gz into .*made .*--data PATH, or run `vitedge data fetch cifar10`"),
        ("cifar-100", None, r"did you mean 'cifar100'\?"),
        ("x", "nowhere/set.tar", "nowhere/set.tar: expected a data set: .* found no such file"),
        ("nowhere/set", None, "nowhere/set: expected a data set"),
        ("x", "phots", r"did you mean 'photos'\?"),
        ("phots", "MADE", r"--data .*made: expected images .* or the data set 'phots' by name, found neither \(did you mean 'photos'\?\)"),
        ("MADE", None, "expected one data set, found a folder of 1 archives; name one, as .*packed.tar"),
    ],
)
def test_what_is_not_there_is_named_with_what_to_do(
    made: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str | None, text: str
) -> None:
    monkeypatch.setenv("VITEDGE_DATA", str(made))
    path = {"MADE": str(made)}
    with pytest.raises(UsageError, match=text) as caught:
        find(path.get(name, name), path.get(option, option) if option else None, download=False)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_data_folder_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITEDGE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="VITEDGE_DATA: expected a folder"):
        find("cifar10", download=False)


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"set.csv: expected a folder or a file ending in .tar.gz"):
        find("x", str(tmp_path / "set.csv"))


@pytest.fixture
def without_root(tmp_path: Path) -> Iterator[None]:
    """Permissions do not bind root: become nobody for a test, as far as files go."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_unreadable_folder_is_one_line(made: Path, without_root: None) -> None:
    if os.getuid() != 0:
        (made / "photos").chmod(0)
    with pytest.raises(VitedgeError) as caught:
        find("x", str(made / "photos"))
    (made / "photos").chmod(0o755) if os.getuid() != 0 else None
    assert "check" in str(caught.value) and "\n" not in str(caught.value)


def test_names_a_data_set_may_have(tmp_path: Path) -> None:
    assert [path.name for path in candidates("x", tmp_path)] == ["x", "x.tar", "x.tar.gz", "x.tgz", "x.zip"]
    assert [path.name for path in candidates("cifar100", tmp_path)][-2:] == ["cifar-100-binary.tar.gz", "cifar-100-binary"]
