"""Move bytes: read ahead into a ring of memory, have each visit carried out, write behind.

Threads share the work: readers fill spans of the ring with the inputs of coming visits, the calling thread
hands them to the backend, writers take away what is done and one thread digests it. A backend that works on a
device of its own has several visits at a time: one on its way up, one computed, one on its way down. The ring
bounds them all.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from merge_engine.backends import Backend
from merge_engine.checkpoint import Checkpoint
from merge_engine.engine.ledger import Ledger
from merge_engine.engine.merging import Merger
from merge_engine.engine.plan import Plan
from merge_engine.engine.ring import Ring, RingClosed, Span, aligned
from merge_engine.engine.sinks import Digests, Sink
from merge_engine.engine.visits import Visit, visits

READ_THREADS = 4
WRITE_THREADS = 2
_READ_PIECE = 8 << 20  # several threads share the reading of one large tensor


@dataclass
class _Loaded:
    """A visit whose inputs are on their way into a span."""

    visit: Visit
    span: Span
    inputs: list[memoryview]
    output: memoryview
    reads: list[Future[None]]
    users: int = 0  # of the output: writer and digester

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return sum(len(view) for view in self.inputs)


class Stream:
    """One run over a plan. ``progress`` is told how many input bytes each finished visit had.

    Raises ``DeviceMemoryError`` when the backend's device has too little memory for the plan.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        merger: Merger,
        sink: Sink,
        digests: Digests | None,
        ledger: Ledger,
        progress: Callable[[int], None],
    ):
        self._plan = plan
        self._backend = backend
        self._merger = merger
        self._sink = sink
        self._digests = digests
        self._ledger = ledger
        self._progress = progress
        self._ring = Ring(plan.ring_bytes)
        backend.attach(self._ring.memory, plan.scratch_bytes)  # let go of by run
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="write")
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="digest")  # one: pieces stay in order
        self._lock = threading.Lock()
        self._loaded: queue.Queue[_Loaded | BaseException | None] = queue.Queue()
        self._failure: BaseException | None = None  # of a writer or the digester

    def run(self) -> None:
        """Merge everything. Whatever first goes wrong in any thread stops all of them and is raised here."""
        feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        feeder.start()
        try:
            self._merge_all()
            self._writers.shutdown(wait=True)
            self._digester.shutdown(wait=True)
            self._raise_failure()
        finally:
            self._ring.close()
            feeder.join()
            self._readers.shutdown(wait=True, cancel_futures=True)
            self._writers.shutdown(wait=True, cancel_futures=True)
            self._digester.shutdown(wait=True, cancel_futures=True)
            self._backend.detach()

    def _merge_all(self) -> None:
        """Keep the backend busy with as many visits as it takes at a time."""
        under_way: deque[tuple[_Loaded, Callable[[], None]]] = deque()
        while True:
            # With nothing more to hand over, the memory that is waited for may be under way.
            while under_way and (len(under_way) >= self._backend.depth or self._loaded.empty()):
                self._complete(*under_way.popleft())
                self._raise_failure()
            item = self._loaded.get()
            if item is None:
                break
            if isinstance(item, BaseException):
                raise item
            under_way.append((item, self._begin(item)))
        while under_way:
            self._complete(*under_way.popleft())

    def _feed(self) -> None:
        """Hand out memory and start the reads, one visit after the other."""
        try:
            for visit in visits(self._plan):
                self._loaded.put(self._load(visit))
            self._loaded.put(None)
        except RingClosed:
            pass  # the run failed elsewhere
        except BaseException as error:
            self._loaded.put(error)

    def _load(self, visit: Visit) -> _Loaded:
        sources = self._plan.inputs(visit.job)
        bits = [dtype.bits for dtype in self._plan.input_dtypes(visit.job)]
        sizes = [b * visit.count // 8 for b in bits]
        sizes.append(visit.job.out.bits * visit.count // 8 if visit.merge else 0)
        span = self._ring.acquire(sum(aligned(size) for size in sizes))
        views, at = [], 0
        for size in sizes:
            views.append(span.memory[at : at + size])
            at += aligned(size)
        *inputs, output = views
        reads = [
            self._readers.submit(self._read, source, b * visit.start // 8 + at, view[at : at + _READ_PIECE])
            for source, b, view in zip(sources, bits, inputs, strict=True)
            for at in range(0, len(view), _READ_PIECE)
        ]
        return _Loaded(visit, span, inputs, output, reads)

    def _read(self, source: tuple[Checkpoint, str], offset: int, view: memoryview) -> None:
        checkpoint, name = source
        with self._ledger.timed(self._ledger.read, len(view)):
            checkpoint.read_into(name, offset, view)

    def _begin(self, item: _Loaded) -> Callable[[], None]:
        for read in item.reads:
            read.result()
        with self._ledger.timed(self._ledger.compute, item.nbytes):
            return self._merger.visit(item.visit, item.inputs, item.output)

    def _complete(self, item: _Loaded, wait: Callable[[], None]) -> None:
        with self._ledger.timed(self._ledger.compute, 0):
            wait()
        if item.visit.merge:
            item.users = 1 if self._digests is None else 2
            self._writers.submit(self._guarded, self._write, item)
            if self._digests is not None:
                self._digester.submit(self._guarded, self._digest, item)
        else:
            self._ring.release(item.span)
        self._progress(item.nbytes)

    def _guarded(self, use: Callable[[_Loaded], None], item: _Loaded) -> None:
        """Use an output; the last user gives its memory back."""
        try:
            use(item)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            with self._lock:
                item.users -= 1
                unused = item.users == 0
            if unused:
                self._ring.release(item.span)

    def _write(self, item: _Loaded) -> None:
        visit = item.visit
        with self._ledger.timed(self._ledger.write, len(item.output)):
            self._sink.write(visit.job.name, visit.job.out.bits * visit.start // 8, item.output)

    def _digest(self, item: _Loaded) -> None:
        assert self._digests is not None
        with self._ledger.timed(self._ledger.digest, len(item.output)):
            self._digests.add(item.visit.job.name, item.output)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
