"""Ranges of files: the same bytes in every way, and one clear error when the file does not have them any more."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_engine._native as _native
from merge_engine.errors import CheckpointError
from merge_engine.storage import PAGE, ByteRange, Extent, File, Mount, OpenFiles, Way, direct, open_range

CONTENT = random.Random(0).randbytes(5_000_003)  # it ends within a page
WAYS: tuple[tuple[Way, bool], ...] = (
    ("cached", True),  # mapped
    ("cached", False),  # copied
    ("direct", True),  # whole pages
    ("direct", False),  # through a buffer
)
each_way = pytest.mark.parametrize(("way", "in_place"), WAYS)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> File:
    """One file for all tests that leave it as it is."""
    path = tmp_path_factory.mktemp("ranges") / "weights"
    path.write_bytes(CONTENT)
    return File.of(path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return File.of(path)


@pytest.fixture(scope="module")
def opened() -> Iterator[OpenFiles]:
    with OpenFiles() as files:
        yield files


def extent(file: File, first: int, last: int, alignment: int = 1) -> Extent:
    return Extent(file, "w", first, last - first, alignment)


def read(some: ByteRange, step: int = 8192) -> bytes:
    """The range read in steps, into memory as a ring gives it."""
    memory = memoryview(mmap.mmap(-1, max(some.room, 1)))[: some.room]
    for at in range(0, some.length, step):
        some.read(memory, at, min(at + step, some.length))
    try:
        values = bytes(some.view(memory))
        some.verify()
        return values
    finally:
        some.release()


@given(
    st.sampled_from(WAYS),
    st.integers(0, len(CONTENT)),
    st.one_of(st.integers(0, 20_000), st.integers(0, len(CONTENT))),
    st.sampled_from((4096, 65536, 8 << 20)),
)
def test_the_same_bytes_in_every_way(
    unchanged: File, opened: OpenFiles, way: tuple[Way, bool], first: int, count: int, step: int
) -> None:
    last = min(first + count, len(CONTENT))
    assert read(open_range(opened, extent(unchanged, first, last), *way), step) == CONTENT[first:last]


@each_way
@pytest.mark.parametrize("last", (0, 1, PAGE - 1, PAGE, PAGE + 1, len(CONTENT) - 1, len(CONTENT)))
@pytest.mark.parametrize("count", (0, 1, 511, 512, 513, PAGE - 1, PAGE, PAGE + 1, 65536, 65537, 2 << 20))
def test_ranges_that_end_at_the_edges(
    unchanged: File, opened: OpenFiles, way: Way, in_place: bool, last: int, count: int
) -> None:
    first = max(last - count, 0)
    assert read(open_range(opened, extent(unchanged, first, last), way, in_place)) == CONTENT[first:last]


@pytest.mark.parametrize("buffer", (4096, 65536, 2 << 20))
def test_a_small_buffer_past_the_page_cache(
    unchanged: File, opened: OpenFiles, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_BUFFER", buffer)
    monkeypatch.setattr(direct, "_local", type(direct._local)())
    draw = random.Random(0)

    def one(first: int) -> None:
        last = min(first + draw.randrange(100_000), len(CONTENT))
        some = open_range(opened, extent(unchanged, first, last), "direct", in_place=False)
        assert read(some, 1 << 20) == CONTENT[first:last]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, [0, len(CONTENT) - 1, *(draw.randrange(len(CONTENT)) for _ in range(50))]))


def test_how_each_is_read(unchanged: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped ranges take no memory and no read; whole pages go straight where they are used, others are copied."""
    preadv, seen = os.preadv, set[str]()

    def watched(descriptor: int, *arguments: Any) -> int:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        seen.add("direct" if flags & os.O_DIRECT else "cached")
        return preadv(descriptor, *arguments)

    def how(way: Way, in_place: bool, position: int) -> tuple[set[str], int]:
        some = open_range(files, extent(unchanged, position, position + 8000, 4), way, in_place)
        seen.clear()
        assert read(some) == CONTENT[position : position + 8000]
        return set(seen), some.room

    with OpenFiles() as files:
        past = "direct" if files.direct_descriptor(unchanged) >= 0 else "cached"
        monkeypatch.setattr(os, "preadv", watched)
        assert how("cached", True, 400) == (set(), 0)
        assert how("cached", False, 400) == ({"cached"}, 8000)
        assert how("direct", False, 400) == ({past}, 8000)
        if past == "direct":
            assert how("direct", True, 400) == ({past}, 3 * PAGE)
        # Elements between their multiples cannot be used where they are: safetensors allows headers of any length.
        assert how("cached", True, 401) == ({"cached"}, 8000)
        assert how("direct", True, 401) == ({past}, 8000)
    monkeypatch.setattr(Mount, "local", False)
    with OpenFiles() as files:
        assert how("cached", True, 400) == ({"cached"}, 8000)


