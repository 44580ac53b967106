"""Landmarks: means of segments as numpy cuts them, and counts that fit the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge.errors import UsageError
from vitedge.models.cores import Slot
from vitedge.models.landmarks import own_landmarks, segment_means

SLOT = Slot("blocks.3.attn", tokens=197, prefix=2, num_heads=3, key_dim=64, value_dim=64, scale=0.125)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_segments_are_those_of_numpy(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 24))
    own = data.draw(st.integers(0, min(2, tokens - 1)))
    count = data.draw(st.integers(own + 1, tokens))
    x_BHNK = np.random.default_rng(tokens).normal(size=(2, 3, tokens, 4))
    segments = np.array_split(x_BHNK[:, :, own:], count - own, axis=2)
    wanted_BHMK = np.concatenate([x_BHNK[:, :, :own], *(segment.mean(2, keepdims=True) for segment in segments)], axis=2)
    found_BHMK = segment_means(torch.from_numpy(x_BHNK), count, own)
    assert found_BHMK.shape == (2, 3, count, 4)
    np.testing.assert_allclose(found_BHMK.numpy(), wanted_BHMK, rtol=0, atol=1e-12)


def test_tokens_that_patch_drop_took_away_are_missed_in_one_line() -> None:
    with pytest.raises(UsageError, match="at most 3, as there are tokens, found 4") as caught:
        segment_means(torch.zeros(1, 1, 3, 2), 4, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "prefix", "own"), [(64, "own", 2), (64, "pooled", 0), (3, "own", 2), (1, "pooled", 0), (197, "own", 2)])
def test_first_tokens_are_landmarks_where_asked_for(count: int, prefix: str, own: int) -> None:
    assert own_landmarks("x", count, prefix, SLOT) == own


@pytest.mark.parametrize(
    ("count", "prefix", "message"),
    [
        (198, "own", "x.landmarks: expected at most the 197 tokens of blocks.3.attn, found 198; lower it"),
        (198, "pooled", "at most the 197 tokens"),
        (2, "own", "more than the 2 tokens that are landmarks of their own, found 2; raise it, or set prefix: pooled"),
    ],
)
def test_counts_that_do_not_fit_are_refused(count: int, prefix: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        own_landmarks("x.landmarks", count, prefix, SLOT)
    assert message in str(caught.value)
