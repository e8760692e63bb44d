"""Python's garbage collector, seldom at work while a merge runs.

A merge keeps about a hundred objects for each tensor and makes no cycles of them. The collector would look through
all of them again and again: a third of the time of a merge of many small tensors.
"""

from __future__ import annotations

import gc
import threading
from types import TracebackType

_OBJECTS = 100_000
"""New objects between two collections."""


class SeldomCollected:
    """Lets the collector work seldom while at least one run is inside; cycles of other threads are still freed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[int, int, int] = (0, 0, 0)

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = gc.get_threshold()
                if 0 < self._before[0] < _OBJECTS:  # 0: the caller has switched collections off
                    gc.set_threshold(_OBJECTS, *self._before[1:])
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                gc.set_threshold(*self._before)


seldom_collected = SeldomCollected()
"""One for the process, as there is one collector."""
