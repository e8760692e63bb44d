"""The CUDA backend: the kernels of csrc/cuda on a stream, without torch.

Two ways of working. Tensors that are on the device already are merged there, on the caller's stream. Attached memory
is filled from the host on one stream, merged on a second and brought to the host on a third, so that several visits
are under way at a time. Thresholds are found and used on the device, and no kernel waits for the host.

What is asked for is written down first and launched at once, or together with what belongs to it.
"""

from __future__ import annotations

import importlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from merge_engine.backends.base import Backend
from merge_engine.backends.cuda.batch import Batch
from merge_engine.backends.cuda.handles import (
    DeviceArray,
    DeviceCounts,
    Pending,
    PendingFound,
    PendingOutcome,
    PendingOverlaps,
    PendingSums,
    Results,
)
from merge_engine.backends.cuda.link import DeviceLink
from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    Found,
    FoundBand,
    KeyColumn,
    Line,
    Nearswap,
    Rank,
    Score,
    Scored,
    SolvedBand,
    Sought,
    Subject,
    key_dtype,
)
from merge_engine.backends.statistics import KeyTable
from merge_engine.backends.structures import Structures, check, check_combination, check_lines
from merge_engine.dtypes import DType, of_torch
from merge_engine.errors import BackendError, DeviceMemoryError, NoDeviceError, NotBuiltError

if TYPE_CHECKING:
    import torch

    from merge_engine._cuda import Native, Queue

OLDEST = (8, 0)
"""The first compute capability that the kernels are made for (Ampere)."""


