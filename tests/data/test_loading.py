"""From a source to splits, through the cache of decoded images."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.made import SPLITS, pack, write_images
from vitedge.data import Dataset, cache, digest, find, identity, load, loading, official
from vitedge.errors import InputError, OutputError, UsageError


def part_pixels(dataset: Dataset) -> dict[str, list[bytes]]:
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {name: [image.tobytes() for image in part.images] for name, part in parts.items() if part is not None}


def loaded(path: Path, **options: Any) -> Dataset:
    return load(find("set", str(path)), **options)


@pytest.mark.parametrize("top", ["", "photos/"])
@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.zip"])
def test_folder_and_archive_give_the_same_images_labels_and_splits(tmp_path: Path, name: str, top: str) -> None:
    written = write_images(tmp_path / "set", SPLITS)
    folder, archive = loaded(tmp_path / "set", validation=0.3), loaded(pack(tmp_path / "set", tmp_path / name, top), validation=0.3)
    assert part_pixels(folder) == part_pixels(archive)
    assert np.array_equal(folder.train.labels, archive.train.labels)
    assert part_pixels(archive)["test"] == [written[n].tobytes() for n in sorted(written) if n.startswith("test/")]
    assert archive.test is not None and archive.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert np.bincount(archive.validation.labels).tolist() == [2, 3]


def test_train_and_validation_share_no_image_and_depend_on_the_seed(tmp_path: Path) -> None:
    write_images(tmp_path / "set", {"train/a": 20, "train/b": 20, "test/a": 1})
    first, again, other = (part_pixels(loaded(tmp_path / "set", split_seed=seed, validation=0.25)) for seed in (0, 0, 1))
    assert first == again and first["validation"] != other["validation"] and first["test"] == other["test"]
    assert not set(first["train"]) & set(first["validation"])
    assert len({*first["train"], *first["validation"]}) == 40


def test_own_validation_split_is_kept_whatever_the_seed(tmp_path: Path) -> None:
    written = write_images(tmp_path / "set", {**SPLITS, "val/dog": 2})
    for seed in (0, 5):
        dataset = loaded(tmp_path / "set", split_seed=seed)
        assert part_pixels(dataset)["validation"] == [written[f"val/dog/00{n}.png"].tobytes() for n in range(2)]
        assert len(dataset.train.labels) == 16 and dataset.notes == ()


def test_flat_folder_is_split_and_says_so(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", {"cat": 10, "dog": 20})
    dataset, other = loaded(tmp_path / "pets"), loaded(tmp_path / "pets", split_seed=3)
    assert dataset.test is not None and np.bincount(dataset.test.labels).tolist() == [2, 4]
    assert dataset.label == "pets (about 20% split off as test)" and "no test split" in dataset.notes[0]
    parts, moved = part_pixels(dataset), part_pixels(other)
    assert sum(len(set(images)) for images in parts.values()) == len(set().union(*parts.values())) == 30
    # a test image stays one whichever validation split is drawn
    assert parts["test"] == moved["test"] and parts["validation"] != moved["validation"]


def test_no_test_folder_means_no_test_split(tmp_path: Path) -> None:
    write_images(tmp_path / "set", {"train/cat": 4, "train/dog": 4})
    dataset = loaded(tmp_path / "set")
    assert dataset.test is None and "there is no test split" in dataset.notes


def test_one_size_gives_one_array_and_many_sizes_do_not(tmp_path: Path) -> None:
    write_images(tmp_path / "same", SPLITS)
    written = write_images(tmp_path / "mixed", SPLITS, sizes=((8, 12), (12, 8), (5, 5)))
    same, mixed = loaded(tmp_path / "same"), loaded(tmp_path / "mixed")
    assert same.train.images.uniform and same.train.images[np.array([3, 1])].shape == (2, 12, 12, 3)
    assert not mixed.train.images.uniform and mixed.test is not None
    for image, name in zip(mixed.test.images, sorted(n for n in written if n.startswith("test/")), strict=True):
        assert np.array_equal(image, written[name])


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "set", SPLITS)
    first = part_pixels(loaded(tmp_path / "set"))
    monkeypatch.setattr(loading, "open_members", None)
    assert part_pixels(loaded(tmp_path / "set")) == first


def test_two_at_once_decode_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(write_set(tmp_path), tmp_path / "set.tar")
    decodings, started, real = [], threading.Event(), loading.decode_all

    def slow(*arguments: Any) -> Iterator[Any]:
        decodings.append(1)
        started.set()
        threading.Event().wait(0.3)
        return real(*arguments)

    monkeypatch.setattr(loading, "decode_all", slow)
    first = threading.Thread(target=loaded, args=(path,))
    first.start()
    started.wait(10)
    told: list[str] = []
    dataset = loaded(path, progress=lambda done, total, text="": told.append(text))
    first.join()
    assert len(decodings) == 1 and len(dataset.train.labels) == 14
    assert any("another process" in text for text in told)


def write_set(tmp_path: Path) -> Path:
    write_images(tmp_path / "set", SPLITS)
    return tmp_path / "set"


def test_changed_file_has_another_digest_and_is_decoded_again(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    path = pack(root, tmp_path / "set.tar")
    before = loaded(path)
    write_images(root, {"train/cat": 7})
    after = loaded(pack(root, path))
    assert before.digest != after.digest and len(after.train.labels) + len(after.validation.labels) == 17


def test_digest_of_a_file_is_its_sha256_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    pack(write_set(tmp_path), path)
    source = find("set", str(path))
    assert digest(source) == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(identity, "_read_through", None)
    assert digest(source) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("change", ["add", "remove", "grow", "touch", "empty_folder"])
def test_digest_of_a_folder_follows_its_files(tmp_path: Path, change: str) -> None:
    root = write_set(tmp_path)
    source, image = find("set", str(root)), root / "train/cat/000.png"
    before = digest(source)
    assert before == digest(source)
    if change == "add":
        (root / "train/cat/900.png").write_bytes(image.read_bytes())
    elif change == "remove":
        image.unlink()
    elif change == "grow":
        image.write_bytes(image.read_bytes() + b"x")
    elif change == "touch":
        os.utime(image, ns=(1, 1))
    else:
        (root / "train/emu").mkdir()
    assert digest(source) != before


@pytest.mark.parametrize("damage", ["meta", "pixels", "labels", "version"])
def test_damaged_cache_is_decoded_again(tmp_path: Path, damage: str) -> None:
    root = write_set(tmp_path)
    first = loaded(root)
    pixels, folder = part_pixels(first), cache.folder_of(first.digest)
    if damage == "meta":
        (folder / "meta.json").write_text("{")
    elif damage == "pixels":
        (folder / "pixels.u8").write_bytes(b"short")
    elif damage == "labels":
        (folder / "labels.npy").unlink()
    else:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "version": -1}))
    assert part_pixels(loaded(root)) == pixels


def test_interrupted_decoding_leaves_nothing_and_the_next_call_works(tmp_path: Path, own_cache: Path) -> None:
    root = write_set(tmp_path)

    def interrupt(done: float, total: float, text: str = "") -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loaded(root, progress=interrupt)
    assert [path.name for path in (own_cache / "decoded").iterdir() if path.is_dir()] == []
    assert len(loaded(root).train.labels) == 14


def test_remains_of_a_killed_process_are_removed(tmp_path: Path, own_cache: Path) -> None:
    root = write_set(tmp_path)
    remains = own_cache / "decoded" / f".{digest(find('set', str(root)))}.abc.part"
    remains.mkdir(parents=True)
    (remains / "pixels.u8").write_bytes(b"half")
    loaded(root)
    assert not remains.exists()


def test_large_set_is_not_cached_but_decoded_on_access(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path)
    small = loaded(root)
    monkeypatch.setattr(cache, "LARGEST", 1000)
    for name in ("big.tar", "big.zip"):
        large = loaded(pack(root, tmp_path / name))
        assert not large.train.images.uniform and not cache.folder_of(large.digest).exists()
        assert part_pixels(large) == part_pixels(small)


def test_large_compressed_tar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(write_set(tmp_path), tmp_path / "big.tar.gz")
    monkeypatch.setattr(cache, "LARGEST", 1000)
    with pytest.raises(InputError, match="unpack it into a folder"):
        loaded(path)


def test_label_of_a_known_copy_comes_from_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(write_set(tmp_path), tmp_path / "renamed.tar")
    assert loaded(path).label == "renamed"
    monkeypatch.setitem(official.COPIES, digest(find("set", str(path))), "CIFAR-10 (some copy)")
    assert loaded(path).label == "CIFAR-10 (some copy)"


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_share_out_of_range_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UsageError, match=r"data.validation: expected a share in \(0, 1\)"):
        loaded(write_set(tmp_path), validation=share)


def test_cache_that_cannot_be_written_names_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "file" / "cache"))
    for path in (root, pack(root, tmp_path / "set.tar")):
        with pytest.raises(OutputError, match="set VITEDGE_CACHE to another folder"):
            loaded(path)
