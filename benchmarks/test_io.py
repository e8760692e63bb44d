"""Reading and writing: past the page cache or through it, cold or warm, one large file or many small ones.

merge_engine writes past it (``direct``). It reads through it (``cached``) or past it: see
merge_engine/storage/reading.py. Here memory, offsets and lengths are whole pages, so that a direct read needs no
buffer in between.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from merge_engine.bench.measuring import cool, warm
from merge_engine.engine.mover import READ_THREADS

ROUNDS = 5
FLAGS = {"cached": 0, "direct": os.O_DIRECT}
Piece = tuple[Path, int, memoryview]


@pytest.fixture(scope="module")
def size(small: bool) -> int:
    """Bytes that are moved."""
    return 1 << (20 if small else 30)


@pytest.fixture(scope="module")
def memory(size: int) -> memoryview:
    """As much memory, filled."""
    region = mmap.mmap(-1, size)
    noise = os.urandom(1 << 20)
    for at in range(0, size, len(noise)):
        region[at : at + len(noise)] = noise
    return memoryview(region)


@pytest.fixture(params=[1, 64], ids=["one file", "64 files"])
def files(request: pytest.FixtureRequest, folder: Path, memory: memoryview) -> Iterator[list[Path]]:
    """The same bytes in so many files, on the disk."""
    count = request.param
    part = len(memory) // count
    found = [folder / f"io-{number}" for number in range(count)]
    for number, file in enumerate(found):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(memory[number * part : (number + 1) * part])
    yield found
    for file in found:
        file.unlink()


def pieces(files: list[Path], memory: memoryview, length: int) -> Iterator[Piece]:
    """Each file in pieces, with the memory that belongs to them."""
    part = len(memory) // len(files)
    for number, file in enumerate(files):
        for at in range(0, part, length):
            start = number * part + at
            yield file, at, memory[start : start + min(length, part - at)]


def in_threads(work: list[Piece], flags: int, move: Callable[[int, memoryview, int], int]) -> None:
    """Open every file once and move all pieces, on as many threads as a merge reads with."""
    descriptors = {file: os.open(file, flags) for file, _, _ in work}

    def one(piece: Piece) -> None:
        file, at, view = piece
        while view:
            moved = move(descriptors[file], view, at)
            view, at = view[moved:], at + moved

    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(one, work))
        if flags & os.O_WRONLY:
            for descriptor in descriptors.values():
                os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def note(benchmark: BenchmarkFixture, nbytes: int) -> None:
    """Bytes and their rate."""
    if benchmark.stats is not None:  # None when benchmarks are disabled
        rate = nbytes / benchmark.stats.stats.median
        benchmark.extra_info |= {"bytes_moved": nbytes, "gb_per_s": round(rate / 1e9, 2)}


@pytest.mark.parametrize("length", [1 << 20, 8 << 20], ids=["1 MiB", "8 MiB"])
@pytest.mark.parametrize("way", FLAGS)
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_read(
    benchmark: BenchmarkFixture, files: list[Path], memory: memoryview, state: str, way: str, length: int
) -> None:
    target = memoryview(mmap.mmap(-1, len(memory)))
    work = list(pieces(files, target, length))
    prepare = {"cold": cool, "warm": warm}[state]
    benchmark.pedantic(
        in_threads,
        (work, os.O_RDONLY | FLAGS[way], lambda fd, view, at: os.preadv(fd, [view], at)),
        setup=lambda: prepare(files),
        rounds=ROUNDS,
    )
    note(benchmark, len(memory))
    assert target == memory


@pytest.mark.parametrize("length", [1 << 20, 8 << 20], ids=["1 MiB", "8 MiB"])
@pytest.mark.parametrize("way", FLAGS)
def test_write(
    benchmark: BenchmarkFixture, files: list[Path], memory: memoryview, way: str, length: int
) -> None:
    work = list(pieces(files, memory, length))

    def reserve() -> None:  # as a merge does
        for file in files:
            with file.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, len(memory) // len(files))

    arguments = (work, os.O_WRONLY | FLAGS[way], os.pwrite)
    benchmark.pedantic(in_threads, arguments, setup=reserve, rounds=ROUNDS)
    note(benchmark, len(memory))
    assert b"".join(file.read_bytes() for file in files) == memory
