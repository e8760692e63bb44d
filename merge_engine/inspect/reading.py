"""Reading whole files once, on several threads, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from merge_engine.operands import Access
from merge_engine.storage import PAGE, ByteRange, File, OpenFiles, aligned, allocate, cores, way_here

STEP = 4 << 20
"""Bytes that a thread holds of a file at a time. Where files are used in place, it holds none."""

# Threads: a disk answers several requests at a time, and few threads reach a page cache's rate.
_FEWEST, _MOST = 4, 8

_Work = TypeVar("_Work")
_Result = TypeVar("_Result")

_local = threading.local()


def threads() -> int:
    """The number of threads that read."""
    return min(max(cores(), _FEWEST), _MOST)


@contextmanager
def access_to(files: Collection[File]) -> Iterator[Access]:
    """Decide how files are read (see ``way_here``), and keep them open until the context is left."""
    with OpenFiles() as opened:
        yield Access(opened, way_here(files), in_place=True)


@contextmanager
def in_threads(do: Callable[[_Work], _Result], work: Iterable[_Work]) -> Iterator[Iterator[_Result]]:
    """The results of ``do``, in the order of ``work``. When the context is left, no thread works any more."""
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="inspect")
    try:
        yield pool.map(do, work)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load(found: ByteRange, buffer: int = 0) -> memoryview:
    """Bytes of at most ``STEP``, read or used in place.

    They stay until the next call in the same thread with the same ``buffer``, which is 0 or 1. Raises
    ``CheckpointError``.
    """
    memory = _buffer(buffer) if found.room else memoryview(b"")
    if found.length:
        found.read(memory, 0, found.length)
    return found.view(memory)


def _buffer(number: int) -> memoryview:
    buffers: dict[int, memoryview] = _local.__dict__.setdefault("buffers", {})
    if number not in buffers:
        buffers[number] = allocate(aligned(STEP) + PAGE)  # a range may begin inside a page
    return buffers[number]
