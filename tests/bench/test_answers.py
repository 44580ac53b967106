"""Answers come back as they went in, and damage is one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitedge.bench.answers import Answers, pack, unpack
from vitedge.errors import InputError


@given(st.integers(1, 70), st.sampled_from([3, 256, 257, 1000]), st.integers(0, 2**32 - 1))
def test_they_come_back_through_json(count: int, classes: int, seed: int):
    generator = np.random.default_rng(seed)
    made = Answers("digest", generator.random(count) < 0.9, generator.integers(0, classes, count))
    packed = json.loads(json.dumps(pack(made)))
    found = unpack(packed, "a row")
    assert found.images == "digest"
    assert np.array_equal(found.correct, made.correct) and found.correct.dtype == bool
    assert np.array_equal(found.predictions, made.predictions)


def test_ten_thousand_images_of_ten_classes_take_under_ten_kilobytes():
    generator = np.random.default_rng(0)
    packed = pack(Answers("digest", generator.random(10_000) < 0.92, generator.integers(0, 10, 10_000)))
    assert len(json.dumps(packed)) < 10_000


GOOD = pack(Answers("digest", np.array([True, False, True]), np.array([0, 1, 2])))


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 4},
        {"count": 0},
        {"count": "many"},
        {"class_bytes": 8},
        {"predictions": "not base64!"},
        {"correct": "AAAA"},
        {"predictions": GOOD["correct"]},
    ],
)
def test_damage_is_refused_in_one_line(changes: dict[str, object]):
    with pytest.raises(InputError, match="a row") as caught:
        unpack({**GOOD, **changes}, "a row")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        unpack({name: value for name, value in GOOD.items() if name != next(iter(changes))}, "a row")
