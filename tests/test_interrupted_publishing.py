"""Wherever a merge is interrupted, its folder holds the earlier model, the new one, or visibly none for a while.

Every call that changes the folder is a point where the process is killed, or where the call fails, once or for good.
The folder is then looked at from outside: byte for byte, with all side files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from interrupted import accident, failing, killed
from written import NEW, OLD, ONE_FILE, THREE_SHARDS, TWO_SHARDS, plan, raw

from merge_engine.checkpoint import (
    CheckpointTransaction,
    CheckpointWriter,
    check_output_folder,
    durable,
    open_checkpoint,
    shard_writer,
    write_shard,
)
from merge_engine.checkpoint.records import complete_parts
from merge_engine.checkpoint.unfinished import is_unfinished
from merge_engine.errors import CheckpointError, MergeError, OutputError
from merge_engine.storage import Mount

Files = dict[str, bytes | None]  # None for a folder

EARLIER = ["config.json", "tokenizer.model", "merges.txt", "1_Pooling/config.json", "2_Dense/a/config.json"]
LATER = ["config.json", "tokenizer.json", "1_Pooling/config.json", "3_Dense/b/config.json"]
OURS = {"notes.txt": b"mine", "1_Pooling/mine.txt": b"mine"}


@dataclass(frozen=True)
class Case:
    """An output over an earlier one, or into a new folder. ``limit`` decides how many shards there are."""

    before: int | None
    after: int
    drafts: bool = False

    def write(self, folder: Path, old: bool = False, overwrite: bool = True, key: str = "key") -> None:
        """The merge that is interrupted; or the one before it."""
        state, names = (OLD, EARLIER) if old else (NEW, LATER)
        limit = self.before if old else self.after
        shards = plan(state, limit or 0)
        data = {name: memoryview(raw(tensor)) for name, tensor in state.items()}
        if self.drafts:
            with CheckpointTransaction(folder, shards, key=key, overwrite=overwrite) as transaction:
                drafts = transaction.open_drafts()
                for layout in shards:
                    if layout.name not in transaction.complete:
                        with write_shard(drafts, layout) as shard:
                            shard.write_batch((name, 0, data[name]) for name in layout.tensors)
                        transaction.record(layout, layout.name.encode())
                add_files(transaction, names)
                transaction.finish()
            return
        with CheckpointWriter(
            folder, shards, key=key, overwrite=overwrite, record=lambda layout: layout.name.encode()
        ) as writer:
            for layout in shards:
                if layout.name not in writer.complete:
                    for name in layout.tensors:
                        writer.write(name, 0, data[name])
            add_files(writer, names)
            writer.finish()


CASES = [
    Case(None, TWO_SHARDS),
    Case(ONE_FILE, ONE_FILE),
    Case(ONE_FILE, TWO_SHARDS),
    Case(TWO_SHARDS, TWO_SHARDS),
    Case(THREE_SHARDS, ONE_FILE),
    Case(THREE_SHARDS, TWO_SHARDS, drafts=True),
]
named = pytest.mark.parametrize("case", CASES, ids=str)


def add_files(writer: CheckpointWriter | CheckpointTransaction, names: list[str]) -> None:
    for name in names:
        writer.add_file(name, json.dumps({name: names}).encode())
    writer.add_file("merge_manifest.json", json.dumps({"files": names}).encode())


def files_in(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def visible(folder: Path) -> Files:
    """All files but those of an unfinished merge, and no folders."""
    found = files_in(folder)
    hidden = {entry.name for entry in folder.iterdir() if is_unfinished(entry)}
    return {
        name: data for name, data in found.items() if data is not None and name.split("/")[0] not in hidden
    }


def only_files(found: Files) -> Files:
    return {name: data for name, data in found.items() if data is not None}


class Ground:
    """A folder with the earlier content, and what it must look like."""

    def __init__(self, case: Case, top: Path):
        self.case = case
        self.top = top
        self.checked: list[dict[str, object]] = []
        self.model = top / "model"
        if case.before is not None:
            case.write(self.model, old=True)
            (self.model / "merge_report.html").write_bytes(b"report")
            for name, data in OURS.items():
                (self.model / name).write_bytes(data)
        else:
            self.model.mkdir()
        self.old = files_in(self.model)
        after = self.fresh("after")
        case.write(after)
        self.new = files_in(after)
        expected = {*LATER, *(OURS if case.before else ()), "merge_manifest.json"}
        weights = {name for name, data in self.new.items() if data is not None} - expected
        assert weights and all(name.startswith("model") for name in weights)

    def fresh(self, name: str) -> Path:
        return Path(shutil.copytree(self.model, self.top / name))

    def look(self, folder: Path) -> str:
        """The state of the folder from outside: old, new, none."""
        found = visible(folder)
        if found == only_files(self.old):
            state = "old"
        elif found == only_files(self.new):
            state = "new"
        else:
            state = "none"
            assert not {"model.safetensors", "model.safetensors.index.json"} & {*found}
        if state == "none" or (state == "old" and self.case.before is None):
            with pytest.raises(CheckpointError):
                open_checkpoint(folder)
        else:
            open_checkpoint(folder)
        return state

    def left(self, folder: Path) -> dict[str, object]:
        """All that the next merge finds: names without random digits, bytes, and whether a record is trusted."""
        complete = complete_parts(folder, plan(NEW, self.case.after), "key")
        trusted = {f"{name}.record.part": True for name in complete}
        found = files_in(folder)
        return {re.sub("[0-9a-f]{32}", "", name): trusted.get(name, data) for name, data in found.items()}

    def check_next(self, folder: Path) -> None:
        """Whatever is begun next brings the earlier output back, or completes the new one. Nothing is left over."""
        state = self.look(folder)
        if (left := self.left(folder)) in self.checked:  # many accidents end alike
            shutil.rmtree(folder)
            return
        self.checked.append(left)
        content = self.new if state == "new" else self.old
        assert bool(check_output_folder(folder, [], False, 0)) == bool(content)  # `plan` says what `run` will
        assert not check_output_folder(folder, [], True, 0)
        refused = Path(shutil.copytree(folder, f"{folder}-refused"))
        if content:
            with pytest.raises(OutputError, match="is not empty"):
                self.case.write(refused, overwrite=False)
            assert visible(refused) == only_files(content)
            assert not (refused / "merge.part").exists()
        given_up = Path(shutil.copytree(folder, f"{folder}-given-up"))
        CheckpointWriter(given_up, plan(NEW, self.case.after), overwrite=True).abort()
        assert files_in(given_up) == content
        # A copy has other inodes, so that only the folder itself has complete parts.
        self.case.write(folder, overwrite=bool(content))
        assert files_in(folder) == self.new
        for used in (refused, given_up, folder):
            shutil.rmtree(used)


@pytest.fixture(name="top")
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory, if there can be one: kills and errors lose nothing that was written.

    Few threads sync, because starting them would take a third of the time.
    """
    monkeypatch.setattr(durable, "_AT_ONCE", 2)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(shard_writer, "mount_of", lambda _: Mount("", "/", "ext4"))
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="merge-engine-test-", dir=memory) as folder:
        yield Path(folder)


