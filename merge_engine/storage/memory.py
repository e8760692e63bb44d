"""Host memory for files and devices: whole pages, flat bytes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

PAGE = 4096
"""Bytes. Direct reads and writes move whole pages; inputs and outputs start on one (see ``Backend.attach``)."""


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def as_bytes(buffer: memoryview) -> memoryview:
    """A flat view of bytes on the same C-contiguous memory."""
    # A view with a zero in its shape cannot be cast.
    return buffer.cast("B") if buffer.nbytes else memoryview(b"")


def allocate(nbytes: int) -> memoryview:
    """Whole pages of memory, at least ``nbytes``. The system provides a page only when it is first used.

    Raises ``MemoryError``.
    """
    try:
        region = mmap.mmap(-1, max(aligned(nbytes), PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system has no {nbytes} bytes of memory") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            region.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(region)


def give_back() -> None:
    """Give memory that was freed to the system. Of itself the C library keeps blocks of up to 32 MiB for later."""
    trim = getattr(
        ctypes.CDLL(None), "malloc_trim", None
    )  # of glibc; other C libraries give it back by themselves
    if trim is not None:
        trim(0)
