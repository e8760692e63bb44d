"""Carry out a schedule: read ahead into one ring of memory, merge into another, write behind.

    feed     one thread: cuts the schedule into batches, waits for memory, starts the reads
    read     a few threads: bring inputs to where the backend computes (``Mover``), and copy what is only copied
    merge    the calling thread: hands each batch to the backend; a device works on several at a time
    write    a few threads: bring outputs to the sink and the digests

The rings are in the memory of the device that computes. They limit how far each stage is ahead of the next. The first
error in any thread stops all of them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeAlias

from merge_engine.backends import Backend
from merge_engine.dtypes import DType
from merge_engine.engine.batches import Batch, Piece, in_batches, is_copy, output_sizes
from merge_engine.engine.in_host_memory import InHostMemory
from merge_engine.engine.mover import Mover
from merge_engine.engine.over_link import STAGING, OverLink
from merge_engine.engine.ring import Ring, RingClosed
from merge_engine.engine.runs import Runs
from merge_engine.engine.sinks import Target
from merge_engine.engine.work import Work
from merge_engine.observe.ledger import Ledger
from merge_engine.operands import Access
from merge_engine.planning import Schedule, Visit
from merge_engine.storage import aligned, allocate
from merge_engine.workers import start

_LOADED = 24
"""Most batches that are read ahead. The ring sets a lower limit, except where inputs are used in place."""

_Queue: TypeAlias = "queue.SimpleQueue[Batch | BaseException | None]"


class Pipeline:
    """One run over a schedule, whose inputs are read as ``access`` says.

    ``targets`` take the outputs of the recipes. ``progress`` is called with the input bytes of each finished batch.
    Raises ``DeviceMemoryError`` when the backend's device has too little memory for the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        runs: Runs,
        access: Access,
        targets: Sequence[Target],
        progress: Callable[[int], None],
    ):
        self._schedule = schedule
        self._runs = runs
        self._backend: Backend = runs.backend
        self._ledger: Ledger = runs.ledger
        self._progress = progress
        has_link = self._backend.has_link
        staging = allocate(STAGING) if has_link else memoryview(b"")
        sizes = schedule.ring_bytes
        memory = self._backend.attach(sum(sizes), schedule.scratch_bytes, staging)
        self._inputs, self._outputs = Ring(memory[: sizes.inputs]), Ring(memory[sizes.inputs :])
        way = partial(OverLink, self._backend, staging) if has_link else InHostMemory
        self._mover: Mover = way(access, self._inputs, targets, self._ledger)
        self._lock = threading.Lock()
        # An interrupt inside of queue.Queue would leave its lock behind in a wrong state; SimpleQueue has none.
        self._loaded: _Queue = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each batch that may still be put
        for _ in range(_LOADED):
            self._room.put(None)
        self._starting = threading.Lock()
        self._stopping = False
        self._failure: BaseException | None = None  # the first one of what takes outputs away

    def carry_out(self) -> None:
        """Merge everything. Raises the first error of any thread."""
        feed = threading.Thread(target=self._feed, name="feed", daemon=True)
        try:
            start(feed)
            self._merge_all()
            self._mover.finish()
            self._raise_failure()
        finally:
            try:
                self._stop(feed)
            except KeyboardInterrupt:  # threads and memory go all the same
                self._stop(feed)
                raise

    def _stop(self, feed: threading.Thread) -> None:
        """End all threads, and let go of the memory."""
        with self._starting:
            self._stopping = True
        self._inputs.close()
        self._outputs.close()
        while feed.is_alive():
            self._forget_loaded()
            feed.join(0.01)
        self._mover.close()
        self._backend.detach()

    def _forget_loaded(self) -> None:
        """Empty the queue, so that the feeder does not wait forever to put a batch into it."""
        self._room.put(None)
        with contextlib.suppress(queue.Empty):
            while True:
                self._loaded.get_nowait()

    def _feed(self) -> None:
        """Take memory and start the reads, one batch after the other.

        This thread starts the others, because no interrupt from the keyboard can come between: it comes in the main
        thread. One that comes while this thread starts may find it neither alive nor ended.
        """
        try:
            with self._starting:
                if self._stopping:
                    return
                self._mover.start()
            in_place = self._schedule.budget.in_place
            for batch in in_batches(
                self._schedule.visits(), 0 if in_place else self._inputs.size, self._outputs.size
            ):
                if self._stopping:
                    return
                self._put(self._load(batch))
            self._put(None)
        except RingClosed:
            pass  # the run failed elsewhere
        except BaseException as error:
            self._loaded.put(error)

    def _put(self, batch: Batch | None) -> None:
        self._room.get()
        self._loaded.put(batch)

    def _load(self, visits: list[Visit]) -> Batch:
        """Start to read a batch, and take memory for its outputs."""
        if is_copy(visits[0]):
            for visit in visits:  # before the last byte is written, for then the shard is recorded
                for part in visit.task.parts:
                    self._runs.each[part.recipe].add(part.task, visit.count)
            return self._mover.copy(visits)
        batch = self._mover.load(visits)
        sizes = [output_sizes(visit) for visit in visits]
        if any(sizes):
            every = [size for of_visit in sizes for size in of_visit]
            batch.outputs = self._outputs.acquire(sum(map(aligned, every)))
            views = batch.outputs.cut(every)
            for piece, of_visit in zip(batch.pieces, sizes, strict=True):
                piece.outputs = [next(views) for _ in of_visit]
        return batch

    def _merge_all(self) -> None:
        """Keep as many batches in flight as the backend takes at a time."""
        under_way: deque[tuple[Batch, list[Work]]] = deque()
        while (batch := self._next(under_way)) is not None:
            under_way.append((batch, self._begin(batch)))
        while under_way:
            self._complete(*under_way.popleft())

    def _next(self, under_way: deque[tuple[Batch, list[Work]]]) -> Batch | None:
        """The next batch, None after the last. Meanwhile batches under way are completed.

        Their outputs are wanted, and the feeder may be waiting for the memory that they hold.
        """

        def complete(unless: Callable[[], bool]) -> None:
            while under_way and not unless():
                self._complete(*under_way.popleft())
                self._raise_failure()

        complete(lambda: len(under_way) < self._backend.depth and not self._loaded.empty())
        batch = self._loaded.get()
        self._room.put(None)
        if isinstance(batch, BaseException):
            raise batch
        if batch is not None:
            complete(lambda: all(read.done() for read in batch.reads))
        return batch

    def _begin(self, batch: Batch) -> list[Work]:
        for read in batch.reads:
            read.result()
        if batch.copies:
            return []
        hosts = not self._backend.has_link
        with self._ledger.timed(self._ledger.compute, batch.nbytes), self._backend.together():
            work = [
                Work(
                    self._runs,
                    piece.visit,
                    _Arrays(self._backend, piece),
                    piece.inputs if hosts else None,
                )
                for piece in batch.pieces
            ]
            for each in work:
                each.measure()
            for each, piece in zip(work, batch.pieces, strict=True):
                each.merge(*self._outputs_of(piece))
        return work

    def _outputs_of(self, piece: Piece) -> list[Any]:
        """The arrays of the backend that a visit merges into."""
        return [
            self._backend.output(view, part.task.out)
            for part, view in zip(piece.visit.parts, piece.outputs, strict=True)
        ]

    def _complete(self, batch: Batch, work: list[Work]) -> None:
        with self._ledger.timed(self._ledger.compute, 0):
            for each in work:
                each.wait()
        self._mover.used(batch)
        if batch.inputs is not None:
            self._inputs.release(batch.inputs)
        if batch.outputs is not None:
            self._take_away(batch)
        self._progress(batch.nbytes)

    def _take_away(self, batch: Batch) -> None:
        """Start to take the outputs away. The last that uses their memory gives it back."""
        under_way = self._mover.take_away(batch)
        batch.users = len(under_way)
        for each in under_way:
            each.add_done_callback(partial(self._taken, batch))

    def _taken(self, batch: Batch, future: Future[None]) -> None:
        """Keep the error of what took outputs of a batch away, and give their memory back."""
        with self._lock:
            if not future.cancelled():
                self._failure = self._failure or future.exception()
            batch.users -= 1
            unused = batch.users == 0
        if unused and batch.outputs is not None:
            self._outputs.release(batch.outputs)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class _Arrays:
    """The first ``count`` inputs of a piece as arrays of the backend, made when the object is called."""

    def __init__(self, backend: Backend, piece: Piece):
        self._backend = backend
        self._piece = piece

    def __call__(self, count: int) -> list[Any]:
        inputs = self._piece.inputs[:count]
        types: list[DType] = [operand.dtype for operand in self._piece.visit.task.inputs[:count]]
        return [self._backend.array(view, dtype) for view, dtype in zip(inputs, types, strict=True)]
