"""Ranges of LayerNorm inputs, against a float64 twin of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.inspect import made
from vitedge.errors import InputError
from vitedge.inspect.onnx_file import open_onnx
from vitedge.inspect.ranges import ChannelRanges
from vitedge.inspect.sources import Tap, read_batches
from vitedge.model_file import open_artifact
from vitedge.progress import silent

TAP = Tap("blocks.0.norm1", "ln1", "tokens")


def measured(path: Path, x_BCHW: np.ndarray) -> list[ChannelRanges]:
    source, _ = open_onnx(open_artifact(path), 1)
    found = [ChannelRanges.of(tap) for tap in source.norms]
    for (values,) in read_batches([source], [[norm.tap.tensor for norm in found]], x_BCHW, silent, ""):
        for norm in found:
            norm.add(values[norm.tap.tensor])
    return found


def test_a_loud_channel_is_found_with_its_range(tmp_path: Path) -> None:
    x_BCHW = tiny.images(10)  # no multiple of the batch that is read at once
    first, last = measured(made.write_vit(tmp_path / "m.onnx"), x_BCHW)
    wanted = made.tokens(x_BCHW).reshape(-1, made.EMBED)
    np.testing.assert_allclose(first.low_D, wanted.min(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(first.high_D, wanted.max(0), rtol=1e-4, atol=1e-4)
    assert (first.tap.layer, last.tap.layer) == ("blocks.0.norm1", "norm")
    assert first.widest_channel == made.LOUD
    ranges = np.ptp(wanted, axis=0)
    assert first.spread == pytest.approx(ranges[made.LOUD] / np.median(ranges), rel=1e-4)
    (quiet, _) = measured(made.write_vit(tmp_path / "quiet.onnx", loudness=1.0), x_BCHW)
    assert first.spread > 20 * quiet.spread / 2  # the channel is 50 times as loud, and was at most twice as wide as the median one before


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=20), st.floats(0.01, 100))
def test_batches_add_up_and_the_spread_has_no_unit(rows: list[list[float]], scale: float) -> None:
    values = np.array(rows)
    whole, parts, scaled = (ChannelRanges.of(TAP) for _ in range(3))
    whole.add(values)
    for row in values:
        parts.add(row[None, None])
    scaled.add(values * scale)
    assert np.array_equal(whole.low_D, parts.low_D) and np.array_equal(whole.high_D, parts.high_D)
    assert whole.spread >= 1.0
    assert scaled.spread == pytest.approx(whole.spread, rel=1e-6) or float(np.median(whole.ranges)) < 1e-9


def test_constant_channels_give_no_division_by_zero() -> None:
    flat, half = ChannelRanges.of(TAP), ChannelRanges.of(TAP)
    flat.add(np.ones((4, 3)))
    half.add(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert (flat.spread, half.spread, half.widest_channel) == (1.0, float("inf"), 2)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="finite"):
        ChannelRanges.of(TAP).add(np.array([[1.0, np.nan]]))
