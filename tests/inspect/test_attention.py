"""What 4 bits keep of attention values: shares with a closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.inspect import made
from vitedge.errors import InputError
from vitedge.inspect.attention import LOWEST_EXPONENT, PER_OCTAVE, AttentionValues, LostValues
from vitedge.inspect.onnx_file import open_onnx
from vitedge.inspect.sources import Tap
from vitedge.model_file import open_artifact

TAP = Tap("blocks.0.attn", "softmax", "attention")


def counted(*parts: np.ndarray) -> LostValues:
    seen = AttentionValues(TAP)
    for part in parts:
        seen.add(part)
    lost = LostValues(seen)
    for part in parts:
        lost.add(part)
    return lost


def test_powers_of_two_have_shares_in_closed_form() -> None:
    values = 2.0 ** -np.arange(20)  # 1, 1/2 ... 2^-19
    plain = counted(values[:7].reshape(1, 7), values[7:]).to_plain()
    # The uniform step is 1/15, so 2^-5 < 1/30 and all below become 0; the log2 grid ends at 2^-15.
    assert plain["uniform_zero_percent"] == pytest.approx(100 * 15 / 20)
    assert plain["log2_zero_percent"] == pytest.approx(100 * 4 / 20)
    total = 2 - 2.0**-19
    assert plain["uniform_lost_attention_percent"] == pytest.approx(100 * (2.0**-4 - 2.0**-19) / total)
    assert plain["log2_lost_attention_percent"] == pytest.approx(100 * (2.0**-15 - 2.0**-19) / total)
    counts = np.array(plain["histogram"]["counts"])
    places = (-np.arange(20) - LOWEST_EXPONENT) * PER_OCTAVE
    places[0] -= 1  # the last bin has its upper edge in it
    assert counts.sum() == 20 and (counts[places] == 1).all()
    assert (plain["highest"], plain["values"], plain["histogram"]["below"]) == (1.0, 20, 0)


def test_the_uniform_grid_ends_at_the_highest_value_seen() -> None:
    plain = counted(np.array([0.3, 0.3 / 31, 0.3 / 29, 0.0, 2.0**-30])).to_plain()
    assert plain["uniform_zero_percent"] == pytest.approx(60.0)
    assert plain["log2_zero_percent"] == pytest.approx(40.0)
    assert plain["histogram"]["below"] == 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50).filter(lambda values: max(values) > 1e-6))
def test_shares_are_those_of_rounding_each_value(values: list[float]) -> None:
    lost = counted(np.array(values))
    step = max(values) / 15
    assert lost.seen.values == len(values)
    near = [value for value in values if abs(value / step - 0.5) > 1e-9]
    assert abs(lost.uniform - sum(np.rint(value / step) == 0 for value in near)) <= len(values) - len(near)
    with np.errstate(divide="ignore"):
        assert lost.log2 == int(np.count_nonzero(np.rint(-np.log2(values)) > 15))


def test_a_models_attention_is_read_where_it_is(tmp_path: Path) -> None:
    x_BCHW = tiny.images(3)
    source, _ = open_onnx(open_artifact(made.write_vit(tmp_path / "m.onnx")), 1)
    (tap,) = source.attentions
    assert (tap.layer, tap.node) == ("blocks.0.attn", "softmax")
    found = source.open([tap.tensor])(x_BCHW)[tap.tensor]
    np.testing.assert_allclose(found, made.attention(x_BCHW), atol=1e-5)


def test_what_no_softmax_gives_is_refused() -> None:
    for wrong in ([-0.1, 1.0], [0.5, 1.1], [0.5, float("nan")]):
        with pytest.raises(InputError, match="softmax"):
            AttentionValues(TAP).add(np.array(wrong))
