"""Visits put together in batches, with memory for their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from merge_engine.engine.ring import Span
from merge_engine.methods import Action
from merge_engine.planning import Visit
from merge_engine.storage import PAGE, ByteRange, aligned

BATCH = 4 << 20
"""Most bytes of small visits in a batch: handing each one between threads would cost more than merging it."""


@dataclass
class Piece:
    """A visit, and the memory of its inputs and its output where the backend computes.

    ``ranges`` are the byte ranges of the inputs, if they are used in this host's memory. ``output`` is empty when
    nothing is merged.
    """

    visit: Visit
    inputs: list[memoryview]
    ranges: Sequence[ByteRange] = ()
    output: memoryview = field(default_factory=lambda: memoryview(b""))

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.visit.task.name

    @property
    def offset(self) -> int:
        """The offset of the output's first byte in the tensor."""
        return self.visit.task.out.bits * self.visit.start // 8

    @property
    def last(self) -> bool:
        """Whether the visit ends with the tensor."""
        return self.visit.start + self.visit.count == self.visit.task.count


@dataclass
class Batch:
    """Visits that the backend gets together, or copies, which it does not get.

    ``reads`` are the reads under way. ``inputs`` and ``outputs`` are spans of the rings, if the batch takes any.
    """

    pieces: list[Piece]
    reads: list[Future[None]]
    inputs: Span | None = None
    outputs: Span | None = None
    users: int = 0  # of the outputs

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that no later visit uses."""
        visits = (piece.visit for piece in self.pieces if not piece.visit.inputs_stay)
        return sum(visit.task.input_bits * visit.count // 8 for visit in visits)

    @property
    def copies(self) -> bool:
        """Whether its tensors are only copied."""
        return is_copy(self.pieces[0].visit)

    def merged(self) -> list[Piece]:
        """The pieces with an output."""
        return [piece for piece in self.pieces if piece.visit.merge]


def is_copy(visit: Visit) -> bool:
    """Whether a visit copies its tensor."""
    return visit.task.action is Action.COPY


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
        if batch and (crowded or _kind(visit) != _kind(batch[-1])):
            yield batch
            batch, read, written = [], size, output
        batch.append(visit)
    if batch:
        yield batch


def output_size(visit: Visit) -> int:
    """Bytes of a visit's output, 0 if it is only measured."""
    return visit.task.out.bits * visit.count // 8 if visit.merge else 0


def _kind(visit: Visit) -> tuple[bool, bool, bool]:
    return is_copy(visit), visit.merge, visit.inputs_stay
