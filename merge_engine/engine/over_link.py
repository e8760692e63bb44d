"""A backend with memory of its own behind a link: inputs go up and outputs come down through small staging buffers.

Each thread that reads or writes has a buffer. All of them together stay in the processor's cache: a byte that was just
read goes up from there, and one that came down is digested and written from there. Inputs go up once, into memory
where the whole chunk is measured and merged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

from merge_engine.backends import Backend
from merge_engine.backends.statistics import SUM_BLOCK
from merge_engine.engine.batches import BATCH, Batch, Merged, Piece
from merge_engine.engine.mover import READ_THREADS, WRITE_THREADS, Mover
from merge_engine.observe.digests import BLOCK
from merge_engine.operands import Operand
from merge_engine.planning import Visit
from merge_engine.storage import aligned

BUFFER = BATCH
"""Bytes of a staging buffer: all inputs of a batch, or its outputs, are one copy."""

STAGING = (READ_THREADS + WRITE_THREADS) * BUFFER
"""Bytes of all staging buffers: 24 to 96 MiB."""

IN_TURN = 4
"""Parts of a large tensor that a thread brings in turn. One by one, Python took 20 us for a part and not 12."""


class _Part(NamedTuple):
    """Some elements of an input, and where they go."""

    operand: Operand
    start: int
    target: memoryview


class OverLink(Mover):
    """Reads into ``staging`` and copies to the device; copies from the device, digests and writes."""

    def __init__(self, backend: Backend, staging: memoryview, *arguments: Any):
        super().__init__(*arguments)
        self._backend = backend
        self._buffers = deque(staging[at : at + BUFFER] for at in range(0, len(staging), BUFFER))
        self._last: dict[
            tuple[int, str], Future[None]
        ] = {}  # what digests the begun block of a recipe's tensor

    def load(self, visits: Sequence[Visit]) -> Batch:
        """See ``Mover.load``. Inputs lie side by side, each from the start of a page: small ones go up as one."""
        sizes = [operand.dtype.bits * visit.count // 8 for visit in visits for operand in visit.task.inputs]
        span = self.inputs.acquire(sum(map(aligned, sizes)))
        memory = iter(span.cut(sizes))
        pieces = [Piece(visit, [next(memory) for _ in visit.task.inputs]) for visit in visits]
        parts = [part for piece in pieces for part in _parts(piece)]
        if len(visits) > 1:
            reads = [self.readers.submit(self._bring, parts, span.memory)]
        else:
            reads = [
                self.readers.submit(self._bring_each, parts[at : at + IN_TURN])
                for at in range(0, len(parts), IN_TURN)
            ]
        return Batch(pieces, reads, span)

    def take_away(self, batch: Batch) -> list[Future[None]]:
        """See ``Mover.take_away``. Blocks of a digest are independent; the pieces of one are kept in order."""
        assert batch.outputs is not None
        merged = batch.merged()
        if len(batch.pieces) > 1:
            before = [self._last.pop(key) for each in merged if (key := _tensor(each)) in self._last]
            under_way = [self.writers.submit(self._fetch_all, merged, batch.outputs.memory, before)]
            for each in merged:
                self._note(each, under_way[-1])
            return under_way
        under_way = []
        for each in merged:
            before = [self._last.pop(_tensor(each))] if _tensor(each) in self._last else []
            first, end = each.offset, each.offset + len(each.data)
            while first < end:
                last = min((first // BLOCK + 1) * BLOCK, end)
                data = each.data[first - each.offset : last - each.offset]
                part = each._replace(offset=first, data=data)
                under_way.append(self.writers.submit(self._fetch, part, before))
                first, before = last, []
            self._note(each, under_way[-1])
        return under_way

    def _note(self, merged: Merged, digesting: Future[None]) -> None:
        """Remember what digests the begun block at the end of a piece, for the piece after it."""
        if not merged.last and (merged.offset + len(merged.data)) % BLOCK:
            self._last[_tensor(merged)] = digesting

    @contextmanager
    def _buffer(self) -> Iterator[memoryview]:
        """A buffer that nobody uses; there are as many as threads. The one that was used last is still in the cache."""
        buffer = self._buffers.pop()
        try:
            yield buffer
        finally:
            self._buffers.append(buffer)

    def _bring_each(self, parts: Sequence[_Part]) -> None:
        """Bring parts of a large tensor one after the other."""
        for part in parts:
            self._bring([part], part.target)

    def _bring(self, parts: Sequence[_Part], target: memoryview) -> None:
        """Read parts, each to the start of a page, and copy them to ``target``."""
        nbytes = sum(len(part.target) for part in parts)
        with self._buffer() as buffer:
            at = 0
            with self.ledger.timed(self.ledger.read, nbytes):
                for operand, start, room in parts:
                    operand.read_into(buffer[at : at + len(room)], start, self.access.files, self.access.way)
                    at += aligned(len(room))
            with self.ledger.timed(self.ledger.up, nbytes):
                self._backend.upload(buffer[: len(target)], target)

    def _fetch(self, merged: Merged, before: Sequence[Future[None]]) -> None:
        """Copy bytes of a block from the device, digest and write them."""
        _wait_for(before)
        for at in range(0, len(merged.data), BUFFER):
            with self._buffer() as buffer:
                part = merged.data[at : at + BUFFER]
                self._come_down(
                    part, buffer, [merged._replace(offset=merged.offset + at, data=buffer[: len(part)])]
                )

    def _fetch_all(
        self, merged: Sequence[Merged], source: memoryview, before: Sequence[Future[None]]
    ) -> None:
        """Copy the outputs of small visits from the device as one, digest and write them."""
        _wait_for(before)
        with self._buffer() as buffer:
            at, outputs = 0, []
            for each in merged:
                outputs.append(each._replace(data=buffer[at : at + len(each.data)]))
                at += aligned(len(each.data))
            self._come_down(source, buffer, outputs)

    def _come_down(self, source: memoryview, buffer: memoryview, outputs: Sequence[Merged]) -> None:
        """Copy to a buffer, and digest and write the outputs in it."""
        with self.ledger.timed(self.ledger.down, sum(len(each.data) for each in outputs)):
            self._backend.download(source, buffer[: len(source)])
        by_recipe: dict[int, list[tuple[str, int, memoryview]]] = {}
        for each in outputs:
            by_recipe.setdefault(each.recipe, []).append(each.piece)
        for recipe, pieces in by_recipe.items():
            target = self.targets[recipe]
            nbytes = sum(len(data) for _, _, data in pieces)
            if target.digests is not None:
                with self.ledger.timed(self.ledger.digest, nbytes):
                    for name, offset, data in pieces:
                        target.digests.add(name, offset, data)
            assert target.sink is not None
            with self.ledger.timed(self.ledger.write, nbytes):
                target.sink.write_batch(pieces)


def _tensor(merged: Merged) -> tuple[int, str]:
    return merged.recipe, merged.name


def _wait_for(before: Sequence[Future[None]]) -> None:
    """Wait for what digests earlier bytes of the same blocks. It was begun earlier, so it waits for no later thread."""
    for each in before:
        each.exception()


def _parts(piece: Piece) -> Iterator[_Part]:
    """The inputs of a visit, cut into parts that fit in a buffer."""
    visit = piece.visit
    for operand, memory in zip(visit.task.inputs, piece.inputs, strict=True):
        bits = operand.dtype.bits
        step = BUFFER * 8 // bits // SUM_BLOCK * SUM_BLOCK
        for at in range(0, visit.count, step):
            count = min(step, visit.count - at)
            target = memory[bits * at // 8 : bits * (at + count) // 8]
            yield _Part(operand, visit.start + at, target)
