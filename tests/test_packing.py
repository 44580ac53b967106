"""Integers as real bytes: the round trip, the size, ONNX's own order, and what does not fit."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from vitedge import packing
from vitedge.errors import InputError


def _span(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@given(bits=st.integers(1, 16), signed=st.booleans(), count=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_round_trip_in_exactly_the_bytes_it_must_take(bits: int, signed: bool, count: int, seed: int) -> None:
    low, high = _span(bits, signed)
    values = np.random.default_rng(seed).integers(low, high, size=count, endpoint=True)
    values[:2] = (low, high)[:count]
    packed = packing.pack(values, bits, signed)
    assert packed.dtype == np.uint8 and packed.shape == (math.ceil(count * bits / 8),) == (packing.packed_bytes(count, bits),)
    restored = packing.unpack(packed, bits, count, signed)
    assert restored.dtype == np.int32
    np.testing.assert_array_equal(restored, values)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [3, 5, 11])
def test_the_order_of_bits_against_one_long_integer(bits: int, signed: bool) -> None:
    low, high = _span(bits, signed)
    values = np.random.default_rng(bits).integers(low, high, size=(3, 7), endpoint=True)
    whole = sum((int(value) % 2**bits) << (place * bits) for place, value in enumerate(values.ravel()))
    assert packing.pack(values, bits, signed).tobytes() == whole.to_bytes(math.ceil(21 * bits / 8), "little")


@pytest.mark.parametrize(("bits", "kind", "signed"), [(4, "INT4", True), (4, "UINT4", False), (2, "INT2", True), (2, "UINT2", False)])
@pytest.mark.parametrize("count", [8, 11])
def test_the_same_bytes_as_onnx(bits: int, kind: str, signed: bool, count: int) -> None:
    if not hasattr(TensorProto, kind):
        pytest.skip(f"this onnx has no {kind}")
    low, high = _span(bits, signed)
    values = np.random.default_rng(3).integers(low, high, size=count, endpoint=True)
    tensor = onnx.helper.make_tensor("w", getattr(TensorProto, kind), [count], values)
    by_onnx = np.frombuffer(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data, dtype=np.uint8)
    np.testing.assert_array_equal(packing.pack(values, bits, signed), by_onnx)
    raw = onnx.helper.make_tensor("w", getattr(TensorProto, kind), [count], packing.pack(values, bits, signed).tobytes(), raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(raw).astype(np.int32), values)


@pytest.mark.parametrize(("bits", "dtype"), [(8, "<i1"), (16, "<i2")])
def test_whole_bytes_are_plain_little_endian(bits: int, dtype: str) -> None:
    values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), 2 ** (bits - 8) + 1)
    np.testing.assert_array_equal(packing.pack(values, bits, True), values.astype(dtype).view(np.uint8))


def test_longer_than_the_part_that_is_unpacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(-16, 15, size=1000, endpoint=True)
    whole = packing.pack(values, 5, True)
    monkeypatch.setattr(packing, "_PART", 64)
    np.testing.assert_array_equal(packing.pack(values, 5, True), whole)
    np.testing.assert_array_equal(packing.unpack(whole, 5, 1000, True), values)


def test_the_last_byte_is_filled_with_zeros() -> None:
    assert packing.pack(np.array([-1]), 3, True).tolist() == [0b111]


@pytest.mark.parametrize(
    ("values", "bits", "signed", "found"),
    [
        (np.array([0, 8]), 4, True, "0..8"),
        (np.array([-9]), 4, True, "-9"),
        (np.array([-1]), 4, False, "-1"),
        (np.array([70_000], dtype=np.uint64), 16, False, "70000"),
        (np.array([1.0]), 4, True, "float64"),
        (np.array([1]), 0, True, "0"),
        (np.array([1]), 17, True, "17"),
    ],
)
def test_what_does_not_fit_is_refused(values: np.ndarray, bits: int, signed: bool, found: str) -> None:
    with pytest.raises(InputError, match=f"found .*{found}"):
        packing.pack(values, bits, signed)


@pytest.mark.parametrize("packed", [np.zeros(2, np.uint8), np.zeros(4, np.uint8), np.zeros(3, np.int8), np.zeros((1, 3), np.uint8)])
def test_bytes_of_another_count_are_refused(packed: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"uint8 \(3,\)"):
        packing.unpack(packed, 3, 8, True)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(InputError, match="-1"):
        packing.packed_bytes(-1, 4)


def test_sqnr_in_closed_form() -> None:
    reference = np.array([3.0, -4.0], dtype=np.float32)
    assert packing.sqnr_db(reference, reference * 0.9) == pytest.approx(20.0, abs=1e-5)
    assert packing.sqnr_db(reference, np.array([3.0, -3.0])) == pytest.approx(10 * math.log10(25), abs=1e-12)
    assert packing.sqnr_db(reference, reference) == math.inf
    assert packing.sqnr_db(np.zeros(2), np.zeros(2)) == math.inf
    assert packing.sqnr_db(np.zeros(2), np.ones(2)) == -math.inf


def test_sqnr_of_integers_and_of_large_float32_does_not_overflow() -> None:
    assert packing.sqnr_db(np.array([200], dtype=np.uint8), np.array([100], dtype=np.uint8)) == pytest.approx(10 * math.log10(4))
    large = np.array([3e38, 3e38], dtype=np.float32)
    assert packing.sqnr_db(large, -large) == pytest.approx(10 * math.log10(0.25))


@pytest.mark.parametrize("other", [np.ones(3), np.array([1.0, np.nan]), np.array([1.0, np.inf])])
def test_sqnr_of_what_cannot_be_compared_is_refused(other: np.ndarray) -> None:
    with pytest.raises(InputError, match="signal to noise"):
        packing.sqnr_db(np.ones(2), other)
