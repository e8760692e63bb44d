"""What of a file is in the page cache and need not come from storage: a share, or a single byte."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_WINDOW = 1 << 20
_WINDOWS = 64
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def cached_share(file: Path, files: int = 1) -> float:
    """The share of a file, from 0 to 1, that is in the page cache. Nothing is read.

    It is estimated from up to 64 evenly spread windows of 1 MiB, divided among the number of ``files`` that the
    caller looks at, so that a large checkpoint takes no longer. For users who neither own the file nor may write to
    it, the kernel reports all of it as cached. Raises ``OSError``.
    """
    size = file.stat().st_size
    windows = min(-(-size // _WINDOW), -(-_WINDOWS // files))
    seen = resident = 0
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for number in range(windows):
            start = number * (size // windows) // mmap.PAGESIZE * mmap.PAGESIZE
            pages = -(-min(_WINDOW, size - start) // mmap.PAGESIZE)
            seen += pages
            resident += _resident_pages(descriptor, start, pages)
    finally:
        os.close(descriptor)
    return resident / seen if seen else 1.0


def is_cached(descriptor: int, position: int) -> bool:
    """Whether the byte at ``position`` of a file is in the page cache; True where the system does not tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # a file system that can only wait; a disk that fails does so again for whoever reads
        return True
    return True


def _resident_pages(descriptor: int, start: int, pages: int) -> int:
    length = pages * mmap.PAGESIZE
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED:
        raise _system_error()
    try:
        marks = ctypes.create_string_buffer(pages)
        if _libc.mincore(address, length, marks) != 0:
            raise _system_error()
        return pages - marks.raw[:pages].count(0)
    finally:
        _libc.munmap(address, length)


def _system_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
