"""What the native modules have in common, see csrc/binding_types.h.

Each module has classes of its own; there is no module of this name at run time.
"""

from typing import ClassVar, Protocol

class DType:
    BF16: ClassVar[DType]
    F16: ClassVar[DType]
    F32: ClassVar[DType]
    F64: ClassVar[DType]

class Election:
    none: ClassVar[Election]
    sum: ClassVar[Election]
    count: ClassVar[Election]
    deltas: ClassVar[Election]
    overlap: ClassVar[Election]

class Line:
    def __init__(self, line: tuple[int, int]) -> None: ...

class Mask:
    @staticmethod
    def dense() -> Mask: ...
    @staticmethod
    def band(
        low: int,
        high: int,
        low_positions: tuple[int, int],
        high_positions: tuple[int, int],
        by_draw: bool,
        random_key: int,
    ) -> Mask: ...
    @staticmethod
    def draw(below: int, random_key: int) -> Mask: ...
    @staticmethod
    def ranked(thresholds: int, inverse_probability: bool, random_key: int) -> Mask: ...
    @staticmethod
    def noted(notes: int) -> Mask: ...
    @staticmethod
    def solved(address: int) -> Mask: ...
    @property
    def low_positions(self) -> tuple[int, int]: ...

class RankBand:
    def __init__(
        self,
        first: int,
        last: int,
        slack: float,
        has_high: bool,
        spread: bool,
        every_tie: bool,
        low_positions: tuple[int, int],
        high_positions: tuple[int, int],
        random_key: int,
    ) -> None: ...

class NativeTypes(Protocol):
    """A native module, for those who need no more of it."""

    @property
    def DType(self) -> type[DType]: ...
    @property
    def Election(self) -> type[Election]: ...
    @property
    def Mask(self) -> type[Mask]: ...
    @property
    def RankBand(self) -> type[RankBand]: ...
