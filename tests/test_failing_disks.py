"""Disks that fail, fill up or lose data in the middle of a run: one clear error, nothing left behind.

The faults are in the system calls, below all of our code.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SaveCheckpoint
from safetensors.torch import load_file
from test_faults import SHARD, SMALL, Setup

import merge_engine as me
import merge_engine._native as _native
from merge_engine.engine.work import Work
from merge_engine.storage import Way


@pytest.fixture
def setup(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> Setup:
    return Setup(save_checkpoint, tmp_path)


def failing_from(nth: int, call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """From the n-th call on, the system reports this error: a failed disk does not come back."""
    calls = itertools.count(1)

    def fail(*arguments: Any) -> Any:
        if next(calls) >= nth:
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return fail


@pytest.mark.parametrize("nth", (1, 2, 5))
@pytest.mark.parametrize("way", ("cached", "direct"))
def test_a_disk_that_cannot_be_read_any_more(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, nth: int, way: Way
) -> None:
    monkeypatch.setattr(os, "preadv", failing_from(nth, os.preadv, errno.EIO))
    message = setup.refused(me.CheckpointError, "cannot be read", os.strerror(errno.EIO), way=way)
    assert message.count("\n") == 0 and ".safetensors" in message


@pytest.mark.parametrize("number", (errno.EIO, errno.ENOSPC, errno.EDQUOT))
@pytest.mark.parametrize("nth", (1, 2, 4))  # the first write is the header's
@pytest.mark.parametrize("earlier", (False, True))
def test_a_disk_that_takes_no_more(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, nth: int, number: int, earlier: bool
) -> None:
    if earlier:
        me.run(setup.recipe(seed=1), setup.output)
    monkeypatch.setattr(os, "pwrite", failing_from(nth, os.pwrite, number))
    message = setup.refused(
        me.OutputError,
        setup.output / "model.safetensors.part",
        os.strerror(number),
        "free space",
        memory=SMALL,
        overwrite=earlier,
    )
    assert message.count("\n") == 0
    if earlier:
        load_file(setup.output / "model.safetensors")


def test_a_disk_that_loses_what_it_took(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_from(1, os.fsync, errno.EIO))
    setup.refused(me.OutputError, setup.output, os.strerror(errno.EIO), memory=SMALL)


def test_an_input_that_becomes_shorter_while_it_is_read(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, preadv = setup.b / SHARD, os.preadv

    def shrink(descriptor: int, *arguments: Any) -> int:
        if os.path.samestat(os.fstat(descriptor), victim.stat()):
            os.truncate(victim, 20_000)
        return preadv(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", shrink)
    setup.refused(me.CheckpointError, victim, "shorter while it was read", way="cached")


@pytest.mark.parametrize("size", (0, 20_000, 30_000))
def test_an_input_that_becomes_shorter_while_it_is_merged_in_place(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    victim, measure = setup.b / SHARD, Work.measure

    def shrink(self: Work) -> None:
        if any(file.path == victim for operand in self.visit.task.inputs for file in operand.files):
            os.truncate(victim, min(size, victim.stat().st_size))
        measure(self)

    monkeypatch.setattr(Work, "measure", shrink)
    setup.refused(me.CheckpointError, victim, "shorter while it was read", way="cached", in_place=True)


@pytest.mark.parametrize("name", ("config.json", "tokenizer.json"))
@pytest.mark.parametrize(
    "change", (Path.unlink, Path.touch, lambda file: (file.parent / "new").replace(file))
)
def test_a_side_file_that_changes_while_it_is_merged(
    setup: Setup, name: str, change: Callable[[Path], Any]
) -> None:
    """Without an error the output would have another tokenizer, or none."""
    file, waiting = setup.base / name, [change]
    for one in (file, file.parent / "new"):
        one.write_text('{"dtype": "bfloat16"}')
    os.utime(file, (1, 1))
    with pytest.raises(me.CheckpointError, match=f"{setup.base}.*{name}"):
        me.run(setup.recipe(), setup.output, progress=lambda _: waiting and waiting.pop()(file))
    assert all(one.name.endswith(".part") for one in setup.output.iterdir())


def test_a_disk_that_fails_under_a_mapping(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        torn = False

        def __init__(self, *_: object) -> None:
            pass

        def view(self, first: int, last: int) -> memoryview:
            return memoryview(bytes(last - first))

        def load(self, first: int, last: int) -> None:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    monkeypatch.setattr(_native, "Mapping", Failing)
    whole = 384_000_000  # what is mapped at once is loaded first
    setup.refused(
        me.CheckpointError, "cannot be read", ".safetensors", way="cached", in_place=True, memory=whole
    )


def test_short_reads_and_writes_change_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = me.run(setup.recipe(), setup.output).output
    assert expected is not None
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:9973]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:8192], at))
    fresh = setup.output.with_name("fresh")
    setup.output = fresh
    setup.run_reading("cached", False, 400_000)
    assert (fresh / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