class CudaBackend(Backend):
    """Runs the primitives of ``csrc/cuda`` on a device.

    Raises ``BackendError`` in one line, with a remedy, when the device cannot be used.
    """

    name = "cuda"
    depth = 3
    has_link = True

    def __init__(self, device: int = 0, native: Native | None = None):
        self._native = native if native is not None else _module()
        self._structures = Structures(self._native)
        self.device = device
        self.tensors_on = f"cuda:{device}"
        self.label = _examine(self._native, device)
        try:
            self._link = DeviceLink(self._native, device)
            self._aside = self._native.Queue(device)
        except (MemoryError, RuntimeError) as error:  # full, or another process has it for itself
            reason = "it has no free memory" if isinstance(error, MemoryError) else error
            raise BackendError(f"CUDA device {device} ({self.label}) cannot be used now: {reason}") from None
        self._batch = self._new_batch()
        self._more_to_come = False

    def attach(self, nbytes: int, scratch: int, staging: memoryview) -> memoryview:
        """Take memory of the device (see ``Backend.attach``)."""
        return self._link.attach(nbytes, scratch, staging)

    def detach(self) -> None:
        """Wait for all work and release the memory (see ``Backend.detach``)."""
        self._link.detach()

    def upload(self, source: memoryview, target: memoryview) -> None:
        """Copy to the device (see ``Backend.upload``)."""
        self._link.upload(source, target)

    def download(self, source: memoryview, target: memoryview) -> None:
        """Copy from the device (see ``Backend.download``)."""
        self._link.download(source, target)

    def free_memory(self) -> int:
        """Bytes that nobody has taken, other processes included (see ``Backend.free_memory``)."""
        return self._native.free_memory(self.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Launch what is asked for inside kind by kind, for all tensors at once (see ``Backend.together``)."""
        self._more_to_come = True
        try:
            yield
            self._launch()
        finally:
            self._more_to_come = False
            self._batch = self._new_batch()

    def array(self, memory: memoryview, dtype: DType) -> DeviceArray:
        """Take a piece of the attached memory (see ``Backend.array``)."""
        address = self._link.address(memory)
        native = self._native.Array(address=address, dtype=self._structures.dtype(dtype))
        return DeviceArray(native, address, len(memory) // dtype.itemsize, dtype)

    def tensor(self, tensor: torch.Tensor) -> DeviceArray:
        """Wrap a contiguous tensor on the device (see ``Backend.tensor``)."""
        if not self._here(tensor) or not tensor.is_contiguous():
            raise BackendError(
                f"this backend needs contiguous tensors on CUDA device {self.device}, got one on {tensor.device}"
            )
        dtype = of_torch(tensor.dtype)
        assert dtype is not None, "operands have types of checkpoints"
        address = tensor.data_ptr()
        native = self._native.Array(address=address, dtype=self._structures.dtype(dtype))
        return DeviceArray(native, address, tensor.numel(), dtype, owner=tensor)

    def fetch(self, value: Any) -> Any:
        """Wait for what a handle stands for (see ``Backend.fetch``)."""
        if isinstance(value, DeviceCounts):
            return self._tables(value)
        if not isinstance(value, Pending | Results):
            return value
        results = value if isinstance(value, Results) else value.piece.results
        if results is self._batch.results:
            self._launch()
        if isinstance(value, Results):
            assert value.ready is not None, "launched just now, or before"
            value.ready.wait()
            return None
        return value.value(results.data(self._native, self._aside))

    def mark(self) -> Results:
        """Mark the end of what was asked for so far (see ``Backend.mark``)."""
        results = self._batch.results
        self._asked()
        return results

    def new_counts(self, level: int, within: Sequence[PendingFound | Found | None]) -> DeviceCounts:
        """Make empty counts (see ``Backend.new_counts``)."""
        if not self._batch.has_room_for(level, len(within)):
            self._launch()
        counts = self._batch.new_counts(level, within)
        self._asked()
        return counts

    def count(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: DeviceCounts) -> None:
        """Count magnitude keys (see ``Backend.count``)."""
        check(chunk)
        for subject in dict.fromkeys(column.model for column in columns if not isinstance(column.model, int)):
            own = [KeyColumn(slot, 0) for slot, model in columns if model == subject]
            self._batch.count(self._scores(chunk, subject), own, counts)
        of_models = [column for column in columns if isinstance(column.model, int)]
        if of_models:
            self._batch.count(chunk, of_models, counts)
        self._asked()

    def find(self, counts: DeviceCounts, ranks: Sequence[Rank]) -> list[Any]:
        """Find keys by rank, on the device (see ``Backend.find``)."""
        found = self._batch.find(counts, ranks)
        self._asked()
        return list(found)

    def find_all(self, chunk: Chunk, level: int, sought: Sequence[Sought]) -> list[list[Any]]:
        """Find keys by rank, of large chunks with the help of a sample (see ``Backend.find_all``)."""
        check(chunk)
        found: list[list[Any]] = []
        if all(isinstance(one.model, int) for one in sought):
            found += self._batch.find_all(chunk, level, sought)
        else:
            for one in sought:
                over, model = (
                    (chunk, one.model) if isinstance(one.model, int) else (self._scores(chunk, one.model), 0)
                )
                found += self._batch.find_all(over, level, [one._replace(model=model)])
        self._asked()
        return found

    def bands(self, bands: Sequence[FoundBand], working: DType) -> list[SolvedBand]:
        """Turn ranks into masks, on the device (see ``Backend.bands``)."""
        solved = self._batch.bands(bands, working)
        self._asked()
        return solved

    def consensus(self, chunk: Chunk, operation: Consensus, output: DeviceArray) -> PendingOutcome:
        """Merge task vectors (see ``Backend.consensus``)."""
        check(chunk, output)
        self._score_masks(chunk, [entry.mask for entry in operation.entries])
        outcome = self._batch.consensus(chunk, operation, output)
        self._asked()
        return outcome

    def combine(self, chunk: Chunk, operation: Combine, output: DeviceArray) -> PendingOutcome:
        """Write a linear combination (see ``Backend.combine``)."""
        check_combination(chunk, operation, output)
        outcome = self._batch.combine(chunk, operation, output)
        self._asked()
        return outcome

    def nearswap(self, chunk: Chunk, operation: Nearswap, output: DeviceArray) -> PendingOutcome:
        """Move the base to the model where they are near (see ``Backend.nearswap``)."""
        check(chunk, output)
        outcome = self._batch.nearswap(chunk, operation, output)
        self._asked()
        return outcome

    def locate(self, chunk: Chunk, model: Subject, key: int, nth: int) -> tuple[int, int | None]:
        """Find the n-th occurrence of a key; waits for the device (see ``Backend.locate``)."""
        check(chunk)
        if not isinstance(model, int):
            chunk, model = self._scores(chunk, model), 0
        self._launch()
        with self._enough_memory():
            located = self._native.DeviceMemory(self._queue(), nbytes=16, zero=False)
            self._native.locate(
                self._queue(),
                base=chunk.base.native,
                model=chunk.models[model].native,
                working=self._structures.dtype(chunk.working),
                key=key,
                nth=nth,
                count=chunk.count,
                located=located.address,
            )
        total, offset = struct.unpack("<2Q", self._native.read(self._queue(), located, at=0, nbytes=16))
        return total, offset if offset != 2**64 - 1 else None

    def l1_norms(self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool) -> PendingSums:
        """Sum magnitudes, on the device (see ``Backend.l1_norms``)."""
        return self._sums(chunk, masks, storage_rounding, squared=False)

    def squares(self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool) -> PendingSums:
        """Sum squares, on the device (see ``Backend.squares``)."""
        return self._sums(chunk, masks, storage_rounding, squared=True)

    def _sums(self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool, squared: bool) -> PendingSums:
        check(chunk)
        self._score_masks(chunk, masks)
        sums = self._batch.sums(chunk, masks, storage_rounding, squared)
        self._asked()
        return sums

    def overlaps(self, chunk: Chunk, masks: Sequence[Any]) -> PendingOverlaps:
        """Count what models keep alone and together, on the device (see ``Backend.overlaps``)."""
        check(chunk)
        counts = self._batch.overlaps(chunk, masks)
        self._asked()
        return counts

    def _score_masks(self, chunk: Chunk, masks: Sequence[Any]) -> None:
        """Have the scores ready that masks look at."""
        for mask in masks:
            if isinstance(mask, Scored):
                self._scores(chunk, mask.score)

    def _scores(self, chunk: Chunk, score: Score) -> Chunk:
        """The scores of a chunk as the only model of another, over zeros. The chunk remembers them."""
        noted: dict[Score, Chunk] = chunk.noted or {}
        if score not in noted:
            real = key_dtype(score, chunk.working)
            nbytes = -(-chunk.count * real.itemsize // 16) * 16
            with self._enough_memory():
                memory = self._native.DeviceMemory(self._queue(), nbytes=2 * max(nbytes, 16), zero=True)
            zeros, scores = (
                DeviceArray(
                    self._native.Array(address=address, dtype=self._structures.dtype(real)),
                    address,
                    chunk.count,
                    real,
                    owner=memory,
                )
                for address in (memory.address, memory.address + nbytes)
            )
            self._batch.score(chunk, score, scores)
            noted = chunk.noted = {
                **noted,
                score: Chunk([zeros, scores], True, real, chunk.start, chunk.count),
            }
        return noted[score]

    def gram(self, chunk: Chunk, of_deltas: bool = False, line: Line | None = None) -> PendingSums:
        """Sum inner products, on the device (see ``Backend.gram``)."""
        check_lines(chunk, line)
        sums = self._batch.gram(chunk, of_deltas, line)
        self._asked()
        return sums

    def _tables(self, counts: DeviceCounts) -> list[KeyTable]:
        """Wait for all that was counted, and what it was counted within."""
        self._launch()
        assert counts.memory is not None, "launched just now, or before"
        data = self._native.read(self._queue(), counts.memory, at=counts.offset, nbytes=counts.nbytes)
        size = counts.nbytes // max(len(counts.within), 1)
        return [
            KeyTable(
                counts.level,
                None if within is None else self.fetch(within).key,
                array("Q", data[slot * size : (slot + 1) * size]),
            )
            for slot, within in enumerate(counts.within)
        ]

    def _asked(self) -> None:
        if not self._more_to_come:
            self._launch()

    def _launch(self) -> None:
        """Hand over what was asked for so far."""
        batch, self._batch = self._batch, self._new_batch()
        queue = self._queue()
        with self._enough_memory():
            batch.launch(queue)
        batch.results.ready = self._native.Event(queue)

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Raise ``DeviceMemoryError`` when there is too little memory for what masks and counts take."""
        try:
            yield
        except MemoryError:
            raise DeviceMemoryError(
                f"CUDA device {self.device} ran out of memory; give the merge less of it (memory), end what "
                "else uses the device, or merge on the CPU"
            ) from None

    def _new_batch(self) -> Batch:
        return Batch(self._native, self._structures)

    def _queue(self) -> Queue:
        """The stream to work on: our own while memory is attached, else the caller's."""
        if self._link.attached:
            return self._link.compute
        return self._native.Queue(self.device, self._callers_stream())

    def _callers_stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _here(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda" and tensor.device.index == self.device


def _module() -> Native:
    try:
        return cast("Native", importlib.import_module("merge_engine._cuda"))
    except ImportError:
        raise NotBuiltError(
            "merge_engine was built without CUDA: install nvcc (the CUDA toolkit) and build it again, or use "
            "the triton backend"
        ) from None


def _examine(native: Native, device: int) -> str:
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
