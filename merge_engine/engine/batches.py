"""Visits put together in batches, with memory for their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from merge_engine.engine.ring import Ring, Span
from merge_engine.operands import Access
from merge_engine.planning import Visit
from merge_engine.storage import PAGE, ByteRange, aligned

BATCH = 4 << 20
"""Most bytes of small visits in a batch: handing each one between threads would cost more than merging it."""


@dataclass
class Piece:
    """A visit, the byte ranges of its inputs, and the memory that they are read into (or used in).

    ``output`` is memory for the merged bytes; it is empty when nothing is merged.
    """

    visit: Visit
    ranges: list[ByteRange]
    inputs: list[memoryview]
    output: memoryview = field(default_factory=lambda: memoryview(b""))


@dataclass
class Batch:
    """Visits that the backend gets together.

    ``reads`` are the reads under way: into the span ``inputs`` of the ring, or of mapped pages into the page cache.
    """

    pieces: list[Piece]
    inputs: Span
    outputs: Span | None
    reads: list[Future[None]]
    users: int = 0  # of the outputs: writer and digester

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that no later visit uses."""
        return sum(len(view) for piece in self.pieces for view in piece.inputs if not piece.visit.inputs_stay)

    def merged(self) -> list[tuple[str, int, memoryview]]:
        """The merged pieces: the tensor's name, the offset of the first byte in it, and the bytes."""
        return [
            (piece.visit.task.name, piece.visit.task.out.bits * piece.visit.start // 8, piece.output)
            for piece in self.pieces
            if piece.visit.merge
        ]


def in_batches(visits: Iterable[Visit], inputs: int, outputs: int) -> Iterator[list[Visit]]:
    """Visits in order, consecutive small ones of the same kind in one batch.

    A batch takes at most half of ``inputs`` and of ``outputs``, the bytes of the rings, unless it is a single
    visit. If ``inputs`` is 0, they are used in place and do not count.
    """
    batch: list[Visit] = []
    read = written = 0
    for visit in visits:
        size = visit.task.input_bits * visit.count // 8
        if inputs:
            size += len(visit.task.inputs) * PAGE  # each may end within a page
        output = aligned(output_size(visit))
        read, written = read + size, written + output
        crowded = read + written > BATCH or 2 * written > outputs or (inputs > 0 and 2 * read > inputs)
        if batch and (
            crowded or (visit.merge, visit.inputs_stay) != (batch[-1].merge, batch[-1].inputs_stay)
        ):
            yield batch
            batch, read, written = [], size, output
        batch.append(visit)
    if batch:
        yield batch


def output_size(visit: Visit) -> int:
    """Bytes of a visit's output, 0 if it is only measured."""
    return visit.task.out.bits * visit.count // 8 if visit.merge else 0


def place(batch: Sequence[Visit], access: Access, ring: Ring) -> tuple[list[Piece], Span, list[memoryview]]:
    """Memory for the inputs of a batch, side by side, so that one copy moves them to a device.

    Waits until the ring has room. Returns the pieces, the span, and the memory of each range, in the order of the
    ranges. Raises ``RingClosed`` when the run is stopped, and ``CheckpointError`` for a file that cannot be opened
    or has changed.
    """
    ranges = [
        [operand.range(visit.start, visit.count, access) for operand in visit.task.inputs] for visit in batch
    ]
    rooms = [each.room for of_visit in ranges for each in of_visit]
    span = ring.acquire(sum(map(aligned, rooms)))
    memory = list(span.cut(rooms))
    rest = iter(memory)
    pieces = [
        Piece(visit, of_visit, [each.view(next(rest)) for each in of_visit])
        for visit, of_visit in zip(batch, ranges, strict=True)
    ]
    return pieces, span, memory
