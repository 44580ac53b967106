"""Views of images by index."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.made import pixels
from vitedge.data import Images
from vitedge.data.cache import Ragged

ARRAY = np.stack([pixels(n) for n in range(6)])


def ragged() -> tuple[Ragged, list[np.ndarray]]:
    images = [pixels(n, 3 + n, 5) for n in range(6)]
    flat = np.concatenate([image.ravel() for image in images])
    return Ragged(flat, np.array([image.shape[:2] for image in images])), images


def test_view_of_an_array_picks_by_int_slice_and_index_array() -> None:
    images = Images(ARRAY, np.array([5, 0, 3]))
    assert images.uniform and len(images) == 3
    assert np.array_equal(images[0], ARRAY[5]) and np.array_equal(images[-1], ARRAY[3])
    picked = images[np.array([2, 0])]
    assert picked.shape == (2, 12, 12, 3) and picked.dtype == np.uint8
    assert np.array_equal(picked, ARRAY[[3, 5]])
    assert isinstance(images[1:], Images) and np.array_equal(images[1:][0], ARRAY[0])
    assert np.array_equal(np.stack(list(images)), ARRAY[[5, 0, 3]])


def test_index_array_gives_a_copy_that_can_be_written_although_the_store_cannot() -> None:
    store = ARRAY.copy()
    store.flags.writeable = False
    batch = Images(store)[np.array([1, 2])]
    batch[:] = 0
    assert np.array_equal(store, ARRAY)


def test_view_of_images_of_many_sizes_gives_a_list() -> None:
    store, images = ragged()
    view = Images(store, np.array([4, 1]))
    assert not view.uniform
    picked = view[np.array([1, 0])]
    assert isinstance(picked, list)
    assert np.array_equal(picked[0], images[1]) and np.array_equal(picked[1], images[4])
    assert all(np.array_equal(a, b) for a, b in zip(Images(store), images, strict=True))


@pytest.mark.parametrize("key", [3, -4])
def test_position_out_of_range_is_an_index_error(key: int) -> None:
    with pytest.raises(IndexError):
        Images(ARRAY, np.array([5, 0, 3]))[key]
