"""Classes and parts read off names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitedge.data.layout import lay_out
from vitedge.errors import InputError

NAMES = [f"{part}/{kind}/{n}.png" for part in ("train", "test") for kind in ("cat", "dog") for n in range(3)]


def by_part(names: list[str], folders: list[str] | None = None) -> dict[str, list[tuple[str, str]]]:
    """Class and name of every image of every part, in order."""
    kept, contents = lay_out(names, folders or [], "set")
    return {
        part: [(contents.classes[contents.labels[position]], names[kept[position]]) for position in positions]
        for part, positions in contents.parts.items()
    }


def test_splits_may_begin_with_a_capital_and_classes_may_be_called_like_them() -> None:
    names = ["Train/cat/1.png", "Train/dog/1.png", "Test/cat/1.png", "Val/dog/2.png"]
    _, contents = lay_out(names, ["Train", "Train/cat", "Train/dog", "Test", "Test/cat", "Val", "Val/dog"], "set")
    assert contents.classes == ("cat", "dog") and set(contents.parts) == {"train", "validation", "test"}
    _, vehicles = lay_out(["Bus/1.png", "Train/1.png"], ["Bus", "Train"], "set")
    assert vehicles.classes == ("Bus", "Train")


def test_labels_follow_the_folder_and_classes_are_sorted() -> None:
    kept, contents = lay_out(["train/zebra/b.png", "train/ant/a.jpg", "test/zebra/c.JPEG"], [], "set")
    assert kept == [0, 1, 2] and contents.classes == ("ant", "zebra")
    assert contents.labels.tolist() == [1, 0, 1] and contents.labels.dtype == np.int64
    assert {part: positions.tolist() for part, positions in contents.parts.items()} == {"train": [1, 0], "test": [2]}


@given(st.permutations(NAMES))
def test_order_does_not_depend_on_how_the_names_are_stored(names: list[str]) -> None:
    assert by_part(names) == by_part(NAMES)


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_validation_folder_by_any_of_its_names(folder: str) -> None:
    assert by_part([*NAMES, f"{folder}/dog/9.png"])["validation"] == [("dog", f"{folder}/dog/9.png")]


def test_single_top_folder_is_looked_through() -> None:
    names = [f"photos/{name}" for name in NAMES]
    assert {p: len(images) for p, images in by_part(names, ["photos", "photos/train", "photos/train/cat"]).items()} == {
        "train": 6,
        "test": 6,
    }


def test_folders_below_a_class_belong_to_it() -> None:
    assert by_part(["cat/1.png", "dog/more/2.png"]) == {"train": [("cat", "cat/1.png"), ("dog", "dog/more/2.png")], "test": []}


def test_flat_folder_has_the_same_test_images_packed_or_not_and_after_more_were_added() -> None:
    names = [f"{kind}/{n:03d}.png" for kind in ("cat", "dog") for n in range(20)]
    flat = by_part(names)
    chosen = [f"cat/{n:03d}.png" for n in (7, 9, 11, 13, 14, 15, 16, 19)] + [f"dog/{n:03d}.png" for n in (3, 6, 8, 12)]
    assert [name for _, name in flat["test"]] == chosen
    assert by_part([f"photos/{name}" for name in names[::-1]])["test"] == [(kind, f"photos/{name}") for kind, name in flat["test"]]
    more = by_part([*names, "cat/0001.png", "dog/new.png", "emu/1.png"])
    assert set(flat["test"]) <= set(more["test"]) and set(flat["train"]) <= set(more["train"])


def test_files_left_out_are_noted() -> None:
    _, contents = lay_out([*NAMES, "README.md", "train/cat/.hidden.png", "__MACOSX/train/cat/._0.png", "extra/cat/1.png"], [], "set")
    assert contents.notes == ("1 images under extra/ were left out", "3 files that are not images were left out")


@pytest.mark.parametrize(
    ("names", "folders", "text"),
    [
        (["notes.txt"], [], "no images"),
        ([], [], "no images"),
        (NAMES, ["train", "train/emu"], "set: train/emu: expected at least one image"),
        (["cat/1.png", "dog/1.png"], ["cat", "dog", "emu"], "set: emu: expected at least one image"),
        ([*NAMES, "test/emu/1.png"], [], "test/emu: expected only classes that train has"),
        ([*NAMES, "val/emu/1.png"], [], "validation/emu: expected only classes that train has"),
        (["train/cat/1.png", "test/cat/1.png"], [], "expected at least two classes, found one: cat"),
        (["cat/1.png"], [], "expected at least two classes, found one: cat"),
        (["test/cat/1.png", "test/dog/1.png"], [], "no images under train/"),
        ([*NAMES, "train/stray.png"], [], "set: train/stray.png: .* in no class folder"),
        (["cat/1.png", "dog/1.png", "stray.png"], [], "set: stray.png: .* in no class folder"),
        (["pets/train/cat/1.png", "cars/train/vw/1.png"], [], "several, in cars, pets"),
    ],
)
def test_refused_layouts(names: list[str], folders: list[str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        lay_out(names, folders, "set")
