"""A backend that computes in this host's memory: inputs are read to where they are used, or used where they are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from merge_engine.engine.batches import Batch, Piece
from merge_engine.engine.mover import WRITE_THREADS, Mover
from merge_engine.engine.sinks import Sink
from merge_engine.observe.digests import Digests
from merge_engine.planning import Visit
from merge_engine.storage import ByteRange, aligned
from merge_engine.workers import Workers

READ_PIECE = 16 << 20
"""Bytes of one read: several threads share the reading of one large tensor."""


class InHostMemory(Mover):
    """Readers fill the input ring, or bring mapped pages into the page cache. One thread digests a recipe, in order."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._digesters = [Workers(1, "digest") for _ in range(min(len(self.targets), WRITE_THREADS))]

    def start(self) -> None:
        """See ``Mover.start``."""
        super().start()
        for digester in self._digesters:
            digester.start()

    def load(self, visits: Sequence[Visit]) -> Batch:
        """See ``Mover.load``. Inputs lie side by side, each from the start of a page."""
        ranges = [
            [operand.range(visit.start, visit.count, self.access) for operand in visit.task.inputs]
            for visit in visits
        ]
        rooms = [each.room for of_visit in ranges for each in of_visit]
        span = self.inputs.acquire(sum(map(aligned, rooms)))
        memory = iter(span.cut(rooms))
        pieces, work = [], []
        for visit, of_visit in zip(visits, ranges, strict=True):
            placed = [(each, next(memory)) for each in of_visit]
            pieces.append(Piece(visit, [each.view(room) for each, room in placed], of_visit))
            if not visit.inputs_are_there:
                work += [(each, room) for each, room in placed if each.length]
        return Batch(pieces, self._start_reading(work, together=len(visits) > 1), span)

    def used(self, batch: Batch) -> None:
        """See ``Mover.used``."""
        for piece in batch.pieces:
            for each in piece.ranges:
                each.verify()
        if not batch.pieces[0].visit.inputs_stay:
            self.readers.submit(_release, batch.pieces)

    def take_away(self, batch: Batch) -> list[Future[None]]:
        """See ``Mover.take_away``."""
        by_recipe: dict[int, list[tuple[str, int, memoryview]]] = {}
        for each in batch.merged():
            by_recipe.setdefault(each.recipe, []).append(each.piece)
        under_way = []
        for recipe, pieces in by_recipe.items():
            target = self.targets[recipe]
            assert target.sink is not None
            under_way.append(self.writers.submit(self._write, target.sink, pieces))
            if target.digests is not None:
                digester = self._digesters[recipe % len(self._digesters)]
                under_way.append(digester.submit(self._digest, target.digests, pieces))
        return under_way

    def finish(self) -> None:
        """See ``Mover.finish``."""
        super().finish()
        for digester in self._digesters:
            digester.finish()

    def close(self) -> None:
        """See ``Mover.close``."""
        super().close()
        for digester in self._digesters:
            digester.close()

    def _start_reading(self, work: list[tuple[ByteRange, memoryview]], together: bool) -> list[Future[None]]:
        """Start reads: one thread for all ranges of small visits, several threads for those of a large one."""
        if not work:
            return []
        if together:
            return [self.readers.submit(self._read_all, work)]
        return [
            self.readers.submit(self._read, each, memory, at, min(at + READ_PIECE, each.length))
            for each, memory in work
            for at in range(0, each.length, READ_PIECE)
        ]

    def _read_all(self, work: list[tuple[ByteRange, memoryview]]) -> None:
        with self.ledger.timed(self.ledger.read, sum(each.length for each, _ in work)):
            for each, memory in work:
                each.read(memory, 0, each.length)

    def _read(self, each: ByteRange, memory: memoryview, first: int, last: int) -> None:
        with self.ledger.timed(self.ledger.read, last - first):
            each.read(memory, first, last)

    def _write(self, sink: Sink, pieces: list[tuple[str, int, memoryview]]) -> None:
        with self.ledger.timed(self.ledger.write, sum(len(data) for _, _, data in pieces)):
            sink.write_batch(pieces)

    def _digest(self, digests: Digests, pieces: list[tuple[str, int, memoryview]]) -> None:
        with self.ledger.timed(self.ledger.digest, sum(len(data) for _, _, data in pieces)):
            for name, offset, data in pieces:
                digests.add(name, offset, data)


def _release(pieces: list[Piece]) -> None:
    """Release mapped pages. It takes a while, so a reader thread does it."""
    for piece in pieces:
        for each in piece.ranges:
            each.release()
