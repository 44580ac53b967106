"""Mixup and CutMix by groups, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge.train.mixing import GROUP, Mixing

CLASSES = 40
SIDE = 10


def images(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels that say which image they are of, and a class of each image's own within a group."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((batch, 3, SIDE, SIDE), generator=generator) + 2.0 * torch.arange(batch)[:, None, None, None]
    return pixels, torch.arange(batch) % CLASSES


def shares_of(target_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    return target_BC.gather(1, labels_B[:, None])[:, 0]


@pytest.mark.parametrize("batch", [2, 16, 20, 50])
def test_mixup_is_its_definition_with_one_share_a_group(batch: int) -> None:
    pixels, labels = images(batch)
    mixed, target = Mixing(0.8, 0.0, CLASSES, 1)(pixels, labels, 5, 0)
    assert mixed.dtype == target.dtype == torch.float32 and target.shape == (batch, CLASSES)
    shares = shares_of(target, labels)
    groups = list(zip(shares.split(GROUP), pixels.split(GROUP), mixed.split(GROUP), labels.split(GROUP), target.split(GROUP), strict=True))
    for group_shares, before, after, own, group_target in groups:
        share = float(group_shares[0])
        assert torch.all(group_shares == share) and 0.0 <= share <= 1.0
        assert torch.allclose(after, share * before + (1 - share) * before.roll(1, 0), atol=1e-4)
        one_hot = torch.nn.functional.one_hot(own, CLASSES).float()
        assert torch.allclose(group_target, share * one_hot + (1 - share) * one_hot.roll(1, 0), atol=1e-6)
    assert len({float(group[0][0]) for group in groups}) == len(groups)


def test_cutmix_pastes_a_rectangle_and_shares_by_its_area() -> None:
    seen = set()
    for step in range(30):
        pixels, labels = images(GROUP)
        mixed, target = Mixing(0.0, 1.0, CLASSES, 1)(pixels, labels, step, 0)
        own, pasted = mixed == pixels, mixed == pixels.roll(1, 0)
        assert torch.all(own | pasted)
        mask = pasted[0, 0]
        assert torch.all(pasted == mask)
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert int(mask.sum()) == int(rows * columns)
        share = 1 - float(mask.float().mean())
        assert torch.allclose(shares_of(target, labels), torch.full((GROUP,), share), atol=1e-6)
        assert torch.allclose(target.sum(1), torch.ones(GROUP))
        seen.add(round(share, 3))
    assert len(seen) > 10


def test_a_coin_decides_between_the_two() -> None:
    mixing, cut = Mixing(1.0, 1.0, CLASSES, 0), 0
    pixels, labels = images(4 * GROUP)
    for step in range(50):
        mixed, _ = mixing(pixels, labels, step, 0)
        for before, after in zip(pixels.split(GROUP), mixed.split(GROUP), strict=True):
            cut += bool(torch.all((after == before) | (after == before.roll(1, 0))))
    assert 70 < cut < 130  # of 200; five standard deviations are 35


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from([(0.8, 0.0), (0.0, 1.0), (1, 1)]),
)
def test_parts_cut_between_groups_mix_as_the_whole(seed: int, step: int, groups: int, cut: int, alphas: tuple[float, float]) -> None:
    pixels, labels = images(groups * GROUP - 3)
    middle = min(cut, groups - 1) * GROUP
    state = torch.get_rng_state()
    mixing = Mixing(*alphas, CLASSES, seed)
    whole = mixing(pixels, labels, step, 0)
    parts = [mixing(pixels[middle:], labels[middle:], step, middle)]
    if middle:
        parts.insert(0, mixing(pixels[:middle], labels[:middle], step, 0))
    for found, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_that_begins_within_a_group_keeps_the_groups_share() -> None:
    pixels, labels = images(2 * GROUP)
    mixing = Mixing(0.8, 0.0, CLASSES, 3)
    whole = shares_of(mixing(pixels, labels, 0, 0)[1], labels)
    part = shares_of(mixing(pixels[5:], labels[5:], 0, 5)[1], labels[5:])
    assert torch.equal(part, whole[5:])


def test_draws_are_of_seed_and_step() -> None:
    pixels, labels = images(GROUP)
    shares = [float(shares_of(Mixing(0.8, 0.0, CLASSES, seed)(pixels, labels, step, 0)[1], labels)[0]) for seed, step in np.ndindex(4, 4)]
    assert len(set(shares)) == 16
