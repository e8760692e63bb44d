"""Two pieces of memory as elements of tensors: how many differ, and by how much.

Elements of one type differ if their bits differ. So 0.0 and -0.0 differ, by nothing, and a NaN is equal to a NaN with
the same bits only. Elements of two types differ if their values do, and every NaN is equal to every NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merge_engine.backends.memory import identical
from merge_engine.dtypes import DType

if TYPE_CHECKING:
    import torch

PIECE = 1 << 15
"""Elements that are compared at a time. Their numbers stay in the processor's cache, and torch, which works on more
elements with threads of its own, leaves them to the calling thread."""

_INTEGERS = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")
_LOWEST = -(2**63)


@dataclass(frozen=True, slots=True)
class Tally:
    """What differs between elements.

    ``differing`` is the number of elements, ``same_value`` the number of those with equal values (0.0 and -0.0), and
    ``nan`` of those where either is NaN. ``largest`` is the largest absolute difference of the others: exact for
    integers, else in float64.
    """

    differing: int = 0
    same_value: int = 0
    nan: int = 0
    largest: int | float = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.differing + other.differing,
            self.same_value + other.same_value,
            self.nan + other.nan,
            max(self.largest, other.largest),
        )


def has_values(dtype: DType) -> bool:
    """Whether torch can compute with this type: otherwise its elements are compared as bits."""
    import torch

    return dtype.bits >= 8 and hasattr(torch, dtype.name)


def compare(a: memoryview, b: memoryview, a_type: DType, b_type: DType) -> Tally:
    """Compare equally many elements, which begin and end with whole bytes.

    ``largest`` is 0 for a type that has no values here. Both of two different types must have values.
    """
    found = Tally()
    if a_type == b_type and identical([a, b], None):
        return found
    step_a, step_b = PIECE * a_type.bits // 8, PIECE * b_type.bits // 8
    for number in range(-(-a.nbytes // step_a)):
        x, y = a[number * step_a :][:step_a], b[number * step_b :][:step_b]
        if a_type != b_type:
            found += _of_two_types(x, y, a_type, b_type)
        elif not identical([x, y], None):
            found += _of_one_type(x, y, a_type)
    return found


def _of_one_type(a: memoryview, b: memoryview, dtype: DType) -> Tally:
    if not has_values(dtype):
        return Tally(_differing_bits(a, b, dtype.bits))
    differing = _bits(a, dtype) != _bits(b, dtype)
    return _differences(_values(a, dtype), _values(b, dtype), differing)


def _of_two_types(a: memoryview, b: memoryview, a_type: DType, b_type: DType) -> Tally:
    codes = {a_type.code, b_type.code}
    if "U64" in codes or ("I64" in codes and not codes <= {*_INTEGERS}):
        return _exactly(_raw(a, _readable(a_type)).tolist(), _raw(b, _readable(b_type)).tolist())
    x, y = _values(a, a_type), _values(b, b_type)
    if x.dtype != y.dtype:
        import torch

        common = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(common), y.to(common)
    return _differences(x, y, ~((x == y) | (x.isnan() & y.isnan())))


def _differences(x: torch.Tensor, y: torch.Tensor, differing: torch.Tensor) -> Tally:
    """For values in int64, float64 or complex128, of which some differ."""
    count, nan = int(differing.count_nonzero()), 0
    if x.dtype.is_floating_point or x.is_complex():
        distance = (x - y).abs()
        largest = float(distance.max())
        if math.isnan(largest):  # NaN, or equal infinities
            distance.masked_fill_(~differing, 0)
            nan = int(distance.isnan().count_nonzero())
            largest = float(distance.nan_to_num(0, math.inf).max())
        return Tally(count, count - int(distance.count_nonzero()), nan, largest)
    # The difference of two 64-bit integers takes 64 bits without a sign: it is shifted for the search.
    distance = (x - y).where(x >= y, y - x) ^ _LOWEST
    return Tally(count, 0, 0, int(distance.max()) - _LOWEST)


def _exactly(x: list[Any], y: list[Any]) -> Tally:
    """With Python's numbers, which have no largest integer: slow, for types that are seldom compared."""
    differing = [(p, q) for p, q in zip(x, y, strict=True) if p != q and (p == p or q == q)]
    ordered = [(p, q) for p, q in differing if p == p and q == q]
    largest = max((_distance(p, q) for p, q in ordered), default=0)
    return Tally(len(differing), 0, len(differing) - len(ordered), largest)


def _distance(p: Any, q: Any) -> int | float:
    if isinstance(p, int) and isinstance(q, int):
        return abs(p - q)
    if isinstance(p, complex) or isinstance(q, complex):
        return float(abs(p - q))
    if math.isinf(p) or math.isinf(q):
        return math.inf
    return float(abs(Fraction(p) - Fraction(q)))


def _values(memory: memoryview, dtype: DType) -> torch.Tensor:
    """Elements as int64, float64 or complex128, which hold them exactly. U64 is shifted, so that its order stays."""
    import torch

    if dtype.code == "U64":
        return _raw(memory, "int64") ^ _LOWEST
    if dtype.code in _INTEGERS:
        return _raw(memory, _readable(dtype)).to(torch.int64)
    return _raw(memory, dtype.name).to(torch.complex128 if dtype.code == "C64" else torch.float64)


def _readable(dtype: DType) -> str:
    """The type that torch reads elements as: a bool that is neither 0 nor 1 is undefined to it."""
    return "uint8" if dtype.code == "BOOL" else dtype.name


def _bits(memory: memoryview, dtype: DType) -> torch.Tensor:
    return _raw(memory, {8: "uint8", 16: "int16", 32: "int32", 64: "int64"}[dtype.bits])


def _differing_bits(a: memoryview, b: memoryview, bits: int) -> int:
    """The number of elements, ``bits`` each and packed from the lowest bit on, with differing bits."""
    import torch

    changed = (_raw(a, "uint8") ^ _raw(b, "uint8")).unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)
    return int((changed & 1).reshape(-1, bits).any(1).sum())


def _raw(memory: memoryview, dtype: str) -> torch.Tensor:
    """A copy of memory: torch takes none that is read-only, or that does not begin where an element may."""
    import torch

    found: torch.Tensor = torch.frombuffer(bytearray(memory), dtype=getattr(torch, dtype))
    return found
