"""Past the page cache or through it: the same bytes, and the choice between them."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint

import merge_engine as me
from merge_engine.checkpoint import direct
from merge_engine.checkpoint.source import SafetensorsCheckpoint, open_checkpoint
from merge_engine.engine import reading
from merge_engine.engine.limits import DiskLimits, Limits, save_limits
from merge_engine.engine.machine import mount_of
from merge_engine.errors import CheckpointError


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


def read(checkpoint: SafetensorsCheckpoint, name: str, start: int, count: int) -> bytes:
    target = bytearray(count)
    checkpoint.read_into(name, start, memoryview(target))
    return bytes(target)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("buffer", (4096, 65536, 2 << 20))
def test_the_same_bytes_past_the_page_cache(
    folder: Path, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_BUFFER", buffer)
    monkeypatch.setattr(direct, "_local", type(direct._local)())
    through, past = open_checkpoint(folder), open_checkpoint(folder)
    assert isinstance(through, SafetensorsCheckpoint) and isinstance(past, SafetensorsCheckpoint)
    past.bypass_page_cache()
    draw = random.Random(0)
    ranges = [(name, 0, info.nbytes) for name, info in through.tensors.items()]
    for _ in range(50):
        start = draw.randrange(5_000_003)
        ranges.append(("large", start, draw.randrange(min(100_000, 5_000_003 - start) + 1)))
    with ThreadPoolExecutor(4) as pool, through, past:
        for wanted, found in zip(
            pool.map(lambda at: read(through, *at), ranges),
            pool.map(lambda at: read(past, *at), ranges),
            strict=True,
        ):
            assert wanted == found


@pytest.mark.parametrize("call", ("open", "preadv"))
def test_file_systems_that_refuse(folder: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        before, descriptors = read(checkpoint, "large", 1, 1000), open_descriptors()
        original: Callable[..., Any] = getattr(os, call)

        def refuse(target: Any, how: Any, *rest: Any) -> Any:
            if (call == "open" and how & os.O_DIRECT) or (call == "preadv" and len(how[0]) == 4096):
                raise OSError(errno.EINVAL, "Invalid argument")
            return original(target, how, *rest)

        monkeypatch.setattr(os, call, refuse)
        checkpoint.bypass_page_cache()
        assert read(checkpoint, "large", 1, 1000) == before
        assert open_descriptors() == descriptors


def test_a_file_that_shrinks(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        checkpoint.bypass_page_cache()
        read(checkpoint, "large", 0, 10)
        os.truncate(checkpoint.file_of("large"), 1_000_001)
        with pytest.raises(CheckpointError, match="shorter while it was read"):
            read(checkpoint, "large", 900_000, 200_000)


@pytest.mark.parametrize(
    ("rates", "available", "share", "memory", "chosen"),
    (
        ((1e9, 2e9), 10, 0.0, "400MB", "direct"),
        ((2e9, 1e9), 10, 0.0, "400MB", "read"),  # slower here
        (None, 10, 0.0, "400MB", "read"),  # not measured
        ((1e9, 2e9), 1 << 40, 0.0, "400MB", "read"),  # the next run will find it in the page cache
        ((1e9, 2e9), 10, 0.9, "400MB", "read"),  # it is there
        ((1e9, 2e9), 10, 0.0, "400KB", "read"),  # read more than once
    ),
)
def test_the_choice(
    save_checkpoint: SaveCheckpoint,
    tmp_path: Path,
    rates: tuple[float, float] | None,
    available: int,
    share: float,
    memory: str,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, a = (save_checkpoint(name, {"w": torch.randn(300, 500).bfloat16()}) for name in ("base", "a"))
    recipe = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(a), "parameters": {"weight": 1, "density": 0.5}}],
    }
    disks = {str(mount_of(tmp_path)): DiskLimits(*rates, 1e10, 1e9)} if rates else {}
    save_limits(Limits(memory=1e10, disks=disks))
    monkeypatch.setattr(reading, "_available_memory", lambda: available)
    monkeypatch.setattr(reading, "cached_share", lambda _: share)
    result = me.run(recipe, tmp_path / "out", memory=memory)
    assert result.usage is not None
    assert result.usage.resources[0].name == ("direct read" if chosen == "direct" else "disk read")
    monkeypatch.undo()
    me.run(recipe, tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
