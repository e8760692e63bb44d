"""Reading past the page cache, from a descriptor that takes whole pages only: pages, or any range into any memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

from merge_engine.storage.memory import PAGE

_BLOCK = 512  # of a disk; reads end between two blocks only where the file does
_BUFFER = 2 << 20  # small enough to stay in the processor's cache until it is copied

_local = threading.local()


def open_direct(file: Path) -> int:
    """A descriptor for ``read_direct``. Raises ``OSError`` where the file system has no such thing."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    try:
        os.preadv(descriptor, [memoryview(_buffer())[:PAGE]], 0)  # some refuse only now
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_pages(descriptor: int, pages: memoryview, position: int, needed: int) -> int:
    """Fill whole pages of memory from a page of the file on, at least the first ``needed`` bytes.

    Returns the number of bytes, which is smaller only where the file ends. Raises ``OSError``.
    """
    got = 0
    while got < needed:
        step = os.preadv(descriptor, [pages[got:]], position + got)
        got += step
        if step == 0 or got % _BLOCK:
            break
    return got


def read_direct(descriptor: int, view: memoryview, position: int) -> int:
    """Fill ``view`` from byte ``position`` of the file on, in part or whole; returns the number of bytes.

    Tensors of most files begin between pages, so the pages around the range go through a buffer of the
    thread's own. Raises ``OSError``.
    """
    before = position % PAGE
    length = min(-(-(before + view.nbytes) // PAGE) * PAGE, _BUFFER)
    buffer = _buffer()
    got = os.preadv(descriptor, [memoryview(buffer)[:length]], position - before)
    got = min(max(got - before, 0), view.nbytes)
    target, source = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (view, buffer))
    ctypes.memmove(target, source + before, got)  # unlike a copy of slices, lets other threads run
    return got


def _buffer() -> mmap.mmap:
    if not hasattr(_local, "buffer"):
        _local.buffer = mmap.mmap(-1, _BUFFER)
    buffer: mmap.mmap = _local.buffer
    return buffer
