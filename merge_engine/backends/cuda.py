"""The CUDA backend: the kernels of csrc/cuda on a stream, without torch.

Two ways of working. Tensors that are on the device already are merged there, on the caller's stream. Host memory that
was attached has a mirror on the device, byte for byte in the same place: inputs go up on one stream, are merged on
a second and results come down on a third, so that three visits are under way at a time. Between them stand events,
and nothing waits for the host: thresholds are found and used on the device.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_engine.backends import structures
from merge_engine.backends.base import Backend, level_bins, level_shift
from merge_engine.backends.cpu import address_of
from merge_engine.backends.operations import (
    Chunk,
    Column,
    Combine,
    Consensus,
    Counts,
    Found,
    Outcome,
    Rank,
    RankBand,
    Ranked,
    SolvedBand,
)
from merge_engine.dtypes import BY_NAME, DType
from merge_engine.errors import BackendError, DeviceMemoryError, NoDeviceError, NotBuiltError

if TYPE_CHECKING:
    import torch

HEADROOM = 64 << 20
"""Bytes for histograms, counters and lists beside what a run says it needs."""

OLDEST = (8, 0)
"""The first compute capability that the kernels are made for (Ampere)."""


@dataclass
class DeviceArray:
    """Elements in device memory. ``host`` is where an output is to be copied, ``owner`` keeps a tensor alive."""

    native: Any
    address: int
    count: int
    dtype: DType
    host: int | None = None
    owner: Any = None


@dataclass
class Piece:
    """Whole numbers that a kernel leaves in device memory: three of a ``Found``, or one."""

    memory: Any
    offset: int
    numbers: int
    ready: Any

    @property
    def address(self) -> int:
        """Where they are."""
        return int(self.memory.address) + self.offset


@dataclass
class _Pending:
    """Counters of an applied operation on the device, and once they came down, in pinned host memory."""

    counters: Any
    size: int
    models: int
    elects: bool
    pinned: Any = None
    done: Any = None


class CudaBackend(Backend):
    """Runs the primitives of ``csrc/cuda`` on a device.

    Raises ``BackendError`` in one line, with a remedy, when the device cannot be used.
    """

    name = "cuda"
    depth = 3

    def __init__(self, device: int = 0, native: Any = None):
        self._native = native if native is not None else _module()
        self.device = device
        self.label = _examine(self._native, device)
        self._up, self._compute, self._down, self._aside = (self._native.Stream(device) for _ in range(4))
        self._pinned = self._mirror = None
        self._ring_address = 0
        self._uploads = False
        self._spare: list[tuple[int, Any]] = []  # pinned memory for outcomes, with its size

    def attach(self, memory: memoryview, scratch: int) -> None:
        """Mirror host memory on the device, and pin it (see ``Backend.attach``)."""
        needed = len(memory) + scratch + HEADROOM
        try:
            if self._native.free_memory(self.device) < needed:
                raise MemoryError
            self._mirror = self._native.DeviceMemory(self._compute.queue, len(memory), False)
        except MemoryError:
            raise DeviceMemoryError(
                f"CUDA device {self.device} has less than {needed / 2**20:,.0f} MiB of free memory"
            ) from None
        self._compute.wait()  # the mirror is there for the other streams too
        self._ring_address = address_of(memory)
        try:
            self._pinned = self._native.PinnedMemory(self._ring_address, len(memory))
        except (RuntimeError, MemoryError):
            self._pinned = None  # a limit on locked memory: copies are slower then, and as right

    def detach(self) -> None:
        """Wait for all work and release the mirror (see ``Backend.detach``)."""
        for stream in (self._up, self._compute, self._down):
            stream.wait()
        self._pinned = self._mirror = None
        self._spare.clear()

    def array(self, memory: memoryview, dtype: DType) -> DeviceArray:
        """Send attached host memory up (see ``Backend.array``)."""
        array = self._mirrored(memory, dtype)
        if memory:
            self._native.upload(self._up.queue, array.address, address_of(memory), len(memory))
            self._uploads = True
        return array

    def output(self, memory: memoryview, dtype: DType) -> DeviceArray:
        """Make room for what will come down to attached host memory (see ``Backend.output``)."""
        array = self._mirrored(memory, dtype)
        array.host = address_of(memory)
        return array

    def tensor(self, tensor: torch.Tensor) -> DeviceArray:
        """Wrap a contiguous tensor on the device (see ``Backend.tensor``)."""
        if not self._here(tensor) or not tensor.is_contiguous():
            raise BackendError(
                f"this backend needs contiguous tensors on CUDA device {self.device}, got one on {tensor.device}"
            )
        dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
        native = structures.array(self._native, tensor.data_ptr(), dtype)
        return DeviceArray(native, tensor.data_ptr(), tensor.numel(), dtype, owner=tensor)

    def fetch(self, value: Any) -> Any:
        """Wait for what a handle stands for (see ``Backend.fetch``)."""
        match value:
            case _Pending():
                return self._outcome(value)
            case Piece():
                value.ready.hold_back(self._aside.queue)  # not behind what was asked for since
                data = self._native.read(self._aside.queue, value.address, 8 * value.numbers)
                numbers = struct.unpack(f"<{value.numbers}Q", data)
                return Found(*numbers) if value.numbers == 3 else numbers[0]
            case _ if isinstance(value, self._native.Event):
                value.wait()
                return None
        return value

    def mark(self) -> Any:
        """Mark the end of what was asked for so far (see ``Backend.mark``)."""
        self._join_uploads()
        return self._native.Event(self._queue())

    def new_histograms(self, level: int, slots: int) -> Any:
        """Make empty histograms (see ``Backend.new_histograms``)."""
        return self._native.DeviceMemory(self._queue(), 8 * level_bins(level) * slots, True)

    def histogram(self, chunk: Chunk, level: int, columns: Sequence[Column], histograms: Any) -> None:
        """Count magnitude keys (see ``Backend.histogram``)."""
        structures.check(chunk)
        self._join_uploads()
        native = [
            self._native.Column(
                chunk.models[column.model].native,
                _address(column.within),
                histograms.address + 8 * level_bins(level) * column.slot,
            )
            for column in columns
        ]
        shift = level_shift(chunk.working, level)
        working = structures.dtype(self._native, chunk.working)
        self._native.histogram(self._queue(), chunk.base.native, native, working, shift, chunk.count)

    def select(self, histograms: Any, level: int, ranks: Sequence[Rank]) -> list[Piece]:
        """Find keys by rank, on the device (see ``Backend.select``)."""
        size = self._native.FOUND_BYTES
        found = self._native.DeviceMemory(self._queue(), size * len(ranks), False)
        queries = [
            self._native.RankQuery(histograms.address + 8 * level_bins(level) * slot, _address(within), rank)
            for slot, rank, within in ranks
        ]
        self._native.select(self._queue(), queries, level_bins(level), found.address)
        ready = self._native.Event(self._queue())
        return [Piece(found, size * i, 3, ready) for i in range(len(ranks))]

    def bands(self, bands: Sequence[RankBand], working: DType) -> list[SolvedBand]:
        """Turn ranks into masks, on the device (see ``Backend.bands``)."""
        size = self._native.SOLVED_BYTES
        solved = self._native.DeviceMemory(self._queue(), size * len(bands), False)
        queries = [
            self._native.BandQuery(
                structures.rank_band(self._native, band), _address(band.low), _address(band.high)
            )
            for band in bands
        ]
        working_ = structures.dtype(self._native, working)
        self._native.solve_bands(self._queue(), queries, working_, solved.address)
        ready = self._native.Event(self._queue())
        result = []
        for i, band in enumerate(bands):
            kept = Piece(solved, size * i + self._native.KEPT_OFFSET, 1, ready) if band.slack > 0 else None
            result.append(SolvedBand(Piece(solved, size * i, 0, ready), kept))
        return result

    def locate(self, chunk: Chunk, model: int, key: int, nth: int) -> tuple[int, int | None]:
        """Find the n-th occurrence of a key; waits for the device (see ``Backend.locate``)."""
        structures.check(chunk)
        self._join_uploads()
        located = self._native.DeviceMemory(self._queue(), 16, False)
        self._native.locate(
            self._queue(),
            chunk.base.native,
            chunk.models[model].native,
            structures.dtype(self._native, chunk.working),
            key,
            nth,
            chunk.count,
            located.address,
        )
        total, offset = struct.unpack("<2Q", self._native.read(self._queue(), located.address, 16))
        return total, offset if offset != 2**64 - 1 else None

    def l1_norms(
        self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool, sums: list[float]
    ) -> list[float]:
        """Sum magnitudes; waits for the device (see ``Backend.l1_norms``)."""
        structures.check(chunk)
        self._join_uploads()
        native, _thresholds = self._masks(chunk, masks)
        memory = self._send(struct.pack(f"<{len(sums)}d", *sums))
        self._native.l1_norms(
            self._queue(),
            chunk.base.native,
            [model.native for model in chunk.models],
            native,
            structures.dtype(self._native, chunk.working),
            storage_rounding,
            chunk.start,
            chunk.count,
            memory.address,
        )
        result = self._native.read(self._queue(), memory.address, 8 * len(sums))
        return list(struct.unpack(f"<{len(sums)}d", result))

    def gram(self, chunk: Chunk, sums: list[float]) -> list[float]:
        """Sum inner products; waits for the device (see ``Backend.gram``)."""
        structures.check(chunk)
        self._join_uploads()
        inputs = ([chunk.base] if chunk.base is not None else []) + chunk.models
        memory = self._send(struct.pack(f"<{len(sums)}d", *sums))
        working = structures.dtype(self._native, chunk.working)
        arrays = [array.native for array in inputs]
        self._native.gram(self._queue(), arrays, working, chunk.count, memory.address)
        result = self._native.read(self._queue(), memory.address, 8 * len(sums))
        return list(struct.unpack(f"<{len(sums)}d", result))

    def consensus(self, chunk: Chunk, operation: Consensus, output: DeviceArray) -> _Pending:
        """Merge task vectors (see ``Backend.consensus``)."""
        structures.check(chunk, output)
        self._join_uploads()
        models = len(chunk.models)
        masks, _thresholds = self._masks(chunk, [entry.mask for entry in operation.entries])
        native = structures.consensus(self._native, chunk, operation, output, masks)
        pending = self._pending(models, 4 * models + 2, True)
        counts = pending.counters.address
        self._native.consensus(
            self._queue(), native, chunk.start, chunk.count, counts, counts + 8 * 3 * models
        )
        return self._bring_down(pending, output)

    def combine(self, chunk: Chunk, operation: Combine, output: DeviceArray) -> _Pending:
        """Write a linear combination (see ``Backend.combine``)."""
        structures.check(chunk, output)
        self._join_uploads()
        models = len(chunk.models)
        native = structures.combine(self._native, chunk, operation, output)
        pending = self._pending(models, models + 1, False)
        self._native.combine(self._queue(), native, chunk.count, pending.counters.address)
        return self._bring_down(pending, output)

    def _queue(self) -> Any:
        """The stream to work on: our own while host memory is attached, else the caller's."""
        if self._mirror is not None:
            return self._compute.queue
        return self._native.Queue(self.device, self._callers_stream())

    def _callers_stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _here(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda" and tensor.device.index == self.device

    def _mirrored(self, memory: memoryview, dtype: DType) -> DeviceArray:
        if self._mirror is None:
            raise BackendError("the cuda backend takes host memory only while it is attached")
        address = self._mirror.address + (address_of(memory) - self._ring_address if memory else 0)
        native = structures.array(self._native, address, dtype)
        return DeviceArray(native, address, len(memory) // dtype.itemsize, dtype)

    def _join_uploads(self) -> None:
        """Let the kernels that follow wait for the copies so far."""
        if self._uploads:
            self._native.Event(self._up.queue).hold_back(self._compute.queue)
            self._uploads = False

    def _masks(self, chunk: Chunk, masks: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Native masks, and memory that they point to, which must outlive the kernel's launch."""
        result, held = [], []
        for model, mask in enumerate(masks):
            if isinstance(mask, Piece):
                native = self._native.Mask()
                native.set_solved(mask.address)
            else:
                native = structures.mask(self._native, mask)
            if isinstance(mask, Ranked):
                held.append(self._rank_thresholds(chunk, model, mask))
                native.set_thresholds(held[-1].address)
            result.append(native)
        return result, held

    def _rank_thresholds(self, chunk: Chunk, model: int, mask: Ranked) -> Any:
        thresholds = self._native.DeviceMemory(self._queue(), 4 * chunk.count, False)
        self._native.rank_thresholds(
            self._queue(),
            chunk.base.native,
            chunk.models[model].native,
            structures.dtype(self._native, chunk.working),
            chunk.line.length,
            chunk.line.stride,
            mask.density,
            mask.epsilon,
            chunk.count,
            thresholds.address,
        )
        return thresholds

    def _pending(self, models: int, counters: int, elects: bool) -> _Pending:
        memory = self._native.DeviceMemory(self._queue(), 8 * counters, True)
        return _Pending(memory, 8 * counters, models, elects)

    def _send(self, data: bytes) -> Any:
        """A few bytes in device memory."""
        memory = self._native.DeviceMemory(self._queue(), len(data), False)
        source = memoryview(bytearray(data))
        self._native.upload(self._queue(), memory.address, address_of(source), len(data))
        return memory

    def _bring_down(self, pending: _Pending, output: DeviceArray) -> _Pending:
        """Copy the output and the counters to the host once they are there. Resident tensors stay."""
        if output.host is None:
            return pending
        down = self._down.queue
        self._native.Event(self._compute.queue).hold_back(down)
        if output.count:
            self._native.download(down, output.host, output.address, output.count * output.dtype.itemsize)
        pending.pinned = self._take_pinned(pending.size)
        self._native.download(down, pending.pinned[1].address, pending.counters.address, pending.size)
        pending.done = self._native.Event(down)
        return pending

    def _take_pinned(self, size: int) -> tuple[int, Any]:
        for i, (capacity, _) in enumerate(self._spare):
            if capacity >= size:
                return self._spare.pop(i)
        return size, self._native.PinnedMemory(size)

    def _outcome(self, pending: _Pending) -> Outcome:
        if pending.done is None:
            data = self._native.read(self._queue(), pending.counters.address, pending.size)
        else:
            pending.done.wait()
            data = ctypes.string_at(pending.pinned[1].address, pending.size)
            self._spare.append(pending.pinned)
        numbers = struct.unpack(f"<{pending.size // 8}Q", data)
        if not pending.elects:
            return Outcome((), (0, *numbers[:-1]), numbers[-1])
        n = pending.models
        counts = tuple(Counts(*numbers[3 * i : 3 * i + 3]) for i in range(n))
        return Outcome(counts, numbers[3 * n : -1], numbers[-1])


def _module() -> Any:
    try:
        import merge_engine._cuda as native
    except ImportError:
        raise NotBuiltError(
            "merge_engine was built without CUDA: install nvcc (the CUDA toolkit) and build it again, or use "
            "the triton backend"
        ) from None
    return native


def _examine(native: Any, device: int) -> str:
    """What the device is. Raises ``BackendError`` if it cannot be used."""
    try:
        found = native.devices()
    except RuntimeError as error:
        missing = "no NVIDIA driver" in str(error)
        raise (NoDeviceError if missing else BackendError)(f"CUDA cannot be used: {error}") from None
    if not found:
        raise NoDeviceError("there is no CUDA device (CUDA_VISIBLE_DEVICES may hide it)")
    if device >= len(found):
        raise BackendError(f"there is no CUDA device {device}, only 0 to {len(found) - 1}")
    name, major, minor, memory = found[device]
    if (major, minor) < OLDEST:
        raise BackendError(
            f"CUDA device {device} ({name}, compute capability {major}.{minor}) is too old: "
            f"{OLDEST[0]}.{OLDEST[1]} or newer is needed"
        )
    return f"{name}, sm_{major}{minor}, {memory >> 30} GiB"


def _address(piece: Piece | None) -> int:
    return 0 if piece is None else piece.address
