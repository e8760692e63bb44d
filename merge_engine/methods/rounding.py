"""Arithmetic on single numbers in the precision that tensors are computed in, without torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from merge_engine.dtypes import BF16, F16, F32, F64, DType


def rounded(value: float, dtype: DType) -> float:
    """``value`` rounded to nearest in a mergeable dtype, ties to even; infinity beyond its range."""
    if dtype == F64 or not math.isfinite(value):
        return value
    if dtype == BF16:
        bits = struct.unpack("<I", struct.pack("<f", rounded(value, F32)))[0]
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    code = "<e" if dtype == F16 else "<f"
    try:
        return float(struct.unpack(code, struct.pack(code, value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def weight_sum(weights: Sequence[float], working: DType, storage_rounding: bool) -> float:
    """The sum of the weights: the divisor of methods without an election.

    Weights are rounded first and added in order, in float32 (float64 if ``working`` is float64). With
    ``storage_rounding`` they are added in the order of ``torch.sum`` and the sum is rounded too, as in mergekit.
    """
    real = F64 if working == F64 else F32
    if not storage_rounding:
        total = 0.0
        for weight in weights:
            total = rounded(total + rounded(weight, real), real)
        return total
    return rounded(_torch_sum([rounded(weight, working) for weight in weights]), working)


def _torch_sum(values: Sequence[float]) -> float:
    """Float32 sum in the order in which torch adds a vector of a few dozen numbers: eight lanes, then the rest."""
    if len(values) < 8:
        return _in_four_chains(values)
    rows = len(values) // 8
    lanes = [_in_four_chains(values[lane : 8 * rows : 8]) for lane in range(8)]
    return _in_order([*values[8 * rows :], *lanes])


def _in_four_chains(values: Sequence[float]) -> float:
    whole = len(values) // 4 * 4
    if not whole:
        return _in_order(values)
    chains = [_in_order(values[chain:whole:4]) for chain in range(4)]
    return _in_order([_in_order([chains[0], *values[whole:]]), *chains[1:]])


def _in_order(values: Sequence[float]) -> float:
    total = 0.0
    for value in values:
        total = rounded(total + value, F32)
    return total


def key_of(value: float, dtype: DType) -> int:
    """The magnitude key of a number: the bits of ``value``, rounded in a mergeable dtype, without the sign."""
    exact = abs(rounded(value, dtype))
    if dtype == BF16:
        return int(struct.unpack("<I", struct.pack("<f", exact))[0]) >> 16
    number, bits = {F16: ("<e", "<H"), F32: ("<f", "<I"), F64: ("<d", "<Q")}[dtype]
    return int(struct.unpack(bits, struct.pack(number, exact))[0])


def magnitude_of(key: int, dtype: DType) -> float:
    """The number of a magnitude key in a mergeable dtype."""
    if dtype == BF16:
        return float(struct.unpack("<f", struct.pack("<I", key << 16))[0])
    number, bits = {F16: ("<e", "<H"), F32: ("<f", "<I"), F64: ("<d", "<Q")}[dtype]
    return float(struct.unpack(number, struct.pack(bits, key))[0])
