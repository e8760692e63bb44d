"""Memory that is used again and again: spans are taken in order and given back in any order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator

from merge_engine.storage import PAGE, aligned


class RingClosed(Exception):
    """The run is being stopped."""


class Span:
    """A piece of the ring. ``memory`` is a writable view of its bytes."""

    def __init__(self, memory: memoryview, end: int):
        self.memory = memory
        self.end = end
        self.free = False

    def cut(self, sizes: Iterable[int]) -> Iterator[memoryview]:
        """Pieces of the memory of these sizes in bytes, each from the start of a page."""
        at = 0
        for size in sizes:
            yield self.memory[at : at + size]
            at += aligned(size)


class Ring:
    """A ring buffer in ``memory``, which is whole pages. Thread-safe."""

    def __init__(self, memory: memoryview):
        self.memory = memory
        self.size = len(memory)
        self._spans: deque[Span] = deque()
        self._head = 0
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, nbytes: int) -> Span:
        """Wait for ``nbytes`` contiguous bytes.

        Raises ``RingClosed`` once the ring is closed, and ``ValueError`` for more bytes than the ring has.
        """
        nbytes = max(aligned(nbytes), PAGE)
        if nbytes > len(self.memory):
            raise ValueError(f"a span of {nbytes} bytes does not fit a ring of {len(self.memory)}")
        with self._changed:
            while (start := self._place(nbytes)) is None:
                if self._closed:
                    raise RingClosed
                self._changed.wait()
            if self._closed:
                raise RingClosed
            span = Span(self.memory[start : start + nbytes], start + nbytes)
            self._spans.append(span)
            self._head = start + nbytes
            return span

    def release(self, span: Span) -> None:
        """Give a span back. Its memory is reused once all earlier spans are back too."""
        with self._changed:
            span.free = True
            while self._spans and self._spans[0].free:
                self._spans.popleft()
            self._changed.notify_all()

    def close(self) -> None:
        """Wake up all threads that wait for memory; they get ``RingClosed``."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _place(self, nbytes: int) -> int | None:
        """The first byte of a new span: after the newest one, or 0 if the rest is too short.

        None if there is no room.
        """
        if not self._spans:
            return 0
        tail = self._spans[0].end - len(self._spans[0].memory)
        if self._head > tail:
            if self._head + nbytes <= len(self.memory):
                return self._head
            return 0 if nbytes <= tail else None
        return self._head if self._head + nbytes <= tail else None
