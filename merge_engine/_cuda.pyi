"""Types of the CUDA module, see csrc/cuda/binding.cpp.

Addresses are those of device memory, 0 where there is nothing. Calls that take many tensors launch them together.
"""

from collections.abc import Sequence
from typing import Protocol, overload

import merge_engine._cuda as own
from merge_engine._native_types import DType as DType
from merge_engine._native_types import Election as Election
from merge_engine._native_types import Line as Line
from merge_engine._native_types import Mask as Mask
from merge_engine._native_types import NativeTypes
from merge_engine._native_types import RankBand as RankBand

class Queue:
    @overload
    def __init__(self, device: int) -> None: ...
    @overload
    def __init__(self, device: int, stream: int) -> None: ...
    def wait(self) -> None: ...

class Event:
    def __init__(self, queue: Queue) -> None: ...
    def wait(self) -> None: ...

class DeviceMemory:
    @overload
    def __init__(self, queue: Queue, nbytes: int, zero: bool) -> None: ...
    @overload
    def __init__(self, queue: Queue, contents: bytes) -> None: ...
    @property
    def address(self) -> int: ...

class HostMemory:
    def __init__(self, memory: memoryview) -> None: ...
    @property
    def address(self) -> int: ...

class Array:
    def __init__(self, address: int, dtype: DType) -> None: ...

class HistogramColumn:
    def __init__(self, model: Array, within: int, counts: int) -> None: ...

class HistogramCall:
    def __init__(
        self, base: Array, columns: Sequence[HistogramColumn], working: DType, level: int, count: int
    ) -> None: ...

class RankQuery:
    def __init__(self, counts: int, within: int, rank: int, found: int) -> None: ...

class SoughtColumn:
    def __init__(self, model: Array, within: int, ranks: Sequence[tuple[int, int]]) -> None: ...

class FindCall:
    def __init__(self, base: Array, columns: Sequence[SoughtColumn], working: DType, count: int) -> None: ...

class BandQuery:
    def __init__(self, band: RankBand, working: DType, low: int, high: int, solved: int) -> None: ...

class NormCall:
    def __init__(
        self,
        base: Array,
        models: Sequence[Array],
        masks: Sequence[Mask],
        working: DType,
        storage_rounding: bool,
        squared: bool,
        start: int,
        count: int,
        sums: int,
    ) -> None: ...

class OverlapCall:
    def __init__(
        self,
        base: Array,
        models: Sequence[Array],
        masks: Sequence[Mask],
        working: DType,
        start: int,
        count: int,
        counts: int,
    ) -> None: ...

class ScoreCall:
    @staticmethod
    def variance(
        inputs: Sequence[Array], storage_rounding: bool, working: DType, count: int, scores: int
    ) -> ScoreCall: ...
    @staticmethod
    def divergence(
        inputs: Sequence[Array], length: int, working: DType, count: int, scores: int
    ) -> ScoreCall: ...

class NoteCall:
    def __init__(self, scores: Array, mask: Mask, start: int, count: int, notes: int) -> None: ...

class NearswapCall:
    def __init__(
        self,
        base: Array,
        model: Array,
        output: Array,
        threshold: float,
        storage_rounding: bool,
        working: DType,
        count: int,
        non_finite: int,
    ) -> None: ...

class GramCall:
    def __init__(
        self,
        inputs: Sequence[Array],
        working: DType,
        of_deltas: bool,
        line: Line | tuple[int, int],
        start: int,
        count: int,
        sums: int,
    ) -> None: ...

class RankCall:
    def __init__(
        self,
        base: Array,
        model: Array,
        working: DType,
        line: tuple[int, int],
        density: float,
        epsilon: float,
        count: int,
        thresholds: int,
    ) -> None: ...

class Entry:
    def __init__(
        self,
        model: Array,
        mask: Mask,
        weight: float,
        rescale: float,
        vote_slack: float,
        retain_slack: float,
    ) -> None: ...

class ConsensusCall:
    def __init__(
        self,
        base: Array,
        output: Array,
        working: DType,
        entries: Sequence[Entry],
        election: Election,
        normalize: bool,
        storage_rounding: bool,
        scale: float,
        divisor: float,
        wide: bool,
        start: int,
        count: int,
        counts: int,
        non_finite: int,
    ) -> None: ...

