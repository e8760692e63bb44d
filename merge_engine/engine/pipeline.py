"""Carry out a schedule: read ahead into one ring of memory, merge into another, write behind.

    feed     one thread: cuts the schedule into batches, waits for memory, starts the reads
    read     a few threads: fill the input ring, or bring mapped pages into the page cache
    merge    the calling thread: hands each batch to the backend; a device works on several at a time
    write    a few threads: write outputs to the sink
    digest   one thread: pieces of a tensor stay in order

The rings limit how far each stage is ahead of the next. The first error in any thread stops all of them.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from merge_engine.backends import Backend
from merge_engine.dtypes import DType
from merge_engine.engine.batches import Batch, Piece, in_batches, output_size, place
from merge_engine.engine.ring import Ring, RingClosed, Span, allocate
from merge_engine.engine.sinks import Sink
from merge_engine.engine.work import Run, Work
from merge_engine.methods import Action
from merge_engine.observe.digests import Digests
from merge_engine.observe.ledger import Ledger
from merge_engine.operands import Access
from merge_engine.planning import Schedule, Visit
from merge_engine.storage import ByteRange, aligned, cores

READ_THREADS = min(max(4, cores()), 16)
"""With fewer than four, a disk is idle between reads; copies out of the page cache keep all cores busy."""

WRITE_THREADS = min(max(2, cores() // 2), 8)
"""Writes to a RAM disk are copies by the processor, and one file takes one thread at a time."""

READ_PIECE = 16 << 20
"""Bytes of one read: several threads share the reading of one large tensor."""

_LOADED = 24
"""Most batches that are read ahead. The ring sets a lower limit, except where inputs are used in place."""

_Queue: TypeAlias = "queue.Queue[Batch | BaseException | None]"


class Pipeline:
    """One run over a schedule, whose inputs are read as ``access`` says.

    ``progress`` is called with the input bytes of each finished batch. Raises ``DeviceMemoryError`` when the
    backend's device has too little memory for the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        run: Run,
        access: Access,
        sink: Sink | None,
        digests: Digests | None,
        progress: Callable[[int], None],
    ):
        self._schedule = schedule
        self._run = run
        self._backend: Backend = run.backend
        self._access = access
        self._sink = sink
        self._digests = digests
        self._ledger: Ledger = run.ledger
        self._progress = progress
        sizes = schedule.ring_bytes
        memory = allocate(sum(sizes))
        self._inputs, self._outputs = Ring(memory[: sizes.inputs]), Ring(memory[sizes.inputs :])
        self._backend.attach(memory, schedule.scratch_bytes)
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="write")
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._lock = threading.Lock()
        self._loaded: _Queue = queue.Queue(_LOADED)
        self._stopping = False
        self._failure: BaseException | None = None  # the first one of a writer or the digester

    def carry_out(self) -> None:
        """Merge everything. Raises the first error of any thread."""
        feed = threading.Thread(target=self._feed, name="feed", daemon=True)
        feed.start()
        try:
            self._merge_all()
            self._writers.shutdown(wait=True)
            self._digester.shutdown(wait=True)
            self._raise_failure()
        finally:
            self._stopping = True
            self._inputs.close()
            self._outputs.close()
            while feed.is_alive():
                self._forget_loaded()
                feed.join(0.01)
            for pool in (self._readers, self._writers, self._digester):
                pool.shutdown(wait=True, cancel_futures=True)
            self._backend.detach()

    def _forget_loaded(self) -> None:
        """Empty the queue, so that the feeder does not wait forever to put a batch into it."""
        try:
            while True:
                self._loaded.get_nowait()
        except queue.Empty:
            pass

    def _feed(self) -> None:
        """Take memory and start the reads, one batch after the other."""
        try:
            in_place = self._schedule.budget.in_place
            for batch in in_batches(
                self._schedule.visits(), 0 if in_place else self._inputs.size, self._outputs.size
            ):
                if self._stopping:
                    return
                self._loaded.put(self._load(batch))
            self._loaded.put(None)
        except RingClosed:
            pass  # the run failed elsewhere
        except BaseException as error:
            self._loaded.put(error)

    def _load(self, visits: list[Visit]) -> Batch:
        """Start to read a batch, and take memory for its outputs."""
        pieces, span, memory = place(visits, self._access, self._inputs)
        rooms = iter(memory)
        work = [
            (each, next(rooms), piece.visit.inputs_are_there) for piece in pieces for each in piece.ranges
        ]
        reads = self._start_reading(
            [(each, room) for each, room, is_there in work if each.length and not is_there],
            together=len(visits) > 1,
        )
        outputs = None
        if any(visit.merge for visit in visits):
            sizes = [output_size(visit) for visit in visits]
            outputs = self._outputs.acquire(sum(map(aligned, sizes)))
            for piece, view in zip(pieces, outputs.cut(sizes), strict=True):
                piece.output = view
        return Batch(pieces, span, outputs, reads)

    def _start_reading(self, work: list[tuple[ByteRange, memoryview]], together: bool) -> list[Future[None]]:
        """Start reads: one thread for all ranges of small visits, several threads for those of a large one."""
        if not work:
            return []
        if together:
            return [self._readers.submit(self._read_all, work)]
        return [
            self._readers.submit(self._read, each, memory, at, min(at + READ_PIECE, each.length))
            for each, memory in work
            for at in range(0, each.length, READ_PIECE)
        ]

    def _read_all(self, work: list[tuple[ByteRange, memoryview]]) -> None:
        with self._ledger.timed(self._ledger.read, sum(each.length for each, _ in work)):
            for each, memory in work:
                each.read(memory, 0, each.length)

    def _read(self, each: ByteRange, memory: memoryview, first: int, last: int) -> None:
        with self._ledger.timed(self._ledger.read, last - first):
            each.read(memory, first, last)

    def _merge_all(self) -> None:
        """Keep as many batches in flight as the backend takes at a time."""
        under_way: deque[tuple[Batch, list[Work]]] = deque()
        while True:
            # The feeder may be waiting for memory that batches in flight hold: complete one.
            while under_way and (len(under_way) >= self._backend.depth or self._loaded.empty()):
                self._complete(*under_way.popleft())
                self._raise_failure()
            batch = self._loaded.get()
            if batch is None:
                break
            if isinstance(batch, BaseException):
                raise batch
            under_way.append((batch, self._begin(batch)))
        while under_way:
            self._complete(*under_way.popleft())

    def _begin(self, batch: Batch) -> list[Work]:
        for read in batch.reads:
            read.result()
        with self._ledger.timed(self._ledger.compute, batch.nbytes), self._backend.together():
            work = [
                Work(self._run, piece.visit, _Arrays(self._backend, piece), piece.inputs)
                for piece in batch.pieces
            ]
            for each in work:
                each.measure()
            for each, piece in zip(work, batch.pieces, strict=True):
                if piece.visit.task.action is Action.COPY:
                    each.copy(piece.output)
                else:
                    each.merge(self._target(piece))
        return work

    def _target(self, piece: Piece) -> Any:
        """The array of the backend that a visit merges into; None if it is only measured."""
        return self._backend.output(piece.output, piece.visit.task.out) if piece.visit.merge else None

    def _complete(self, batch: Batch, work: list[Work]) -> None:
        with self._ledger.timed(self._ledger.compute, 0):
            for each in work:
                each.wait()
        for piece in batch.pieces:
            for each_range in piece.ranges:
                each_range.verify()
        self._inputs.release(batch.inputs)
        if not batch.pieces[0].visit.inputs_stay:
            self._readers.submit(_let_go, batch.pieces)
        if batch.outputs is not None:
            self._take_away(batch, batch.outputs)
        self._progress(batch.nbytes)

    def _take_away(self, batch: Batch, outputs: Span) -> None:
        """Start to write and to digest the outputs."""
        batch.users = 1 if self._digests is None else 2
        self._writers.submit(self._guarded, self._write, batch, outputs)
        if self._digests is not None:
            self._digester.submit(self._guarded, self._digest, batch, outputs)

    def _guarded(self, use: Callable[[Batch], None], batch: Batch, outputs: Span) -> None:
        """Run ``use`` on a batch and keep its error; the last user of the outputs gives their memory back."""
        try:
            use(batch)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            with self._lock:
                batch.users -= 1
                unused = batch.users == 0
            if unused:
                self._outputs.release(outputs)

    def _write(self, batch: Batch) -> None:
        assert self._sink is not None
        pieces = batch.merged()
        with self._ledger.timed(self._ledger.write, sum(len(data) for _, _, data in pieces)):
            self._sink.write_batch(pieces)

    def _digest(self, batch: Batch) -> None:
        assert self._digests is not None
        pieces = batch.merged()
        with self._ledger.timed(self._ledger.digest, sum(len(data) for _, _, data in pieces)):
            for name, offset, data in pieces:
                self._digests.add(name, offset, data)

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


def _let_go(pieces: list[Piece]) -> None:
    """Release mapped pages. It takes a while, so a reader thread does it."""
    for piece in pieces:
        for each in piece.ranges:
            each.release()
