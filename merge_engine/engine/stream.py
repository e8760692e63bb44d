"""Move bytes: read ahead into a ring of memory, have each visit carried out into another, write behind.

Threads share the work: readers fill spans of one ring with the inputs of coming visits, the calling thread
hands them to the backend, writers take the outputs away from the other and one thread digests them. What is read in
place is measured by a thread of its own, while the calling thread merges what was measured before. A backend that
works on a device of its own has several visits at a time: one on its way up, one computed, one on its way down. The
rings bound them all.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from merge_engine.backends import Backend
from merge_engine.engine.ledger import Ledger
from merge_engine.engine.merging import Merger
from merge_engine.engine.plan import BATCH, Plan
from merge_engine.engine.reading import Reading
from merge_engine.engine.ring import Allowance, Ring, RingClosed, Span, allocate
from merge_engine.engine.sinks import Digests, Sink
from merge_engine.engine.visits import Visit, visits
from merge_engine.storage.memory import aligned
from merge_engine.storage.ranges import ByteRange

READ_THREADS = 4
WRITE_THREADS = 2
READ_PIECE = 16 << 20
"""Bytes of one read: several threads share the reading of one large tensor."""


@dataclass
class _Piece:
    """A visit, where its inputs come from, and where they are going to be.

    What is written lies in ``output``, which is empty when nothing is merged.
    """

    visit: Visit
    ranges: list[ByteRange]
    inputs: list[memoryview]
    output: memoryview = field(default_factory=lambda: memoryview(b""))


@dataclass
class _Batch:
    """Visits whose inputs are on their way into a span, or to where they are used in place, which ``mapped`` bytes are.

    Their outputs have another span, where anything is merged.
    """

    pieces: list[_Piece]
    inputs: Span
    mapped: int
    outputs: Span | None
    reads: list[Future[None]]
    users: int = 0  # of the outputs: writer and digester

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that are done with."""
        return sum(len(view) for piece in self.pieces for view in piece.inputs if not piece.visit.stays)


_Queue: TypeAlias = "queue.Queue[_Batch | BaseException | None]"


