"""Past the page cache or through it: the same bytes, and the choice between them."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.checkpoint import Checkpoint, TensorRange, Way, open_checkpoint
from merge_engine.checkpoint.ranges import CopiedRange
from merge_engine.checkpoint.source import SafetensorsCheckpoint
from merge_engine.engine import reading
from merge_engine.engine.limits import DiskLimits, Limits, save_limits
from merge_engine.errors import CheckpointError
from merge_engine.storage import direct
from merge_engine.storage.mounts import Mount, mount_of


@pytest.fixture
def folder(save_checkpoint: SaveCheckpoint) -> Path:
    """A checkpoint whose tensors begin between pages, one of them larger than the buffer."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"large": 5_000_003, "page": 4096, "small": 5, "empty": 0}
    tensors = {
        name: torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        for name, size in sizes.items()
    }
    return save_checkpoint("inputs", tensors, shards=2)


def read(checkpoint: Checkpoint, name: str, start: int, count: int, past: bool = False) -> bytes:
    target = bytearray(count)
    checkpoint.read_into(name, start, memoryview(target), past)
    return bytes(target)


def read_range(
    checkpoint: Checkpoint, way: Way, name: str, start: int, count: int, size: int = 8192
) -> bytes:
    """The range read in steps, into memory as a ring gives it."""
    some = checkpoint.range(name, start, count, way, in_place=True)
    memory = memoryview(mmap.mmap(-1, max(some.length, 1)))[: some.room]
    for at in range(0, some.length, size):
        some.read(memory, at, min(at + size, some.length))
    try:
        values = bytes(some.view(memory))
        some.verify()
        return values
    finally:
        some.release()


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("buffer", (4096, 65536, 2 << 20))
def test_the_same_bytes_past_the_page_cache(
    folder: Path, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_BUFFER", buffer)
    monkeypatch.setattr(direct, "_local", type(direct._local)())
    through, past = open_checkpoint(folder), open_checkpoint(folder)
    draw = random.Random(0)
    ranges = [(name, 0, info.nbytes) for name, info in through.tensors.items()]
    for _ in range(50):
        start = draw.randrange(5_000_003)
        ranges.append(("large", start, draw.randrange(min(100_000, 5_000_003 - start) + 1)))
    with ThreadPoolExecutor(4) as pool, through, past:
        for wanted, found in zip(
            pool.map(lambda at: read(through, *at), ranges),
            pool.map(lambda at: read(past, *at, past=True), ranges),
            strict=True,
        ):
            assert wanted == found


@pytest.mark.parametrize("call", ("open", "preadv"))
def test_file_systems_that_refuse(folder: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(folder) as checkpoint:
        before, descriptors = read(checkpoint, "large", 1, 1000), open_descriptors()
        original: Callable[..., Any] = getattr(os, call)

        def refuse(target: Any, how: Any, *rest: Any) -> Any:
            if (call == "open" and how & os.O_DIRECT) or (call == "preadv" and len(how[0]) == 4096):
                raise OSError(errno.EINVAL, "Invalid argument")
            return original(target, how, *rest)

        monkeypatch.setattr(os, call, refuse)
        assert read(checkpoint, "large", 1, 1000, past=True) == before
        assert read_range(checkpoint, "direct", "large", 1, 1000) == before
        assert open_descriptors() == descriptors


@pytest.mark.parametrize("way", ("read", "direct", "mapped", "present"))
@pytest.mark.parametrize("size", (4096, 65536, 8 << 20))
def test_the_same_bytes_in_every_way(folder: Path, way: Way, size: int) -> None:
    draw = random.Random(1)
    with open_checkpoint(folder) as checkpoint:
        ranges = [(name, 0, info.nbytes) for name, info in checkpoint.tensors.items()]
        for _ in range(20):
            start = draw.randrange(5_000_003)
            ranges.append(("large", start, draw.randrange(min(300_000, 5_000_003 - start) + 1)))
        for wanted in ranges:
            assert read_range(checkpoint, way, *wanted, size=size) == read(checkpoint, *wanted)


def test_what_is_mapped_is_not_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(folder) as checkpoint:
        expected = read(checkpoint, "large", 0, 5_000_003)
        monkeypatch.setattr(os, "preadv", None)
        assert read_range(checkpoint, "mapped", "large", 0, 5_000_003) == expected
        with pytest.raises(TypeError, match="not callable"):
            read_range(checkpoint, "read", "large", 0, 10)


def test_elements_between_their_multiples_are_copied(tmp_path: Path) -> None:
    """safetensors allows headers of any length."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    values = struct.pack("<3f", 1, 2, 3)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["w"].start % 4 == 1
        for way in ("direct", "mapped"):
            some = checkpoint.range("w", 0, 12, way, in_place=True)
            assert isinstance(some, CopiedRange)
            memory = memoryview(bytearray(12))
            some.read(memory, 0, 12)
            assert bytes(some.view(memory)) == values


@pytest.mark.parametrize("way", ("read", "direct", "mapped", "present"))
def test_a_file_that_shrinks(folder: Path, way: Way) -> None:
    with open_checkpoint(folder) as checkpoint:
        read_range(checkpoint, way, "large", 0, 100_000)
        os.truncate(checkpoint.file_of("large"), 1_000_001)
        with pytest.raises(CheckpointError, match="shorter while it was read"):
            read_range(checkpoint, way, "large", 900_000, 200_000)


def test_a_file_that_shrinks_while_it_is_used_in_place(folder: Path) -> None:
    """Touching what is gone would kill the process: it finds zeros, and the range says so afterwards."""
    with open_checkpoint(folder) as checkpoint:
        some = checkpoint.range("large", 0, 5_000_003, "mapped", in_place=True)
        some.read(memoryview(b""), 0, some.length)
        view = some.view(memoryview(b""))
        os.truncate(checkpoint.file_of("large"), 1_000_001)
        assert bytes(view[2_000_000:2_000_100]) == bytes(100)
        assert bytes(view[4_900_000:5_000_003]) == bytes(100_003)
        with pytest.raises(CheckpointError, match="shorter while it was read"):
            some.verify()
        some.release()


def test_others_handle_their_own_bus_errors(folder: Path) -> None:
    """Whoever handled SIGBUS before still does, while there are mappings and after them."""
    script = f"""
import ctypes, mmap, os, pathlib, signal, sys
from merge_engine.checkpoint import open_checkpoint
checkpoint = open_checkpoint(pathlib.Path({str(folder)!r}))
some = checkpoint.range("large", 0, 100, "mapped", in_place=True)
bytes(some.view(memoryview(b"")))
with open({str(folder / "other")!r}, "w+b") as file:
    file.truncate(2 * mmap.PAGESIZE)
    memory = mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE)
    file.truncate(0)
    print("touching", flush=True)
    memory[5000]
print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS and done.stdout == "touching\n"


def test_handlers_come_and_go_with_mappings(folder: Path) -> None:
    before = signal.getsignal(signal.SIGBUS)
    for _ in range(3):
        with open_checkpoint(folder) as checkpoint:
            assert read_range(checkpoint, "mapped", "page", 0, 4096) == read(checkpoint, "page", 0, 4096)
    assert signal.getsignal(signal.SIGBUS) == before


RATES = {
    "slower": (2e9, 1e9),
    "as fast": (1e9, 1e9),
    "a little faster": (1e9, 1.2e9),
    "much faster": (1e9, 3e9),
}


@pytest.mark.parametrize(
    ("rates", "kept", "share", "memory", "given_back", "chosen"),
    (
        ("a little faster", False, 0.0, "400MB", False, "direct"),
        ("slower", False, 0.0, "400MB", False, "mapped"),
        (None, False, 0.0, "400MB", True, "mapped"),  # not measured
        (
            "a little faster",
            True,
            0.0,
            "400MB",
            False,
            "mapped",
        ),  # the next run will find it in the page cache
        ("much faster", True, 0.0, "400MB", False, "direct"),  # even so
        ("as fast", True, 0.0, "400MB", False, "mapped"),
        ("as fast", True, 0.0, "400MB", True, "direct"),  # the page cache would have to ask for memory
        ("slower", True, 0.0, "400MB", True, "mapped"),
        ("much faster", False, 0.9, "400MB", False, "mapped"),  # it is there
        ("much faster", False, 0.0, "400KB", False, "mapped"),  # read more than once
    ),
)
def test_the_choice(
    save_checkpoint: SaveCheckpoint,
    tmp_path: Path,
    rates: str | None,
    kept: bool,
    share: float,
    memory: str,
    given_back: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, a = (save_checkpoint(name, {"w": torch.randn(300, 500).bfloat16()}) for name in ("base", "a"))
    recipe = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(a), "parameters": {"weight": 1, "density": 0.5}}],
    }
    disks = {str(mount_of(tmp_path)): DiskLimits(*RATES[rates], 1e10, 1e9)} if rates else {}
    save_limits(Limits(memory=1e10, disks=disks))
    seen: Counter[str] = Counter()
    original = SafetensorsCheckpoint.range

    def note(self: SafetensorsCheckpoint, *arguments: Any, **more: Any) -> TensorRange:
        some = original(self, *arguments, **more)
        seen[type(some).__name__.removesuffix("Range").lower()] += 1
        return some

    with monkeypatch.context() as patch:
        patch.setattr(reading, "_LARGE", 1)
        patch.setattr(reading, "gives_memory_back", lambda: given_back)
        patch.setattr(reading, "_available_memory", lambda: 1 << 40 if kept else 10)
        patch.setattr(reading, "cached_share", lambda *_: share)
        patch.setattr(reading, "maps_faster", lambda _: True)
        patch.setattr(SafetensorsCheckpoint, "range", note)
        result = me.run(recipe, tmp_path / "out", memory=memory)
    assert set(seen) == {chosen}
    assert result.usage is not None
    direct = {resource.name: resource.bytes for resource in result.usage.resources}["direct read"]
    assert direct == (2 * 300 * 500 * 2 if chosen == "direct" else 0)
    save_limits(Limits())
    me.run(recipe, tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("share", "in_place", "local", "faster", "chosen"),
    (
        (1.0, True, True, True, "present"),
        (0.9, True, True, True, "mapped"),
        (1.0, False, True, True, "read"),  # a device takes its inputs from memory of our own
        (1.0, True, False, True, "read"),  # a network is read a page at a time through mappings
        (1.0, True, True, False, "read"),  # small folios: mapping them takes as long as copying
    ),
)
def test_what_the_page_cache_holds(
    save_checkpoint: SaveCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    in_place: bool,
    local: bool,
    faster: bool,
    chosen: str,
) -> None:
    folder = save_checkpoint("a", {"w": torch.randn(30, 50)})
    backend = create_backend("cpu")
    monkeypatch.setattr(backend, "reads_in_place", in_place)
    monkeypatch.setattr(Mount, "local", local)
    monkeypatch.setattr(reading, "maps_faster", lambda _: faster)
    monkeypatch.setattr(reading, "cached_share", lambda *_: share)
    models = [{"model": str(folder), "parameters": {"weight": 1}}]
    with me.plan({"merge_method": "linear", "models": models}) as plan:
        ways = reading.choose_reading(plan, Limits(), backend).ways
        assert plan.in_place == (chosen != "read")
    assert {way for both in ways.values() for way in both} == {chosen}
