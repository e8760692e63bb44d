"""Shards that other processes write: in any order, again, killed, late. The checkpoint is the same or is not there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import elsewhere
import pytest
import torch
from written import (
    NEW,
    OLD,
    STATE,
    THREE_SHARDS,
    TWO_SHARDS,
    State,
    assert_same,
    load_folder,
    names_in,
    plan,
    raw,
    write_checkpoint,
)

from merge_engine.checkpoint import (
    CheckpointTransaction,
    ShardLayout,
    ShardWriter,
    check_output_folder,
    open_checkpoint,
    write_shard,
)
from merge_engine.errors import CheckpointError, OutputError

SPAWN = multiprocessing.get_context("spawn")
NEW_DATA = {name: raw(tensor) for name, tensor in NEW.items()}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=SPAWN) as processes:
        yield processes


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def expected_files(folder: Path, state: State, limit: int) -> dict[str, bytes]:
    """What an ordinary run writes."""
    write_checkpoint(folder, state, limit)
    return files_in(folder)


def write_here(drafts: Path, layout: ShardLayout, state: State) -> None:
    with write_shard(drafts, layout) as shard:
        shard.write_batch((name, 0, memoryview(raw(state[name]))) for name in layout.tensors)


@pytest.mark.parametrize("reverse", [False, True])
def test_any_process_in_any_order_and_one_shard_twice(
    reverse: bool, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    shards = plan(STATE, 100_000)
    assert len(shards) == 2
    data = {name: raw(tensor) for name, tensor in STATE.items()}
    write_checkpoint(tmp_path / "out", OLD, THREE_SHARDS)
    before = files_in(tmp_path / "out")
    with CheckpointTransaction(tmp_path / "out", shards, overwrite=True) as transaction:
        drafts = transaction.open_drafts()
        order = [*shards, shards[0]]
        for layout in reversed(order) if reverse else order:
            sent = pool.submit(elsewhere.write_one, drafts, pickle.loads(pickle.dumps(layout)), data)
            sent.result(60)
        assert files_in(tmp_path / "out").items() >= before.items()
        transaction.finish()
    assert files_in(tmp_path / "out") == expected_files(tmp_path / "ordinary", STATE, 100_000)


def test_many_at_once(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    state = {f"t.{i}": tensor for i, tensor in enumerate([*NEW.values()] * 4)}
    data = {name: raw(tensor) for name, tensor in state.items()}
    shards = plan(state, THREE_SHARDS)
    with CheckpointTransaction(tmp_path / "out", shards) as transaction:
        drafts = transaction.open_drafts()
        sent = [pool.submit(elsewhere.write_one, drafts, layout, data) for layout in shards * 2]
        wrote = {future.result(60) for future in sent if future.exception(60) is None}
        assert wrote
        for future in sent:  # two of the same shard at the same time: one may have been too early
            assert future.exception(60) is None or "this copy of the shard is not used" in str(
                future.exception()
            )
        transaction.finish()
    assert files_in(tmp_path / "out") == expected_files(tmp_path / "ordinary", state, THREE_SHARDS)


def test_killed_in_the_middle_and_done_again(tmp_path: Path) -> None:
    shards = plan(NEW, TWO_SHARDS)
    with CheckpointTransaction(tmp_path / "out", shards) as transaction:
        drafts = transaction.open_drafts()
        write_here(drafts, shards[1], NEW)
        child = SPAWN.Process(target=elsewhere.die_in_the_middle, args=(drafts, shards[0], NEW_DATA))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert len(list(drafts.iterdir())) == 1
        with pytest.raises(OutputError, match=f"not written: {shards[0].name}; "):
            transaction.finish()
        write_here(drafts, shards[0], NEW)
        assert list(drafts.iterdir()) == []
        transaction.finish()
    assert files_in(tmp_path / "out") == expected_files(tmp_path / "ordinary", NEW, TWO_SHARDS)


def test_a_missing_shard_is_named_and_the_earlier_output_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, TWO_SHARDS)
    before = names_in(tmp_path)
    shards = plan(NEW, THREE_SHARDS)
    with CheckpointTransaction(tmp_path, shards, overwrite=True) as transaction:
        drafts = transaction.open_drafts()
        transaction.add_file("config.json", b"{}")
        write_here(drafts, shards[1], NEW)
        with pytest.raises(OutputError, match=f"not written: {shards[0].name}, {shards[2].name}; "):
            transaction.finish()
    assert names_in(tmp_path) == before
    assert_same(load_folder(tmp_path), OLD)


def test_a_shard_is_complete_or_not_there(tmp_path: Path) -> None:
    shards = plan(NEW, TWO_SHARDS)
    first, *_ = shards[0].tensors
    with CheckpointTransaction(tmp_path, shards) as transaction:
        drafts = transaction.open_drafts()
        with (
            pytest.raises(OutputError, match=r"not completely written: b$"),
            write_shard(drafts, shards[0]) as shard,
        ):
            shard.write(first, 0, memoryview(NEW_DATA[first]))
        with pytest.raises(KeyboardInterrupt), write_shard(drafts, shards[0]) as shard:
            shard.write_batch((name, 0, memoryview(NEW_DATA[name])) for name in shards[0].tensors)
            raise KeyboardInterrupt
        assert names_in(tmp_path) == [drafts.name]
        with write_shard(drafts, shards[0]) as shard:
            assert not (tmp_path / shards[0].part_name).exists()
            shard.write_batch((name, 0, memoryview(NEW_DATA[name])) for name in shards[0].tensors)
        assert names_in(tmp_path) == [drafts.name, shards[0].part_name]
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("first_ends_first", [False, True])
def test_of_two_copies_at_once_the_later_one_is_used(first_ends_first: bool, tmp_path: Path) -> None:
    (layout,) = plan(NEW, 10**9)
    with CheckpointTransaction(tmp_path / "out", [layout]) as transaction:
        drafts = transaction.open_drafts()
        earlier, later = write_shard(drafts, layout), write_shard(drafts, layout)
        one = earlier.__enter__()
        one.write("a", 0, memoryview(raw(OLD["a"])))
        other = later.__enter__()
        for name in "bc":
            one.write(name, 0, memoryview(raw(OLD[name])))
        if first_ends_first:
            with pytest.raises(
                OutputError, match="this copy of the shard is not used: another process has begun it"
            ):
                earlier.__exit__(None, None, None)
        other.write_batch((name, 0, memoryview(NEW_DATA[name])) for name in "abc")
        later.__exit__(None, None, None)
        if not first_ends_first:
            with pytest.raises(
                OutputError, match="this copy of the shard is not used: another process has begun it"
            ):
                earlier.__exit__(None, None, None)
        transaction.finish()
    assert files_in(tmp_path / "out") == expected_files(tmp_path / "ordinary", NEW, 10**9)


@pytest.mark.parametrize("ending", ["finish", "abort"])
def test_a_process_that_is_late_changes_nothing(ending: str, tmp_path: Path) -> None:
    """Neither after its merge has ended, nor while the next one writes the same shards."""
    folder = tmp_path / "out"
    (layout,) = plan(NEW, 10**9)
    transaction = CheckpointTransaction(folder, [layout])
    drafts = transaction.open_drafts()
    write_here(drafts, layout, NEW)
    late = write_shard(drafts, layout)
    shard = late.__enter__()
    getattr(transaction, ending)()
    left = names_in(folder) if ending == "finish" else []
    assert left == (["model.safetensors"] if ending == "finish" else [])
    with CheckpointTransaction(folder, [layout], overwrite=True) as following:
        others = following.open_drafts()
        write_here(others, layout, NEW)
        shard.write_batch((name, 0, memoryview(raw(OLD[name]))) for name in "abc")
        with pytest.raises(OutputError, match="or the merge that it belongs to has ended"):
            late.__exit__(None, None, None)
        with pytest.raises(
            OutputError, match="the merge that the shard belongs to has ended; start it again"
        ):
            write_here(drafts, layout, OLD)
        following.finish()
    assert names_in(folder) == ["model.safetensors"]
    assert_same(load_folder(folder), NEW)


def test_a_merge_whose_first_process_was_killed(tmp_path: Path) -> None:
    """It leaves an unfinished merge, which the next one removes; its other processes can do no harm any more."""
    folder = tmp_path / "out"
    shards = plan(NEW, TWO_SHARDS)
    child = SPAWN.Process(target=elsewhere.open_and_die, args=(folder, shards, NEW_DATA))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert (folder / shards[0].part_name).exists()
    (drafts,) = (entry for entry in folder.iterdir() if entry.is_dir())
    with pytest.raises(
        CheckpointError, match=f"unfinished merge: it holds {drafts.name}, {shards[0].part_name}"
    ):
        open_checkpoint(folder)
    assert check_output_folder(folder, [], overwrite=False, needed_bytes=0) == []

    late = write_shard(drafts, shards[1])
    shard = late.__enter__()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    mine = folder / f"merge-{'x' * 32}.part", folder / f"merge-{'0' * 32}.part"
    mine[0].mkdir()
    mine[1].symlink_to(outside)
    with CheckpointTransaction(folder, shards, overwrite=True) as transaction:
        others = transaction.open_drafts()
        write_here(others, shards[0], NEW)
        shard.write_batch((name, 0, memoryview(raw(OLD[name]))) for name in shards[1].tensors)
        with pytest.raises(OutputError, match="or the merge that it belongs to has ended"):
            late.__exit__(None, None, None)
        with pytest.raises(OutputError, match=f"not written: {shards[1].name}; "):
            transaction.finish()
        write_here(others, shards[1], NEW)
        transaction.finish()
    assert mine[0].is_dir() and mine[1].is_symlink() and (outside / "precious").exists()
    for entry in mine:
        entry.unlink() if entry.is_symlink() else entry.rmdir()
    assert files_in(folder) == expected_files(tmp_path / "ordinary", NEW, TWO_SHARDS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda part: part.write_bytes(part.read_bytes()[:-1]), "bytes, not "),
        (lambda part: part.write_bytes(part.read_bytes() + b"x"), "bytes, not "),
        (
            lambda part: part.write_bytes(bytes(part.stat().st_size)),
            "begins with another header than was planned",
        ),
        (lambda part: part.symlink_to(part.rename(part.with_name("moved"))), "cannot be written"),
        (lambda part: (part.unlink(), os.mkfifo(part)), "has 0 bytes, not "),
        (lambda part: (part.unlink(), part.mkdir()), "is a folder|Is a directory"),
    ],
)
def test_a_part_that_is_not_what_was_planned(
    change: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, OLD, TWO_SHARDS)
    shards = plan(NEW, TWO_SHARDS)
    transaction = CheckpointTransaction(tmp_path, shards, overwrite=True)
    drafts = transaction.open_drafts()
    for layout in shards:
        write_here(drafts, layout, NEW)
    part = tmp_path / shards[1].part_name
    change(part)
    with pytest.raises(OutputError, match=f"{part}: .*({said})"):
        transaction.finish()
    assert_same(load_folder(tmp_path), OLD)
    if part.is_dir():
        part.rmdir()
    write_here(drafts, shards[1], NEW)
    transaction.finish()
    assert_same(load_folder(tmp_path), NEW)


def test_without_drafts_it_is_as_if_there_were_none(tmp_path: Path) -> None:
    """A transaction whose shards are written in this process alone makes no folder of drafts."""
    (layout,) = plan(NEW, 10**9)
    with CheckpointTransaction(tmp_path, [layout]) as transaction:
        shard = ShardWriter(transaction.part_of(layout), layout)
        shard.write_batch((name, 0, memoryview(NEW_DATA[name])) for name in "abc")
        assert names_in(tmp_path) == [layout.part_name]
        shard.finish()
        transaction.finish()
    assert_same(load_folder(tmp_path), NEW)


def test_the_example_in_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = text.split("## Crash safety")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert_same(load_folder(tmp_path / "merged"), {"w": torch.zeros(2, 2)})
