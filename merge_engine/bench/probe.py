"""Measure the limits of a machine in about twenty seconds, with the code that a run uses.

The best of a few tries counts, because other load on the machine can only make it slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from merge_engine.bench.limits import DiskLimits, Limits, load_limits, save_limits, user_cache
from merge_engine.checkpoint import CheckpointWriter, OutputTensor, plan_shards
from merge_engine.checkpoint.shards import DEFAULT_SHARD_SIZE
from merge_engine.dtypes import BF16
from merge_engine.engine.in_host_memory import READ_PIECE
from merge_engine.engine.mover import READ_THREADS, WRITE_THREADS
from merge_engine.storage import Extent, File, OpenFiles, Way, cores, mount_of, open_range

_TRIES = 3
_WAYS: tuple[tuple[Way, bool], ...] = (("cached", False), ("cached", True), ("direct", True))
"""Copied out of the page cache, mapped from it, and past it."""

_FIRST, _MOST = 32 << 20, 256 << 20
_ENOUGH = 0.3  # seconds of a single transfer
_COPIED = 256 << 20  # well above any cache
_LINK = 256 << 20
_NAME = "probe"
_REPORTING_SECONDS = 2.5
"""By then a virtual machine has given its free memory back to its host, and a growing page cache must get it again."""


def measure_limits(folder: Path) -> Limits:
    """Measure memory, link, and the file system of ``folder``, and keep the limits in the user's cache.

    Other file systems of this machine that were measured before stay known. Raises as ``measure_disk`` does,
    and ``OSError`` or ``OptionError`` when the user's cache cannot be written.
    """
    user_cache()  # fails now, not after the work
    limits = load_limits()
    limits.memory, limits.link = measure_memory(), measure_link()
    limits.disks[str(mount_of(folder))] = measure_disk(folder)
    save_limits(limits)
    return limits


def measure_disk(folder: Path) -> DiskLimits:
    """Write, read from storage in both ways, and read from the page cache, in a temporary folder inside ``folder``.

    A small try decides how many bytes can be moved in a short time. "Storage" is everything behind this system's page
    cache; a virtual disk may have another cache of its own. Raises ``OutputError`` or ``OSError`` if nothing can be
    written there.
    """
    small = _transfer(folder, _FIRST)
    size = min(int(small.write * _ENOUGH), _MOST) // READ_PIECE * READ_PIECE
    if size <= _FIRST:
        return small
    tries = [_transfer(folder, size, _REPORTING_SECONDS) for _ in range(_TRIES)]
    return DiskLimits(
        read=max(disk.read for disk in tries),
        direct=max(disk.direct for disk in tries),
        cached=max(disk.cached for disk in tries),
        write=max(disk.write for disk in tries),
    )


def measure_memory() -> float:
    """Bytes per second that all cores together copy; bytes read and bytes written both count."""
    threads = cores()
    source, target = (mmap.mmap(-1, _COPIED) for _ in range(2))
    from_address, to_address = (
        ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (source, target)
    )
    part = _COPIED // threads

    def copy(number: int) -> None:
        ctypes.memmove(to_address + number * part, from_address + number * part, part)

    ctypes.memset(from_address, 1, _COPIED)  # otherwise all pages would be the same page of zeros
    with ThreadPoolExecutor(threads) as pool:
        seconds = [_seconds(lambda: list(pool.map(copy, range(threads)))) for _ in range(_TRIES + 1)]
    return 2 * part * threads / min(seconds)


def measure_link() -> float | None:
    """Bytes per second from page-locked host memory to the current CUDA device; None without a usable one."""
    import torch

    if not torch.cuda.is_available():
        return None
    host = torch.empty(_LINK, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_LINK, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    return _LINK / min(_seconds(copy) for _ in range(_TRIES + 1))


def _transfer(folder: Path, size: int, rest: float = 0.0) -> DiskLimits:
    """Move ``size`` bytes each way, resting before the page cache is read into."""
    memory = mmap.mmap(-1, size)
    noise = os.urandom(READ_PIECE)  # a file system may compress
    for at in range(0, size, READ_PIECE):
        memory[at : at + READ_PIECE] = noise
    data = memoryview(memory)
    layout = plan_shards([OutputTensor(_NAME, BF16, (size // BF16.itemsize,))], DEFAULT_SHARD_SIZE)
    with tempfile.TemporaryDirectory(prefix=".merge-engine-probe-", dir=folder) as scratch:
        target = Path(scratch) / "written"
        with CheckpointWriter(target, layout) as writer:

            def write() -> None:
                _in_pieces(
                    lambda at: writer.write(_NAME, at, data[at : at + READ_PIECE]), size, WRITE_THREADS
                )
                writer.flush()

            writing = _seconds(write)
            writer.finish()
        written = target / layout[0].name
        seconds = []
        for way, in_place in _WAYS:
            drop_from_cache(written)
            time.sleep(rest if way == "cached" else 0.0)
            seconds.append(_read_twice(written, layout[0].tensors[_NAME].start, data, way, in_place))
    copied, mapped, direct = seconds
    return DiskLimits(
        read=size / min(copied[0], mapped[0]),
        direct=size / direct[0],
        cached=size / copied[1],
        write=size / writing,
    )


def _read_twice(file: Path, position: int, data: memoryview, way: Way, in_place: bool) -> tuple[float, float]:
    """Seconds to bring all of a tensor into memory, the first and the second time."""
    with OpenFiles() as files:
        whole = open_range(files, Extent(File.of(file), _NAME, position, len(data)), way, in_place)

        def read(at: int) -> None:
            last = min(at + READ_PIECE, whole.length)
            whole.read(data, at, last)
            # Mapped pages may not be in memory until they are touched.
            bytes(whole.view(data)[at : last : mmap.PAGESIZE])

        def read_all() -> None:
            _in_pieces(read, whole.length, READ_THREADS)

        return _seconds(read_all), _seconds(read_all)


def drop_from_cache(file: Path) -> None:
    """Write new pages of a file to the disk, then drop all its pages from the page cache. Raises ``OSError``."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_pieces(use: Callable[[int], None], size: int, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(use, range(0, size, READ_PIECE)))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
