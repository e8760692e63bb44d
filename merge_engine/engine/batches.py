"""Visits put together in batches, with memory for their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from merge_engine.engine.ring import Span
from merge_engine.planning import Visit
from merge_engine.storage import PAGE, ByteRange, aligned

BATCH = 4 << 20
"""Most bytes of small visits in a batch: handing each one between threads would cost more than merging it."""


@dataclass
class Piece:
    """A visit, and the memory of its inputs and its outputs where the backend computes.

    ``ranges`` are the byte ranges of the inputs, if they are used in this host's memory. ``outputs`` are those of the
    visit's parts.
    """

    visit: Visit
    inputs: list[memoryview]
    ranges: Sequence[ByteRange] = ()
    outputs: Sequence[memoryview] = ()


class Merged(NamedTuple):
    """The merged bytes of a chunk for one recipe: its number, the tensor, and the offset of the first byte in it.

    ``last`` says that the chunk ends with the tensor.
    """

    recipe: int
    name: str
    offset: int
    data: memoryview
    last: bool

    @property
    def piece(self) -> tuple[str, int, memoryview]:
        """What a sink takes."""
        return self.name, self.offset, self.data


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

    def merged(self) -> list[Merged]:
        """What was merged, visit by visit and part by part."""
        return [
            Merged(recipe, task.name, task.out.bits * piece.visit.start // 8, data, piece.visit.ends)
            for piece in self.pieces
            for (recipe, task, _), data in zip(piece.visit.parts, piece.outputs, strict=True)
        ]


def is_copy(visit: Visit) -> bool:
    """Whether a visit copies its tensor."""
    return visit.task.copied


def in_batches(visits: Iterable[Visit], inputs: int, outputs: int) -> Iterator[list[Visit]]:
    """Visits in order, consecutive small ones of the same kind in one batch.

    A batch takes at most half of ``inputs`` and of ``outputs``, the bytes of the rings, unless it is a single
    visit. If ``inputs`` is 0, they are used in place and do not count.
    """
    batch: list[Visit] = []
    read = written = 0
    before = None
    for visit in visits:
        kind = _kind(visit)
        size = visit.task.input_bits * visit.count // 8
        if inputs:
            size += len(visit.task.inputs) * PAGE  # each may end within a page
        output = sum(map(aligned, output_sizes(visit)))
        read, written = read + size, written + output
        crowded = read + written > BATCH or 2 * written > outputs or (inputs > 0 and 2 * read > inputs)
        if batch and (crowded or kind != before):
            yield batch
            batch, read, written = [], size, output
        batch.append(visit)
        before = kind
    if batch:
        yield batch


def output_sizes(visit: Visit) -> list[int]:
    """Bytes of the outputs of a visit's parts."""
    return [part.task.out.bits * visit.count // 8 for part in visit.parts]


def _kind(visit: Visit) -> tuple[bool, bool, bool]:
    return is_copy(visit), bool(visit.parts), visit.inputs_stay
