"""Training batches: what is done to an image, in which order, and that chance depends on seed, view and image alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.data.random_erasing import RandomErasing

from tests.train.made_images import UniformImages, photographs
from vitedge.preprocess import Preprocessing
from vitedge.recipe import TrainConfig
from vitedge.train import augment
from vitedge.train.augment import Augmentation, Batches, erase_batch_, flip_batch, shift_batch
from vitedge.train.draws import draw_view
from vitedge.train.randaugment import OPERATIONS, BatchedRandAugment

CPU = torch.device("cpu")
IMAGES = 24
PHOTOGRAPHS = photographs(IMAGES, 12, 12)
CONTRACT = Preprocessing(size=14)
PER_IMAGE = Augmentation(flip=True, shift=3, randaugment=2, erase=0.5)
EVERYTHING = Augmentation(flip=True, shift=3, randaugment=2, erase=0.5, mixup=0.8, cutmix=1.0)


def batches(augmentation: Augmentation | None = None, seed: int = 0, uniform: bool = True, device: torch.device = CPU) -> Batches:
    images: Any = PHOTOGRAPHS.view(UniformImages) if uniform else list(PHOTOGRAPHS)
    return Batches(images, np.arange(IMAGES) % 10, CONTRACT, device, 10, augmentation, seed)


def test_images_of_many_sizes_take_the_pillow_path_exactly() -> None:
    preprocessing = Preprocessing(size=16, crop="center")
    images = [photographs(1, 20, 30)[0], photographs(1, 40, 18)[0]]
    of_two = Batches(images, np.array([0, 1]), preprocessing, CPU, 2)
    x_BCHW, labels_B = of_two.evaluate(np.array([1, 0]))
    assert labels_B.tolist() == [1, 0]
    assert np.abs(x_BCHW.numpy() - preprocessing([images[1], images[0]])).max() < 1e-5


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_without_augmentation_training_sees_the_contract(uniform: bool, augmentation: Augmentation | None) -> None:
    plain, indices = batches(augmentation, uniform=uniform), np.array([4, 2, 2])
    assert len(plain) == IMAGES and plain.batched is uniform
    x_BCHW, labels_B = plain.evaluate(indices)
    assert np.abs(x_BCHW.numpy() - CONTRACT(PHOTOGRAPHS[indices])).max() < 1e-5
    batch = plain.train(indices, view=3, step=7)
    assert torch.equal(batch.x_BCHW, x_BCHW) and torch.equal(batch.target, labels_B) and labels_B.tolist() == [4, 2, 2]
    assert batch.target.dtype == torch.int64 and batch.view == 3 and batch.indices.tolist() == [4, 2, 2]
    expected_BHWC = np.stack([CONTRACT.resize_crop(image) for image in PHOTOGRAPHS[indices]])
    assert np.array_equal(batch.pixels_BCHW.permute(0, 2, 3, 1).numpy(), expected_BHWC.astype(np.float32))
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last) and batch.x_BCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("limit", [2, 11])
def test_shift_moves_whole_images_and_fills_with_black(limit: int) -> None:
    images_BCHW = torch.from_numpy(photographs(16, 8, 8)).permute(0, 3, 1, 2) // 2 + 64
    offsets = np.random.default_rng(0).integers(-limit, limit, size=(16, 2), endpoint=True)
    offsets[:4] = [[-limit, -limit], [limit, limit], [0, limit], [-limit, 0]]
    for image, moved, (down, right) in zip(images_BCHW, shift_batch(images_BCHW, offsets, limit), offsets, strict=True):
        for row in range(8):
            for column in range(8):
                y, x = row + down, column + right
                expected = image[:, y, x] if 0 <= y < 8 and 0 <= x < 8 else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(moved[:, row, column], expected)


def test_flip_mirrors_the_chosen() -> None:
    images_BCHW = torch.from_numpy(PHOTOGRAPHS).permute(0, 3, 1, 2)
    chosen = np.arange(IMAGES) % 3 == 0
    for image, flipped, mirrored in zip(images_BCHW, flip_batch(images_BCHW, chosen), chosen, strict=True):
        assert torch.equal(flipped, image.flip(-1) if mirrored else image) and not torch.equal(image, image.flip(-1))


def test_erasing_blackens_one_rectangle_of_about_the_asked_share_of_images() -> None:
    before = torch.rand(400, 3, 12, 12) + 1.0
    pixels = before.clone()
    erase_batch_(pixels, 0.25, np.random.default_rng(0).integers(0, 2**63, 400))
    erased = 0
    for image, original in zip(pixels, before, strict=True):
        mask = image[0] == 0.0
        assert torch.equal(image, original * ~mask)
        rows, columns = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert int(mask.sum()) == rows * columns
        erased += rows > 0
        if rows:
            assert 0.01 < rows * columns / 144 < 0.42  # 2 % to 33 % of 144 pixels, before sides are rounded
    assert 60 < erased < 140  # 100 expected, with a standard deviation of 9
    erase_batch_(untouched := before.clone(), 0.0, np.arange(400))
    assert torch.equal(untouched, before)


def test_the_order_is_shift_flip_randaugment_resize_erase() -> None:
    """Each image on its own, by numpy, Pillow and timm."""
    view, seed, indices = 4, 11, np.arange(IMAGES)[::-1].copy()
    batch = batches(PER_IMAGE, seed).train(indices, view, step=0)
    draws = draw_view(IMAGES, seed, view, 3, 2, len(OPERATIONS))
    operations = BatchedRandAugment(9)
    for position, index in enumerate(indices):
        down, right = draws.offsets_N2[index] + 3
        image_HWC = np.pad(PHOTOGRAPHS[index], ((3, 3), (3, 3), (0, 0)))[down : down + 12, right : right + 12]
        image_HWC = image_HWC[:, ::-1] if draws.flips_N[index] else image_HWC
        rows = slice(index, index + 1)
        image_BCHW = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)[None].contiguous()
        image_BCHW = operations(image_BCHW, draws.operations_NL[rows], draws.negative_NL[rows])
        resized = torch.from_numpy(CONTRACT.resize_crop(image_BCHW[0].permute(1, 2, 0).numpy()).astype(np.float32)).permute(2, 0, 1)
        random.seed(int(draws.erasing_N[index]))
        expected = RandomErasing(0.5, mode="const", device="cpu")(resized.contiguous())
        assert torch.equal(batch.pixels_BCHW[position], expected)


def test_images_of_many_sizes_are_resized_before_they_are_shifted() -> None:
    shifting = batches(Augmentation(shift=2), seed=5, uniform=False)
    resized_BCHW = torch.from_numpy(np.stack([CONTRACT.resize_crop(image) for image in PHOTOGRAPHS])).permute(0, 3, 1, 2)
    offsets = draw_view(IMAGES, 5, 0, 2, 0, len(OPERATIONS)).offsets_N2
    found = shifting.train(np.arange(IMAGES), view=0, step=0).pixels_BCHW
    assert torch.equal(found, shift_batch(resized_BCHW, offsets, 2).float())


def test_mixing_comes_last_and_the_inputs_are_the_mixed_pixels() -> None:
    mixing = Augmentation(flip=True, shift=3, randaugment=2, erase=0.5, mixup=0.8)
    indices = np.arange(IMAGES)
    batch, before = batches(mixing).train(indices, 0, step=2), batches(PER_IMAGE).train(indices, 0, step=2)
    share = float(batch.target[0, 0])
    assert batch.target.shape == (IMAGES, 10) and batch.target.dtype == torch.float32 and 0 < share < 1
    group = before.pixels_BCHW[:16]
    assert torch.allclose(batch.pixels_BCHW[:16], share * group + (1 - share) * group.roll(1, 0), atol=1e-3)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CONTRACT.mean, CONTRACT.std))
    assert torch.allclose(batch.x_BCHW, (batch.pixels_BCHW / 255 - mean) / std, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.integers(-5, 2**63), st.integers(0, 1000), st.permutations(range(IMAGES)), st.integers(1, IMAGES - 1), st.integers(0, 99))
@example(-1, 0, list(range(IMAGES)), 5, 0)
def test_any_part_in_any_order_sees_what_the_whole_does(seed: int, view: int, order: list[int], cut: int, step: int) -> None:
    whole = batches(PER_IMAGE, seed).train(np.arange(IMAGES), view, step=0)
    others = batches(PER_IMAGE, seed)
    for part in (np.array(order[:cut]), np.array(order[cut:])):
        found = others.train(part, view, step, first=cut)
        assert torch.equal(found.pixels_BCHW, whole.pixels_BCHW[part]) and torch.equal(found.x_BCHW, whole.x_BCHW[part])
        assert torch.equal(found.target, whole.target[part])


def test_two_halves_of_a_step_are_the_step_mixing_included() -> None:
    indices = np.random.default_rng(0).integers(0, IMAGES, 64)
    whole = batches(EVERYTHING).train(indices, view=1, step=9)
    halves = [batches(EVERYTHING).train(indices[first : first + 32], 1, 9, first) for first in (0, 32)]
    for name in ("x_BCHW", "pixels_BCHW", "target"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name


def test_a_view_comes_back_the_same_and_views_and_seeds_differ() -> None:
    one, indices = batches(PER_IMAGE), np.arange(IMAGES)
    views = [one.train(indices, view, step).pixels_BCHW for step, view in enumerate([0, 1, 2, 0, 1, 2])]
    for first, again in zip(views[:3], views[3:], strict=True):
        assert torch.equal(first, again)
    other = batches(PER_IMAGE, seed=1).train(indices, 0, 0).pixels_BCHW
    for a, b in ((views[0], views[1]), (views[1], views[2]), (views[0], other)):
        assert (a != b).flatten(1).any(1).sum() > IMAGES * 0.9


def test_tables_of_two_views_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(augment, "draw_view", lambda *given: drawn.append(given[2]) or draw_view(*given))
    one = batches(Augmentation(shift=1))
    for view in (0, 0, 1, 0, 1, 2, 1, 2, 0):
        one.train(np.arange(2), view, step=0)
    assert drawn == [0, 1, 2, 0]


def test_draws_are_even_and_each_augmentation_has_its_own() -> None:
    draws = draw_view(20000, 0, 0, 2, 2, len(OPERATIONS))
    assert abs(draws.flips_N.mean() - 0.5) < 0.02 and abs(draws.negative_NL.mean() - 0.5) < 0.02
    for axis in range(2):
        values, counts = np.unique(draws.offsets_N2[:, axis], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2] and np.abs(counts - 4000).max() < 300
    _, counts = np.unique(draws.operations_NL, return_counts=True)
    assert len(counts) == len(OPERATIONS) and np.abs(counts / counts.mean() - 1).max() < 0.1
    assert len(set(draws.erasing_N.tolist())) == 20000 and draws.erasing_N.min() >= 0
    unshifted = draw_view(20000, 0, 0, 0, 0, len(OPERATIONS))
    assert np.array_equal(unshifted.flips_N, draws.flips_N) and np.array_equal(unshifted.erasing_N, draws.erasing_N)
    one_layer = draw_view(20000, 0, 0, 2, 1, len(OPERATIONS))
    assert abs((one_layer.flips_N == one_layer.negative_NL[:, 0]).mean() - 0.5) < 0.02
    assert not unshifted.offsets_N2.any() and unshifted.operations_NL.shape == (20000, 0)


@pytest.mark.parametrize("uniform", [True, False])
def test_global_random_numbers_are_left_alone(uniform: bool) -> None:
    everything, indices = batches(EVERYTHING, uniform=uniform), np.arange(IMAGES)
    random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    everything.train(indices, 0, 0, fetched=everything.fetch(indices))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("uniform", [True, False])
def test_what_a_thread_fetched_ahead_gives_the_same_batch(uniform: bool) -> None:
    everything = batches(EVERYTHING, uniform=uniform)
    parts = [np.arange(0, 16), np.arange(8, 24)]
    with ThreadPoolExecutor(1) as reader:
        reading = [reader.submit(everything.fetch, part) for part in parts]
        for part, waiting in zip(parts, reading, strict=True):
            fetched = waiting.result()
            assert fetched.dtype == torch.uint8
            kept = fetched.clone()
            ahead, now = everything.train(part, 0, 0, fetched=fetched), everything.train(part, 0, 0)
            assert torch.equal(ahead.x_BCHW, now.x_BCHW) and torch.equal(fetched, kept)


def test_only_what_changes_pixels_is_in_the_key() -> None:
    config = TrainConfig(shift=2, randaugment=2, erase=0.1, mixup=0.8, cutmix=1.0)
    plain = Augmentation.of(config).plain()
    expected = {"flip": True, "shift": 2, "randaugment": 2, "randaugment_magnitude": 9, "erase": 0.1, "mixup": 0.8, "cutmix": 1.0}
    assert plain == expected
    assert Augmentation.of(config.model_copy(update={"lr": 1.0, "views": 3, "epochs": 9.0})).plain() == plain
    for name, value in {"flip": False, "shift": 1, "randaugment": 1, "randaugment_magnitude": 5, "erase": 0.0, "cutmix": 0.5}.items():
        assert Augmentation.of(config.model_copy(update={name: value})).plain() != plain
    off, stronger = (Augmentation.of(TrainConfig(randaugment_magnitude=magnitude)).plain() for magnitude in (9, 30))
    assert off == stronger and "randaugment_magnitude" not in off


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_pixels() -> None:
    exact = Augmentation(flip=True, shift=3, erase=0.5)
    indices = np.arange(IMAGES)
    gpu = torch.device("cuda")
    on_cpu, on_gpu = (batches(exact, device=device).train(indices, 0, 0) for device in (CPU, gpu))
    assert torch.equal(on_gpu.pixels_BCHW.cpu(), on_cpu.pixels_BCHW)
    mixed_cpu, mixed_gpu = (batches(EVERYTHING, device=device).train(indices, 0, 0) for device in (CPU, gpu))
    assert torch.allclose(mixed_gpu.target.cpu(), mixed_cpu.target)
    # A bilinear value half way between two whole numbers may round either way.
    assert float(((mixed_gpu.pixels_BCHW.cpu() - mixed_cpu.pixels_BCHW).abs() < 1.5).float().mean()) > 0.98