class CombineCall:
    def __init__(
        self,
        inputs: Sequence[Array],
        output: Array,
        coefficients: Sequence[float],
        divisor: float | None,
        fused: bool,
        rounded: bool,
        stepwise: bool,
        on_base: bool,
        line: Line | tuple[int, int],
        of_lines: int,
        working: DType,
        start: int,
        count: int,
        non_finite: int,
    ) -> None: ...

class Native(NativeTypes, Protocol):
    """The module itself, for those who are given it: tests emulate it."""

    FOUND_BYTES: int
    SOLVED_BYTES: int
    KEPT_OFFSET: int
    @property
    def Queue(self) -> type[own.Queue]: ...
    @property
    def Event(self) -> type[own.Event]: ...
    @property
    def DeviceMemory(self) -> type[own.DeviceMemory]: ...
    @property
    def HostMemory(self) -> type[own.HostMemory]: ...
    @property
    def Array(self) -> type[own.Array]: ...
    @property
    def HistogramColumn(self) -> type[own.HistogramColumn]: ...
    @property
    def HistogramCall(self) -> type[own.HistogramCall]: ...
    @property
    def RankQuery(self) -> type[own.RankQuery]: ...
    @property
    def SoughtColumn(self) -> type[own.SoughtColumn]: ...
    @property
    def FindCall(self) -> type[own.FindCall]: ...
    @property
    def BandQuery(self) -> type[own.BandQuery]: ...
    @property
    def NormCall(self) -> type[own.NormCall]: ...
    @property
    def OverlapCall(self) -> type[own.OverlapCall]: ...
    @property
    def ScoreCall(self) -> type[own.ScoreCall]: ...
    @property
    def NoteCall(self) -> type[own.NoteCall]: ...
    @property
    def NearswapCall(self) -> type[own.NearswapCall]: ...
    @property
    def GramCall(self) -> type[own.GramCall]: ...
    @property
    def RankCall(self) -> type[own.RankCall]: ...
    @property
    def Entry(self) -> type[own.Entry]: ...
    @property
    def ConsensusCall(self) -> type[own.ConsensusCall]: ...
    @property
    def CombineCall(self) -> type[own.CombineCall]: ...
    def devices(self) -> list[tuple[str, int, int, int]]: ...
    def free_memory(self, device: int) -> int: ...
    def upload(
        self,
        queue: own.Queue,
        to: own.DeviceMemory,
        to_at: int,
        source: own.HostMemory,
        source_at: int,
        nbytes: int,
    ) -> own.Event: ...
    def download(
        self,
        queue: own.Queue,
        to: own.HostMemory,
        to_at: int,
        source: own.DeviceMemory,
        source_at: int,
        nbytes: int,
    ) -> own.Event: ...
    def read(self, queue: own.Queue, memory: own.DeviceMemory, at: int, nbytes: int) -> bytes: ...
    def histogram(self, queue: own.Queue, calls: Sequence[own.HistogramCall]) -> None: ...
    def select(self, queue: own.Queue, queries: Sequence[own.RankQuery], level: int) -> None: ...
    def find_all(
        self, queue: own.Queue, calls: Sequence[own.FindCall], level: int, counts_bytes: int
    ) -> None: ...
    def solve_bands(self, queue: own.Queue, queries: Sequence[own.BandQuery]) -> None: ...
    def l1_norms(self, queue: own.Queue, calls: Sequence[own.NormCall]) -> None: ...
    def gram(self, queue: own.Queue, calls: Sequence[own.GramCall]) -> None: ...
    def rank_thresholds(self, queue: own.Queue, calls: Sequence[own.RankCall]) -> None: ...
    def consensus(self, queue: own.Queue, calls: Sequence[own.ConsensusCall]) -> None: ...
    def combine(self, queue: own.Queue, calls: Sequence[own.CombineCall]) -> None: ...
    def overlaps(self, queue: own.Queue, calls: Sequence[own.OverlapCall]) -> None: ...
    def scores(self, queue: own.Queue, calls: Sequence[own.ScoreCall]) -> None: ...
    def note_scores(self, queue: own.Queue, calls: Sequence[own.NoteCall]) -> None: ...
    def nearswap(self, queue: own.Queue, calls: Sequence[own.NearswapCall]) -> None: ...
    def locate(
        self,
        queue: own.Queue,
        base: own.Array,
        model: own.Array,
        working: DType,
        key: int,
        nth: int,
        count: int,
        located: int,
    ) -> None: ...