def numbered(top: Path) -> Iterator[tuple[int, Path]]:
    return ((number, top / str(number)) for number in itertools.count(1))


@named
def test_killed_before_every_call(case: Case, top: Path) -> None:
    ground = Ground(case, top)
    seen = []
    for number, folder in numbered(top):
        ground.fresh(folder.name)
        died = killed(folder, number, lambda folder=folder: case.write(folder))
        seen.append(ground.look(folder))
        ground.check_next(folder)
        if not died:
            break
    assert seen == sorted(seen, key=["old", "none", "new"].index)
    assert seen[-1] == "new" and seen.count("old") > 10 and seen.count("new") > 3
    assert case.before is None or seen.count("none") > 10
    assert len(seen) > 50


@named
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_every_call_fails(case: Case, for_good: bool, top: Path) -> None:
    ground = Ground(case, top)
    seen = []
    for number, folder in numbered(top):
        ground.fresh(folder.name)
        calls = []
        fail = failing(number, 10**9 if for_good else number, (errno.EIO, errno.ENOSPC)[number % 2])

        def act(call: int, calls: list[int] = calls, fail: Callable[[int], None] = fail) -> None:
            calls.append(call)
            fail(call)

        try:
            with accident(folder, act):
                case.write(folder)
            assert ground.look(folder) == "new"
            seen.append("complete")
        except MergeError as error:
            assert "\n" not in str(error) and "cannot be written" in str(error)
            seen.append(ground.look(folder))
            assert for_good or seen[-1] == "old"
        ground.check_next(folder)
        if len(calls) < number:
            break
    assert len(seen) > 50 and seen.count("old") > 30
    assert not case.before or not for_good or "none" in seen


