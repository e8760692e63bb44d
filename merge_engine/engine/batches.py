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
"""Bytes of small visits that go together: handing each one between threads would cost more than merging it."""


@dataclass
class Piece:
    """A visit, the ranges that its inputs come from, and where they are going to be.

    What is written lies in ``output``, which is empty when nothing is merged.
    """

    visit: Visit
    ranges: list[ByteRange]
    inputs: list[memoryview]
    output: memoryview = field(default_factory=lambda: memoryview(b""))


@dataclass
class Batch:
    """Visits that are handed over together. ``reads`` bring their inputs into a span, or to where they are used."""

    pieces: list[Piece]
    inputs: Span
    outputs: Span | None
    reads: list[Future[None]]
    users: int = 0  # of the outputs: writer and digester

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that are done with."""
        return sum(len(view) for piece in self.pieces for view in piece.inputs if not piece.visit.stays)

    def merged(self) -> list[tuple[str, int, memoryview]]:
        """What was merged: the tensor's name, the first byte's place in it, and the bytes."""
        return [
            (piece.visit.task.name, piece.visit.task.out.bits * piece.visit.start // 8, piece.output)
            for piece in self.pieces
            if piece.visit.merge
        ]


def in_batches(visits: Iterable[Visit], inputs: int, outputs: int) -> Iterator[list[Visit]]:
    """Visits in order, small ones that are alike together.

    A batch takes at most half of ``inputs`` and of ``outputs``, the bytes of the rings, unless it is a single visit. No
    input is counted where ``inputs`` is 0: they are used in place.
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
        if batch and (crowded or (visit.merge, visit.stays) != (batch[-1].merge, batch[-1].stays)):
            yield batch
            batch, read, written = [], size, output
        batch.append(visit)
    if batch:
        yield batch


def output_size(visit: Visit) -> int:
    """Bytes of what a visit merges."""
    return visit.task.out.bits * visit.count // 8 if visit.merge else 0


def place(batch: Sequence[Visit], access: Access, ring: Ring) -> tuple[list[Piece], Span, list[memoryview]]:
    """Memory for the inputs of a batch, side by side, so that a device takes them with one copy.

    Waits for the ring. Returns the pieces, the span, and the memory of each range in their order.
    """
    ranges = [
        [operand.range(visit.start, visit.count, access) for operand in visit.task.inputs] for visit in batch
    ]
    rooms = [each.room for some in ranges for each in some]
    span = ring.acquire(sum(map(aligned, rooms)))
    memory = list(span.cut(rooms))
    rest = iter(memory)
    pieces = [
        Piece(visit, some, [each.view(next(rest)) for each in some])
        for visit, some in zip(batch, ranges, strict=True)
    ]
    return pieces, span, memory
