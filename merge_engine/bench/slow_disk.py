"""Run a module as if the disk were slow.

    python -m merge_engine.bench.slow_disk BYTES_PER_SECOND MODULE [ARGUMENT ...]

merge_engine and the bare copy move their bytes with ``os.preadv``, ``os.pwrite`` and ``Mapping.load``. Here these
calls return no sooner than on a disk of this speed, reads and writes together. Other ways to move bytes (mapped
files, as in mergekit) are not slowed down.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from collections.abc import Callable

from merge_engine._native import Mapping
from merge_engine.storage import ranges


class Pace:
    """One disk that serves one call at a time."""

    def __init__(self, bytes_per_second: float):
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def limit(self, move: Callable[..., int]) -> Callable[..., int]:
        """``move``, which returns the number of bytes it moved, at this pace."""

        def paced(*arguments: object) -> int:
            start = time.perf_counter()
            moved = move(*arguments)
            with self._lock:
                self._free_at = max(self._free_at, start) + moved / self._rate
                wait = self._free_at - time.perf_counter()
            time.sleep(max(wait, 0))
            return moved

        return paced


def _loaded(mapping: Mapping, first: int, last: int, load: Callable[..., None] = Mapping.load) -> int:
    load(mapping, first, last)
    return last - first


if __name__ == "__main__":
    pace = Pace(float(sys.argv[1]))
    os.preadv, os.pwrite = pace.limit(os.preadv), pace.limit(os.pwrite)
    Mapping.load = pace.limit(_loaded)  # type: ignore[method-assign, assignment]
    ranges.FAULT = 0  # small ranges are loaded too
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