@named
def test_interrupted_before_every_call(case: Case, top: Path) -> None:
    """By Ctrl-C, once: the process tidies up, and leaves the earlier output or the new one, and nothing else."""
    ground = Ground(case, top)
    seen = []
    for number, folder in numbered(top):
        ground.fresh(folder.name)
        calls = []

        def interrupt(call: int, number: int = number, calls: list[int] = calls) -> None:
            calls.append(call)
            if call == number and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt), accident(folder, interrupt):
            case.write(folder, key="")
        seen.append(files_in(folder))
        shutil.rmtree(folder)
        if len(calls) < number:
            break
    assert all(found in (ground.old, ground.new) for found in seen)
    assert seen.count(ground.old) > 30 and seen.count(ground.new) > 3


@pytest.mark.parametrize(
    "case", [Case(THREE_SHARDS, TWO_SHARDS), Case(ONE_FILE, ONE_FILE), Case(None, TWO_SHARDS)], ids=str
)
def test_killed_while_the_earlier_output_is_brought_back(case: Case, top: Path) -> None:
    """By the next merge, which is given up then, at every call; after a kill at some calls of the first."""
    ground = Ground(case, top)
    calls: list[int] = []
    with accident(ground.fresh("counted"), calls.append):
        case.write(top / "counted")
    points = 0
    for first in range(len(calls) * 3 // 5, len(calls), 19):
        killed(ground.fresh(f"{first}"), first, lambda first=first: case.write(top / f"{first}"))
        for second in itertools.count(1, 3):
            folder = Path(shutil.copytree(top / f"{first}", top / f"{first}-{second}"))

            def next_merge(folder: Path = folder) -> None:
                CheckpointWriter(folder, plan(NEW, case.after), overwrite=True).abort()

            died = killed(folder, second, next_merge)
            points += 1
            ground.check_next(folder)
            if not died:
                break
    assert points > 12


@pytest.mark.parametrize("case", [Case(THREE_SHARDS, TWO_SHARDS), Case(ONE_FILE, ONE_FILE)], ids=str)
def test_killed_while_a_failed_rename_is_undone(case: Case, top: Path) -> None:
    ground = Ground(case, top)
    calls: list[int] = []
    with accident(ground.fresh("counted"), calls.append):
        case.write(top / "counted")
    points = 0
    for second in range(len(calls) * 3 // 5, len(calls) + 20, 4):
        folder = ground.fresh(f"{second}")

        def fail_and_die(folder: Path = folder) -> None:
            """The last rename fails, which gives the folder its new model."""
            real = Path.rename

            def rename(path: Path, target: Path) -> Path:
                if target.name in ("model.safetensors", "model.safetensors.index.json") and (
                    path.name.startswith(("new-", "model"))
                ):
                    raise OSError(errno.EIO, "Input/output error")
                return real(path, target)

            with unittest.mock.patch.object(Path, "rename", rename), contextlib.suppress(OutputError):
                case.write(folder)

        points += killed(folder, second, fail_and_die)
        assert ground.look(folder) != "new"
        ground.check_next(folder)
    assert points > 10