class Stream:
    """One run over a plan, whose inputs are read as ``reading`` says.

    ``progress`` is told how many input bytes each finished visit had.

    Raises ``DeviceMemoryError`` when the backend's device has too little memory for the plan.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        reading: Reading,
        merger: Merger,
        sink: Sink,
        digests: Digests | None,
        ledger: Ledger,
        progress: Callable[[int], None],
    ):
        self._plan = plan
        self._backend = backend
        self._reading = reading
        self._merger = merger
        self._sink = sink
        self._digests = digests
        self._ledger = ledger
        self._progress = progress
        sizes = plan.ring_bytes
        memory = allocate(sum(sizes))
        self._inputs, self._outputs = Ring(memory[: sizes.inputs]), Ring(memory[sizes.inputs :])
        self._mapped = Allowance(plan.memory)  # it takes no memory that the system could not have back
        backend.attach(memory, plan.scratch_bytes)  # let go of by run
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="write")
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="digest")  # one: pieces stay in order
        self._lock = threading.Lock()
        self._loaded: _Queue = queue.Queue()
        self._measures_ahead = plan.in_place and backend.threads > 1
        self._failure: BaseException | None = None  # of a writer or the digester

    def run(self) -> None:
        """Merge everything. Whatever first goes wrong in any thread stops all of them and is raised here."""
        ahead = [threading.Thread(target=self._feed, args=(self._loaded,), name="feed", daemon=True)]
        if self._measures_ahead:
            read: _Queue = queue.Queue()
            ahead = [
                threading.Thread(target=self._feed, args=(read,), name="feed", daemon=True),
                threading.Thread(target=self._measure_ahead, args=(read,), name="measure", daemon=True),
            ]
        for thread in ahead:
            thread.start()
        try:
            self._merge_all()
            self._writers.shutdown(wait=True)
            self._digester.shutdown(wait=True)
            self._raise_failure()
        finally:
            self._inputs.close()
            self._mapped.close()
            self._outputs.close()
            for thread in ahead:
                thread.join()
            self._readers.shutdown(wait=True, cancel_futures=True)
            self._writers.shutdown(wait=True, cancel_futures=True)
            self._digester.shutdown(wait=True, cancel_futures=True)
            self._backend.detach()

    def _merge_all(self) -> None:
        """Keep the backend busy with as many batches as it takes at a time."""
        under_way: deque[tuple[_Batch, list[Callable[[], None]]]] = deque()
        while True:
            # With nothing more to hand over, the memory that is waited for may be under way.
            while under_way and (len(under_way) >= self._backend.depth or self._loaded.empty()):
                self._complete(*under_way.popleft())
                self._raise_failure()
            batch = self._loaded.get()
            if batch is None:
                break
            if isinstance(batch, BaseException):
                raise batch
            if batch.outputs is None and self._measures_ahead:
                self._progress(batch.nbytes)
                continue
            under_way.append((batch, self._begin(batch)))
        while under_way:
            self._complete(*under_way.popleft())

    def _feed(self, into: _Queue) -> None:
        """Hand out memory and start the reads, one batch after the other."""
        try:
            for batch in self._batches():
                into.put(self._load(batch))
            into.put(None)
        except RingClosed:
            into.put(None)  # the run failed elsewhere
        except BaseException as error:
            into.put(error)

    def _measure_ahead(self, read: _Queue) -> None:
        """Measure what is only to be measured; pass on everything, in order."""
        while isinstance(batch := read.get(), _Batch):
            try:
                if batch.outputs is None:
                    self._begin(batch)
                    self._finish(batch)
            except BaseException as error:
                self._loaded.put(error)
                return
            self._loaded.put(batch)
        self._loaded.put(batch)

    def _batches(self) -> Iterator[list[Visit]]:
        """Visits in order, small ones that are alike together."""
        batch: list[Visit] = []
        inputs = outputs = 0
        for visit in visits(self._plan):
            *sizes, output = map(aligned, self._sizes(visit))
            inputs, outputs = inputs + sum(sizes), outputs + output
            large = inputs + outputs > BATCH or 2 * outputs > self._outputs.size
            crowded = not self._plan.in_place and 2 * inputs > self._inputs.size
            alike = not batch or (visit.merge, visit.stays) == (batch[-1].merge, batch[-1].stays)
            if batch and (large or crowded or not alike):
                yield batch
                batch, inputs, outputs = [], sum(sizes), output
            batch.append(visit)
        if batch:
            yield batch

    def _sizes(self, visit: Visit) -> list[int]:
        """Bytes of a visit's inputs and of its output."""
        bits = [dtype.bits for dtype in self._plan.input_dtypes(visit.job)]
        bits.append(visit.job.out.bits if visit.merge else 0)
        return [b * visit.count // 8 for b in bits]

    def _load(self, batch: list[Visit]) -> _Batch:
        """Start to read a batch. A device takes its inputs, which lie side by side, with one copy; its outputs too."""
        ranges = [self._ranges(visit) for visit in batch]
        mapped = sum(
            r.length
            for visit, some in zip(batch, ranges, strict=True)
            for r in some
            if not visit.again and not r.room
        )
        self._mapped.acquire(mapped)
        inputs = self._inputs.acquire(sum(aligned(r.room) for some in ranges for r in some))
        memory = inputs.cut(r.room for some in ranges for r in some)
        pieces: list[_Piece] = []
        work: list[tuple[ByteRange, memoryview]] = []
        for visit, some in zip(batch, ranges, strict=True):
            rooms = [next(memory) for _ in some]
            views = [r.view(room) for r, room in zip(some, rooms, strict=True)]
            pieces.append(_Piece(visit, some, views))
            if not visit.again:
                work += zip(some, rooms, strict=True)
        reads = self._start_reading(work, together=len(batch) > 1)
        outputs = None
        if any(visit.merge for visit in batch):
            sizes = [self._sizes(visit)[-1] for visit in batch]
            outputs = self._outputs.acquire(sum(map(aligned, sizes)))
            for piece, view in zip(pieces, outputs.cut(sizes), strict=True):
                piece.output = view
        return _Batch(pieces, inputs, mapped, outputs, reads)

    def _ranges(self, visit: Visit) -> list[ByteRange]:
        """A visit's inputs on their way into memory."""
        job, in_place = visit.job, self._backend.reads_in_place
        sources = zip(self._plan.inputs(job), self._plan.input_dtypes(job), strict=True)
        return [
            checkpoint.range(
                name,
                dtype.bits * visit.start // 8,
                dtype.bits * visit.count // 8,
                self._reading.way,
                in_place,
            )
            for (checkpoint, name), dtype in sources
        ]

    def _start_reading(self, work: list[tuple[ByteRange, memoryview]], together: bool) -> list[Future[None]]:
        """The ranges of small visits are read by one thread, those of a large one by several."""
        if together:
            return [self._readers.submit(self._read_all, work)]
        return [
            self._readers.submit(self._read, r, memory, at, min(at + READ_PIECE, r.length))
            for r, memory in work
            for at in range(0, r.length, READ_PIECE)
        ]

    def _read_all(self, work: list[tuple[ByteRange, memoryview]]) -> None:
        for some, memory in work:
            self._read(some, memory, 0, some.length)

    def _read(self, some: ByteRange, memory: memoryview, first: int, last: int) -> None:
        with self._ledger.timed(self._ledger.read, last - first):
            some.read(memory, first, last)

    def _begin(self, batch: _Batch) -> list[Callable[[], None]]:
        for read in batch.reads:
            read.result()
        with self._ledger.timed(self._ledger.compute, batch.nbytes), self._backend.together():
            merges = [self._merger.visit(piece.visit, piece.inputs, piece.output) for piece in batch.pieces]
            return [merge() for merge in merges]

    def _complete(self, batch: _Batch, waits: list[Callable[[], None]]) -> None:
        with self._ledger.timed(self._ledger.compute, 0):
            for wait in waits:
                wait()
        self._finish(batch)
        if batch.outputs is not None:
            batch.users = 1 if self._digests is None else 2
            self._writers.submit(self._guarded, self._write, batch, batch.outputs)
            if self._digests is not None:
                self._digester.submit(self._guarded, self._digest, batch, batch.outputs)
        self._progress(batch.nbytes)

    def _finish(self, batch: _Batch) -> None:
        """Nothing is done with the inputs any more, for now."""
        for piece in batch.pieces:
            for some in piece.ranges:
                some.verify()
        self._inputs.release(batch.inputs)
        self._mapped.release(batch.mapped)
        if not batch.pieces[0].visit.stays:
            self._readers.submit(self._let_go, batch.pieces)

    def _let_go(self, pieces: list[_Piece]) -> None:
        """What is mapped takes none of the ring's memory, and a while to let go of."""
        for piece in pieces:
            for some in piece.ranges:
                some.release()

    def _guarded(self, use: Callable[[_Piece], None], batch: _Batch, outputs: Span) -> None:
        """Use the outputs; the last user gives their memory back."""
        try:
            for piece in batch.pieces:
                if piece.visit.merge:
                    use(piece)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            with self._lock:
                batch.users -= 1
                unused = batch.users == 0
            if unused:
                self._outputs.release(outputs)

    def _write(self, piece: _Piece) -> None:
        visit = piece.visit
        with self._ledger.timed(self._ledger.write, len(piece.output)):
            self._sink.write(visit.job.name, visit.job.out.bits * visit.start // 8, piece.output)

    def _digest(self, piece: _Piece) -> None:
        assert self._digests is not None
        with self._ledger.timed(self._ledger.digest, len(piece.output)):
            self._digests.add(piece.visit.job.name, piece.output)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
