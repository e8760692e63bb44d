"""Reading past the page cache (``O_DIRECT``): whole pages, or any range through a buffer of whole pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

from merge_engine.storage.memory import PAGE

_BLOCK = 512  # bytes of a disk's block; a read ends inside a block only at the end of the file
_BUFFER = 2 << 20  # small enough to stay in the processor's cache until it is copied

_local = threading.local()


def open_direct(file: Path) -> int:
    """A descriptor for ``read_direct`` and ``read_pages``.

    Raises ``OSError`` if the file system refuses direct reads.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    try:
        os.preadv(
            descriptor, [memoryview(_buffer())[:PAGE]], 0
        )  # some file systems refuse only the first read
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_pages(descriptor: int, pages: memoryview, position: int, needed: int) -> int:
    """Fill whole ``pages`` of memory from byte ``position`` of the file on, at least the first ``needed`` bytes.

    ``position`` is a multiple of the page size. Returns the number of bytes read, which is less than ``needed``
    only at the end of the file. Raises ``OSError``.
    """
    got = 0
    while got < needed:
        step = os.preadv(descriptor, [pages[got:]], position + got)
        got += step
        if step == 0 or got % _BLOCK:
            break
    return got


def read_direct(descriptor: int, view: memoryview, position: int) -> int:
    """Fill ``view``, or a first part of it, from byte ``position`` of the file on; returns the number of bytes.

    Tensors of most files begin inside a page, so the pages around the range are read into a buffer, one for each
    thread, and copied from there. Raises ``OSError``.
    """
    before = position % PAGE
    length = min(-(-(before + view.nbytes) // PAGE) * PAGE, _BUFFER)
    buffer = _buffer()
    got = os.preadv(descriptor, [memoryview(buffer)[:length]], position - before)
    got = min(max(got - before, 0), view.nbytes)
    target, source = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (view, buffer))
    ctypes.memmove(target, source + before, got)  # unlike a copy of slices, it releases Python's lock
    return got


def _buffer() -> mmap.mmap:
    if not hasattr(_local, "buffer"):
        _local.buffer = mmap.mmap(-1, _BUFFER)
    buffer: mmap.mmap = _local.buffer
    return buffer
