"""Types of the CPU module, see csrc/cpu/binding.cpp and csrc/cpu/binding_kernels.h.

Addresses are those of host memory. Lines are (length, stride). What a chunk's inputs begin with is the base, where
one is needed; models are counted from 0 behind it.
"""

from array import array
from collections.abc import Sequence
from typing import overload

from merge_engine._native_types import DType as DType
from merge_engine._native_types import Election as Election
from merge_engine._native_types import Line as Line
from merge_engine._native_types import Mask as Mask
from merge_engine._native_types import RankBand as RankBand

class HostArray:
    @overload
    def __init__(self, memory: memoryview, dtype: DType) -> None: ...
    @overload
    def __init__(self, address: int, count: int, dtype: DType, owner: object) -> None: ...
    @property
    def count(self) -> int: ...

class Found:
    def __init__(self, found: tuple[int, int, int]) -> None: ...
    @property
    def key(self) -> int: ...
    @property
    def above(self) -> int: ...
    @property
    def equal(self) -> int: ...

class WholeFound(Found): ...

class Score:
    @staticmethod
    def variance(storage_rounding: bool) -> Score: ...
    @staticmethod
    def divergence(length: int, divergences: int) -> Score: ...

class Kernels:
    def __init__(self, instruction_set: str, threads: int) -> None: ...
    def count_keys(
        self,
        inputs: Sequence[HostArray],
        columns: Sequence[tuple[int, int, int]],
        working: DType,
        level: int,
        count: int,
        slots: int,
        counts: array[int],
    ) -> None: ...
    def find_all(
        self,
        inputs: Sequence[HostArray],
        sought: Sequence[tuple[int, Sequence[int]]],
        working: DType,
        count: int,
    ) -> list[list[WholeFound]]: ...
    def locate(
        self, inputs: Sequence[HostArray], model: int, working: DType, key: int, nth: int, count: int
    ) -> tuple[int, int]: ...
    def l1_norms(
        self,
        inputs: Sequence[HostArray],
        masks: Sequence[Mask],
        notes: Sequence[int],
        working: DType,
        storage_rounding: bool,
        start: int,
        count: int,
        sums: array[float],
    ) -> None: ...
    def squares(
        self,
        inputs: Sequence[HostArray],
        masks: Sequence[Mask],
        notes: Sequence[int],
        working: DType,
        storage_rounding: bool,
        start: int,
        count: int,
        sums: array[float],
    ) -> None: ...
    def overlaps(
        self, inputs: Sequence[HostArray], masks: Sequence[Mask], working: DType, start: int, count: int
    ) -> list[tuple[int, int]]: ...
    def divergences(
        self, inputs: Sequence[HostArray], working: DType, length: int, count: int, found: array[float]
    ) -> None: ...
    def scores(
        self, inputs: Sequence[HostArray], score: Score, working: DType, count: int
    ) -> list[HostArray]: ...
    def note_band(
        self, inputs: Sequence[HostArray], mask: Mask, working: DType, start: int, count: int, notes: int
    ) -> None: ...
    def nearswap(
        self,
        inputs: Sequence[HostArray],
        output: HostArray,
        threshold: float,
        storage_rounding: bool,
        working: DType,
        count: int,
    ) -> list[int]: ...
    def gram(
        self,
        inputs: Sequence[HostArray],
        working: DType,
        of_deltas: bool,
        line: Line | tuple[int, int],
        start: int,
        count: int,
        sums: array[float],
    ) -> None: ...
    def rank_thresholds(
        self,
        inputs: Sequence[HostArray],
        model: int,
        working: DType,
        line: tuple[int, int],
        density: float,
        epsilon: float,
        count: int,
        thresholds: int,
    ) -> None: ...
    def note_ranks(
        self,
        inputs: Sequence[HostArray],
        model: int,
        working: DType,
        line: tuple[int, int],
        density: float,
        epsilon: float,
        random_key: int,
        start: int,
        count: int,
        notes: int,
    ) -> None: ...
    def consensus(
        self,
        inputs: Sequence[HostArray],
        output: HostArray,
        masks: Sequence[Mask],
        entries: Sequence[tuple[float, float, float, float]],
        working: DType,
        election: Election,
        normalize: bool,
        storage_rounding: bool,
        scale: float,
        divisor: float,
        wide: bool,
        start: int,
        count: int,
    ) -> tuple[list[tuple[int, int, int]], list[int]]: ...
    def combine(
        self,
        inputs: Sequence[HostArray],
        output: HostArray,
        coefficients: Sequence[float],
        divisor: float | None,
        fused: bool,
        rounded: bool,
        stepwise: bool,
        on_base: bool,
        line: Line | tuple[int, int],
        of_lines: array[float] | None,
        working: DType,
        start: int,
        count: int,
    ) -> list[int]: ...
    def add_low_rank(
        self,
        values: HostArray,
        rows: HostArray,
        columns: HostArray,
        rank: int,
        width: int,
        first: int,
        transposed: bool,
        scale: float,
    ) -> None: ...

class Mapping:
    def __init__(self, descriptor: int, size: int) -> None: ...
    def load(self, first: int, last: int) -> None: ...
    def release(self, first: int, last: int) -> None: ...
    def view(self, first: int, last: int) -> memoryview: ...
    @property
    def torn(self) -> bool: ...

def instruction_set() -> str: ...
def runs(instruction_set: str) -> bool: ...
def find_in_counts(
    counts: array[int] | memoryview, level: int, within: Found | tuple[int, int, int] | None, rank: int
) -> Found: ...
def add_in_order(sums: array[float], totals: array[float]) -> None: ...
def sum_block(line: Line | tuple[int, int]) -> int: ...
def lines_of_block(line: Line | tuple[int, int]) -> int: ...
def add_to_lines(
    sums: array[float], first_block: int, line: Line | tuple[int, int], columns: int, totals: array[float]
) -> None: ...
def arc_cosine(x: float) -> float: ...
def sine(angle: float) -> float: ...
def cosine(angle: float) -> float: ...
def slerp(products: array[float], t: float, steps: DType | None, coefficients: array[float]) -> None: ...
def nuslerp(products: array[float], t: float, steps: DType | None, coefficients: array[float]) -> None: ...
def nuslerp_arc(products: array[float], t: float, steps: DType | None) -> tuple[float, float, float]: ...
def multislerp(
    products: array[float], weights: Sequence[float], epsilon: float, coefficients: array[float]
) -> bool: ...
def karcher(
    products: array[float], count: int, max_iterations: int, tolerance: float, coefficients: array[float]
) -> None: ...
def model_stock(
    products: array[float], count: int, least_product: float, steps: DType | None, coefficients: array[float]
) -> None: ...
def solve_band(
    band: RankBand,
    low: Found | tuple[int, int, int],
    high: Found | tuple[int, int, int] | None,
    working: DType,
) -> tuple[Mask, int]: ...
def address_of(memory: memoryview) -> int: ...
def identical(memories: Sequence[memoryview], element_bytes: int) -> bool: ...
def add_rows(rows: HostArray, sums: array[float]) -> None: ...
def store_means(sums: array[float], divisor: float, means: HostArray) -> None: ...
def read_rows(
    descriptor: int,
    position: int,
    row_bytes: int,
    firsts: array[int],
    sources: array[int],
    starts: array[int],
    rows: int,
    source: int,
    begin: int,
    memory: memoryview,
) -> int: ...
