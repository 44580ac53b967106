"""Integers of 1 to 16 bits as real bytes and back, and the error of an approximation in decibels; numpy alone.

The bits of value after value follow each other, lowest bit first, from the lowest bit of the first byte, so
n values of b bits take exactly ceil(n b / 8) bytes. At 4 bits this is the order of ONNX's INT4 (the first
value in the low half of a byte), at 2 bits of its INT2, at 8 and 16 bits plain little-endian.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.errors import InputError

# A multiple of 8 values ends on a whole byte at any width; this many keep the unpacked bits of a part at 16 MiB.
_PART = 1 << 20


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits (1 to 16) take.

    Raises:
        InputError: On another width or a negative count.
    """
    if not 1 <= bits <= 16:
        raise InputError("packed integers", expected="1 to 16 bits a value", found=f"{bits}", fix="choose a width in that range")
    if count < 0:
        raise InputError("packed integers", expected="a count of 0 or more", found=f"{count}", fix="pass the number of values")
    return -(-count * bits // 8)


def pack(values: NDArray[Any], bits: int, signed: bool) -> NDArray[np.uint8]:
    """The values, flattened in C order, as uint8 (ceil(count * bits / 8),); the last byte is filled up with zeros.

    Args:
        values: Integers of any shape and integer type; negative ones as two's complement.
        bits: Of one value, 1 to 16.
        signed: Whether values lie in -2^(bits-1)..2^(bits-1)-1, or in 0..2^bits-1.

    Raises:
        InputError: When a value is no integer or does not fit, or on another width.
    """
    size = packed_bytes(values.size, bits)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError("values to pack", expected="integers", found=f"{values.dtype}", fix="quantize them first")
    lowest, highest = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    flat = values.reshape(-1)
    if flat.size and (int(flat.min()) < lowest or int(flat.max()) > highest):
        raise InputError(
            "values to pack",
            expected=f"{lowest}..{highest} ({bits} bits)",
            found=f"{int(flat.min())}..{int(flat.max())}",
            fix="quantize them to that grid, or pack with more bits",
        )
    packed = np.empty(size, dtype=np.uint8)
    places = np.arange(bits, dtype=np.uint16)
    for first in range(0, flat.size, _PART):
        # To uint16 by way of int32: what is cut off are copies of a negative value's sign.
        part = flat[first : first + _PART].astype(np.int32).astype(np.uint16)
        stream = ((part[:, None] >> places) & 1).astype(np.uint8)
        begin = first * bits // 8
        packed[begin : begin + packed_bytes(part.size, bits)] = np.packbits(stream, bitorder="little")
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, count: int, signed: bool) -> NDArray[np.int32]:
    """The `count` values that `pack` was given, int32 (count,).

    Raises:
        InputError: When the bytes are not uint8 or not as many as `count` values of `bits` bits take.
    """
    size = packed_bytes(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise InputError(
            "packed integers",
            expected=f"uint8 ({size},), {count} values of {bits} bits",
            found=f"{packed.dtype} {packed.shape}",
            fix="pass the bytes with the width and the count they were packed with",
        )
    values = np.empty(count, dtype=np.int32)
    weights = np.left_shift(np.int32(1), np.arange(bits, dtype=np.int32))
    for first in range(0, count, _PART):
        length = min(_PART, count - first)
        begin = first * bits // 8
        part = packed[begin : begin + packed_bytes(length, bits)]
        stream = np.unpackbits(part, count=length * bits, bitorder="little").reshape(length, bits)
        values[first : first + length] = stream @ weights
    if signed:
        values[values >= 1 << (bits - 1)] -= 1 << bits
    return values


def sqnr_db(reference: NDArray[Any], approximation: NDArray[Any]) -> float:
    """Signal to quantization noise ratio in dB, `10 log10(sum r^2 / sum (r - a)^2)`, summed in float64.

    Infinite where both are equal, minus infinity where only the reference is all zeros.

    Raises:
        InputError: When shapes differ, there are no values, or one of them is not finite.
    """
    if reference.shape != approximation.shape or not reference.size:
        raise InputError(
            "signal to noise ratio",
            expected="two arrays of one shape, not empty",
            found=f"{reference.shape} and {approximation.shape}",
            fix="compare the same values",
        )
    exact, approximate = reference.astype(np.float64), approximation.astype(np.float64)
    if not (np.isfinite(exact).all() and np.isfinite(approximate).all()):
        raise InputError("signal to noise ratio", expected="finite values", found="infinite ones or NaN", fix="find what diverged")
    signal, noise = float(np.square(exact).sum()), float(np.square(exact - approximate).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
