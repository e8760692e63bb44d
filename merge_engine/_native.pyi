"""Types of the CPU module, see csrc/cpu/binding.cpp."""

from array import array
from collections.abc import Sequence
from typing import Any

SUM_BLOCK: int
DType: Any
MaskKind: Any
Election: Any
Array: Any
Sought: Any
Mask: Any
Entry: Any
Consensus: Any
Combine: Any
Found: Any
RankBand: Any

class Mapping:
    def __init__(self, descriptor: int, size: int) -> None: ...
    def load(self, first: int, last: int) -> None: ...
    def release(self, first: int, last: int) -> None: ...
    def view(self, first: int, last: int) -> memoryview: ...
    @property
    def torn(self) -> bool: ...

def address_of(memory: memoryview) -> int: ...
def instruction_set() -> str: ...
def runs(instruction_set: str) -> bool: ...
def solve_band(band: Any, low: Any, high: Any, working: Any) -> Any: ...
def identical(addresses: Sequence[int], size: int, element_bytes: int) -> bool: ...
def count_keys(
    instruction_set: str,
    base: Any,
    columns: Sequence[tuple[Any, int, int]],
    working: Any,
    shift: int,
    count: int,
    threads: int,
    bits: int,
    slots: int,
    counts: array[int],
) -> None: ...
def find_all(
    instruction_set: str,
    base: Any,
    sought: Sequence[Any],
    working: Any,
    shift: int,
    count: int,
    threads: int,
) -> list[list[Any]]: ...
def find_in_counts(counts: array[int] | memoryview, bits: int, within: Any, rank: int) -> Any: ...
def locate(
    isa: str, base: Any, model: Any, working: Any, key: int, nth: int, count: int, threads: int
) -> tuple[int, int]: ...
def l1_norms(
    isa: str,
    base: Any,
    models: Sequence[Any],
    masks: Sequence[Any],
    notes: Sequence[int],
    working: Any,
    storage_rounding: bool,
    start: int,
    count: int,
    threads: int,
    sums: array[float],
) -> None: ...
def gram(
    isa: str, inputs: Sequence[Any], working: Any, count: int, threads: int, sums: array[float]
) -> None: ...
def add_in_order(sums: array[float], totals: array[float]) -> None: ...
def rank_thresholds(
    isa: str,
    base: Any,
    model: Any,
    working: Any,
    length: int,
    stride: int,
    density: float,
    epsilon: float,
    count: int,
    threads: int,
    thresholds: int,
) -> None: ...
def note_ranks(
    isa: str,
    base: Any,
    model: Any,
    working: Any,
    length: int,
    stride: int,
    density: float,
    epsilon: float,
    random_key: int,
    start: int,
    count: int,
    threads: int,
    notes: int,
) -> None: ...
def consensus(
    isa: str, operation: Any, start: int, count: int, threads: int
) -> tuple[list[tuple[int, int, int]], list[int]]: ...
def combine(isa: str, operation: Any, count: int, threads: int) -> list[int]: ...