@pytest.mark.parametrize("call", ("open", "preadv"))
@pytest.mark.parametrize("in_place", (True, False))
@pytest.mark.parametrize("local", (True, False))
def test_file_systems_that_refuse_direct_reads(
    file: File, call: str, in_place: bool, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = getattr(os, call)

    def refuse(target: Any, how: Any, *rest: Any) -> Any:
        if (call == "open" and how & os.O_DIRECT) or (call == "preadv" and len(how[0]) == 4096):
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(target, how, *rest)

    monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(Mount, "local", local)
    with OpenFiles() as files:
        assert read(open_range(files, extent(file, 1, 1001), "direct", in_place)) == CONTENT[1:1001]


def test_what_is_mapped_is_not_copied(
    unchanged: File, opened: OpenFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = extent(unchanged, 0, len(CONTENT))
    monkeypatch.setattr(os, "preadv", None)
    assert read(open_range(opened, everything, "cached", in_place=True)) == CONTENT
    with pytest.raises(TypeError, match="not callable"):
        read(open_range(opened, everything, "cached", in_place=False))


def test_an_extent_travels_to_another_process(unchanged: File, opened: OpenFiles) -> None:
    sent = pickle.loads(pickle.dumps(extent(unchanged, 5, 500)))
    assert read(open_range(opened, sent, "cached", in_place=False)) == CONTENT[5:500]


@each_way
def test_short_reads_are_continued(
    file: File, way: Way, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    step = 4096 if way == "direct" else 777
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:step]], at))
    with OpenFiles() as files:
        assert read(open_range(files, extent(file, 100, 50_000), way, in_place)) == CONTENT[100:50_000]


@each_way
def test_a_file_that_shrinks(file: File, way: Way, in_place: bool) -> None:
    with OpenFiles() as files:
        read(open_range(files, extent(file, 0, 100_000), way, in_place))
        os.truncate(file.path, 1_000_001)
        with pytest.raises(CheckpointError) as caught:
            read(open_range(files, extent(file, 900_000, 1_100_000), way, in_place))
    assert str(caught.value) == (
        f"{file.path}: tensor 'w': the file ended at byte 1000001; it became shorter while it was read"
    )


def test_a_file_that_shrinks_while_it_is_used_in_place(file: File) -> None:
    """Lost pages would kill the process when touched: they read as zeros, and ``verify`` raises afterwards."""
    with OpenFiles() as files:
        some = open_range(files, extent(file, 0, len(CONTENT)), "cached", in_place=True)
        some.read(memoryview(b""), 0, some.length)
        view = some.view(memoryview(b""))
        os.truncate(file.path, 1_000_001)
        assert bytes(view[2_000_000:2_000_100]) == bytes(100)
        assert bytes(view[4_900_000:5_000_003]) == bytes(100_003)
        with pytest.raises(CheckpointError, match="shorter while it was read"):
            some.verify()
        some.release()


def test_a_file_that_is_deleted_while_it_is_used_in_place(file: File) -> None:
    with OpenFiles() as files:
        some = open_range(files, extent(file, 0, len(CONTENT)), "cached", in_place=True)
        os.truncate(file.path, 0)
        file.path.unlink()
        assert bytes(some.view(memoryview(b""))) == bytes(len(CONTENT))
        with pytest.raises(CheckpointError, match="cannot be read: No such file"):
            some.verify()


@each_way
def test_a_disk_that_fails(file: File, way: Way, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Failing(_native.Mapping):
        load = fail

    monkeypatch.setattr(_native, "Mapping", Failing)
    with OpenFiles() as files:
        some = open_range(files, extent(file, 0, 100_000), way, in_place)
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError) as caught:
            read(some)
    reason = os.strerror(errno.EIO) if some.room else "the disk failed"  # a mapping does not say why
    assert str(caught.value) == f"{file.path}: tensor 'w': cannot be read: {reason}"


MAP = """
import ctypes, mmap, os, pathlib, sys
from merge_engine.errors import CheckpointError
from merge_engine.storage import Extent, File, OpenFiles, open_range
file = File.of(pathlib.Path(sys.argv[1]))
files = OpenFiles()
some = open_range(files, Extent(file, "w", 0, file.size), "cached", in_place=True)
view = some.view(memoryview(b""))
"""


def run_mapping(script: str, file: File, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script for which the file is mapped."""
    return subprocess.run(
        [sys.executable, "-c", MAP + script, file.path],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("afterwards", (False, True))
def test_others_handle_their_own_bus_errors(file: File, afterwards: bool) -> None:
    """An earlier handler of SIGBUS still works, while there are mappings and after them."""
    script = f"""
bytes(view)
if {afterwards}:
    files.close()
    del some, view
with open(sys.argv[1] + "-other", "w+b") as file:
    file.truncate(2 * mmap.PAGESIZE)
    memory = mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE)
    file.truncate(0)
    print("touching", flush=True)
    memory[5000]
print("not reached", flush=True)
"""
    done = run_mapping(script, file)
    assert done.returncode == -signal.SIGBUS and done.stdout == "touching\n"


def test_handlers_come_and_go_with_mappings(file: File) -> None:
    before = signal.getsignal(signal.SIGBUS)
    for _ in range(3):
        with OpenFiles() as files:
            assert read(open_range(files, extent(file, 0, 4096), "cached", in_place=True)) == CONTENT[:4096]
    assert signal.getsignal(signal.SIGBUS) == before


OLD_SYSTEM = r"""
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int madvise(void* address, size_t length, int advice) {
    if (advice == 22) { errno = EINVAL; return -1; }  // MADV_POPULATE_READ
    return syscall(SYS_madvise, address, length, advice);
}
"""


def test_a_system_that_cannot_be_asked_for_pages(file: File, tmp_path: Path) -> None:
    """Linux before 5.14, gVisor: pages are touched instead, and what is gone is found out by that."""
    (tmp_path / "old.c").write_text(OLD_SYSTEM)
    library = tmp_path / "old.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "old.c"], check=True)
    script = """
some.read(memoryview(b""), 0, some.length)
some.verify()
assert bytes(view) == file.path.read_bytes()
some.release()
os.truncate(file.path, 1000)
some.read(memoryview(b""), 0, some.length)
try:
    some.verify()
except CheckpointError as error:
    print(error)
"""
    done = run_mapping(script, file, LD_PRELOAD=str(library))
    assert "ended at byte 1000; it became shorter" in done.stdout, done.stderr
