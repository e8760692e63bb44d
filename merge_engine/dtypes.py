"""The element types of safetensors files, and which of them can be merged.

A ``DType`` has the code in a safetensors header (``BF16``), the name in recipes and in torch (``bfloat16``), and
the size in bits. Torch itself is not needed to read, merge and write checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, eq=False)  # compared by identity: a merge compares and looks up types for each tensor
class DType:
    """One element type. ``bits`` is the storage size of an element (some types pack several to a byte).

    There is one object for each type, also after it was copied or sent to another process.
    """

    code: str
    name: str
    bits: int

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        return _of_code, (self.code,)

    @property
    def itemsize(self) -> int:
        """Bytes per element, for types of whole bytes only."""
        return self.bits // 8

    @property
    def mergeable(self) -> bool:
        """Whether merge methods compute on it; all other types can only be copied."""
        return self.code in ("BF16", "F16", "F32", "F64")

    def __str__(self) -> str:
        return self.name


BF16 = DType("BF16", "bfloat16", 16)
F16 = DType("F16", "float16", 16)
F32 = DType("F32", "float32", 32)
F64 = DType("F64", "float64", 64)

ALL = (
    DType("BOOL", "bool", 8),
    DType("F4", "float4_e2m1fn_x2", 4),
    DType("F6_E2M3", "float6_e2m3fn", 6),
    DType("F6_E3M2", "float6_e3m2fn", 6),
    DType("U8", "uint8", 8),
    DType("I8", "int8", 8),
    DType("F8_E5M2", "float8_e5m2", 8),
    DType("F8_E4M3", "float8_e4m3fn", 8),
    DType("F8_E8M0", "float8_e8m0fnu", 8),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
    DType("I16", "int16", 16),
    DType("U16", "uint16", 16),
    DType("I32", "int32", 32),
    DType("U32", "uint32", 32),
    DType("I64", "int64", 64),
    DType("U64", "uint64", 64),
    DType("C64", "complex64", 64),
    F16,
    BF16,
    F32,
    F64,
)
BY_CODE = {dtype.code: dtype for dtype in ALL}
BY_NAME = {dtype.name: dtype for dtype in ALL}
MERGEABLE = tuple(dtype for dtype in ALL if dtype.mergeable)


def _of_code(code: str) -> DType:
    return BY_CODE[code]


def promote(*dtypes: DType) -> DType:
    """The type that holds every value of the given mergeable types, by torch's promotion rules.

    Equal types stay, bfloat16 with float16 becomes float32, otherwise the widest wins.
    """
    distinct = set(dtypes)
    if distinct == {BF16, F16}:
        return F32
    return max(distinct, key=lambda dtype: dtype.bits)


@cache
def of_torch(dtype: object) -> DType | None:
    """The type that torch calls by the same name; None if no checkpoint can hold it."""
    return BY_NAME.get(str(dtype).removeprefix("torch."))
