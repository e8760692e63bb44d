"""What an interrupted merge leaves in a folder: taken over by the same merge, in nobody's way, never trusted."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from written import (
    NEW,
    OLD,
    ONE_FILE,
    THREE_SHARDS,
    assert_same,
    load_folder,
    names_in,
    plan,
    raw,
    write_all,
    write_checkpoint,
)
from xxhash import xxh3_128_hexdigest

from merge_engine.checkpoint import CheckpointTransaction, CheckpointWriter, ShardLayout, write_shard
from merge_engine.checkpoint.records import complete_parts
from merge_engine.checkpoint.unfinished import unfinished_files
from merge_engine.errors import CheckpointError, OutputError

SHARDS = plan(NEW, THREE_SHARDS)
FIRST, SECOND, THIRD = SHARDS


def record_of(layout: ShardLayout) -> bytes:
    return b"\x00\n" + layout.name.encode()


def begin(folder: Path, key: str = "one", count: int = 2) -> None:
    """A merge that fails when ``count`` shards are complete."""
    with (
        pytest.raises(OutputError, match="not completely written"),
        CheckpointWriter(folder, SHARDS, key=key, record=record_of) as writer,
    ):
        writer.add_file("config.json", b"{}")
        for layout in SHARDS[:count]:
            for name in layout.tensors:
                writer.write(name, 0, memoryview(raw(NEW[name])))
        writer.finish()
    assert writer.kept == ([layout.name for layout in SHARDS[:count]] if key else [])


def go_on(folder: Path, key: str = "one") -> dict[str, bytes]:
    """Complete the merge. Returns the records that were there."""
    with CheckpointWriter(folder, SHARDS, key=key, record=record_of) as writer:
        for layout in SHARDS:
            if layout.name not in writer.complete:
                for name in layout.tensors:
                    writer.write(name, 0, memoryview(raw(NEW[name])))
        found = dict(writer.complete)
        writer.finish()
    assert writer.kept == []
    assert_same(load_folder(folder), NEW)
    assert names_in(folder) == sorted([*(layout.name for layout in SHARDS), "model.safetensors.index.json"])
    return found


def test_complete_shards_are_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    begin(folder)
    assert names_in(folder) == sorted(
        name for layout in (FIRST, SECOND) for name in (layout.part_name, layout.record_name)
    )
    inodes = {layout.name: (folder / layout.part_name).stat().st_ino for layout in (FIRST, SECOND)}
    assert go_on(folder) == {layout.name: record_of(layout) for layout in (FIRST, SECOND)}
    assert inodes == {name: (folder / name).stat().st_ino for name in inodes}


@pytest.mark.parametrize(("first", "then"), [("one", "other"), ("one", ""), ("", "one"), ("", "")])
def test_another_merge_begins_anew(first: str, then: str, tmp_path: Path) -> None:
    begin(tmp_path / "out", first)
    assert go_on(tmp_path / "out", then) == {}


def rewritten_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize(
    "change",
    [
        rewritten_in_place,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.symlink_to(path.rename(path.parent.parent / "moved")),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
)
@pytest.mark.parametrize("name", [FIRST.part_name, FIRST.record_name])
def test_what_has_changed_is_merged_again(
    name: str, change: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    begin(folder)
    change(folder / name)
    assert [*go_on(folder)] == [SECOND.name] or change is rewritten_in_place


def test_every_byte_of_a_record_counts(tmp_path: Path) -> None:
    begin(tmp_path, count=1)
    path, part = tmp_path / FIRST.record_name, tmp_path / FIRST.part_name
    whole = path.read_bytes()
    assert complete_parts(tmp_path, SHARDS, "one") == {FIRST.name: record_of(FIRST)}
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert complete_parts(tmp_path, SHARDS, "one") == {}
        path.write_bytes(whole[:place])
        assert complete_parts(tmp_path, SHARDS, "one") == {}
    path.write_bytes(whole)
    assert complete_parts(tmp_path, SHARDS, "other") == {}
    assert complete_parts(tmp_path, SHARDS, "one") == {FIRST.name: record_of(FIRST)}
    os.utime(part)
    assert complete_parts(tmp_path, SHARDS, "one") == {}


def test_shards_of_other_processes_are_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with CheckpointTransaction(folder, SHARDS, key="one") as transaction:
        drafts = transaction.open_drafts()
        for layout in (SECOND, THIRD):
            with write_shard(drafts, layout) as shard:
                shard.write_batch((name, 0, memoryview(raw(NEW[name]))) for name in layout.tensors)
        transaction.record(THIRD, record_of(THIRD))
        assert transaction.kept == [THIRD.name]
    assert names_in(folder) == [THIRD.part_name, THIRD.record_name]
    assert go_on(folder) == {THIRD.name: record_of(THIRD)}


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """The folder was good when the merge was planned; another merge has completed since."""
    write_checkpoint(tmp_path, OLD, ONE_FILE)
    before = names_in(tmp_path)
    for kind in (CheckpointWriter, CheckpointTransaction):
        with pytest.raises(OutputError, match="is not empty; choose another folder or pass --overwrite"):
            kind(tmp_path, SHARDS)
    assert names_in(tmp_path) == before
    assert_same(load_folder(tmp_path), OLD)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00009.safetensors"])
def test_a_file_that_comes_during_the_merge_is_not_replaced(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=f"{name} came into it during the merge"),
        CheckpointWriter(tmp_path, plan(NEW, ONE_FILE), key="one", record=record_of) as writer,
    ):
        write_all(writer, NEW)
        writer.add_file("config.json", b"{}")
        (tmp_path / name).write_text("theirs")
        (tmp_path / "notes.txt").write_text("theirs")
        writer.finish()
    assert (tmp_path / name).read_text() == "theirs"
    assert writer.kept == ["model.safetensors"]
    (tmp_path / "model.safetensors.part").unlink()
    assert writer.kept == []


def test_weights_that_come_during_the_merge_are_not_mixed_with_it(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"holds pytorch_model\.bin, which a loader could take"),
        CheckpointWriter(tmp_path, plan(NEW, ONE_FILE), overwrite=True) as writer,
    ):
        write_all(writer, NEW)
        (tmp_path / "pytorch_model.bin").touch()
        writer.finish()
    assert names_in(tmp_path) == ["pytorch_model.bin"]


def test_parts_of_other_programs_are_no_merge(tmp_path: Path) -> None:
    for name in ("mine.safetensors.part", "download.part", "merge-1.part", "model-1.safetensors.part"):
        (tmp_path / name).touch()
    assert unfinished_files(tmp_path) == []


def test_a_refused_merge_keeps_the_complete_shards(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    begin(folder)
    before = names_in(folder)
    (folder / "notes.txt").touch()
    with pytest.raises(OutputError, match="is not empty"):
        CheckpointWriter(folder, SHARDS, key="one")
    (folder / "notes.txt").unlink()
    assert names_in(folder) == before


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_files_are_copied_with_their_digests(size: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    linked = tmp_path / "link"
    linked.symlink_to(source)
    with CheckpointWriter(tmp_path / "out", plan(NEW, ONE_FILE)) as writer:
        writer.copy_file("a/tokenizer.json", linked)
        writer.add_file("config.json", b"{}")
        assert writer.files == {
            "a/tokenizer.json": (size, xxh3_128_hexdigest(source.read_bytes())),
            "config.json": (2, xxh3_128_hexdigest(b"{}")),
        }
        for name, tensor in NEW.items():
            writer.write(name, 0, memoryview(raw(tensor)))
        writer.finish()
    assert (tmp_path / "out" / "a" / "tokenizer.json").read_bytes() == source.read_bytes()


def test_only_regular_files_are_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    with CheckpointWriter(tmp_path / "out", plan(NEW, ONE_FILE)) as writer:
        for source in (
            tmp_path / "pipe",
            Path("/dev/zero"),
            tmp_path,
            tmp_path / "broken",
            tmp_path / "none",
        ):
            with pytest.raises(CheckpointError, match=str(source)):
                writer.copy_file("x", source)
    assert not (tmp_path / "out").exists()


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    name = "n" * 255
    write_checkpoint(tmp_path, OLD, ONE_FILE)
    for _ in range(2):
        with CheckpointWriter(tmp_path, plan(NEW, ONE_FILE), overwrite=True) as writer:
            writer.add_file(name, b"x")
            for tensor_name, tensor in NEW.items():
                writer.write(tensor_name, 0, memoryview(raw(tensor)))
            writer.finish()
    assert names_in(tmp_path) == ["model.safetensors", name]
    with (
        pytest.raises(OutputError, match="File name too long"),
        CheckpointWriter(tmp_path, plan(NEW, ONE_FILE), overwrite=True) as writer,
    ):
        writer.add_file("n" * 256, b"x")
    assert_same(load_folder(tmp_path), NEW)


def leave_staged(folder: Path, journal: object, *names: str) -> Path:
    staged = folder / "merge.part"
    staged.mkdir(parents=True)
    for name in names:
        (staged / name).write_text(name)
    if journal is not None:
        (staged / "journal").write_text(journal if isinstance(journal, str) else json.dumps(journal))
    return staged


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        "{}",
        {"earlier": ["config.json"], "files": []},
        {"earlier": "config.json", "files": [], "shards": []},
        {"earlier": ["../outside"], "files": [], "shards": ["model.safetensors"]},
        {"earlier": ["/outside"], "files": [], "shards": ["model.safetensors"]},
        {"earlier": ["link/x"], "files": [], "shards": ["model.safetensors"]},
        {"earlier": [], "files": ["link/x"], "shards": ["model.safetensors"]},
        {"earlier": [], "files": [], "shards": [1]},
        {"earlier": ["a.txt"], "files": ["b.txt"], "shards": []},
    ],
)
def test_a_damaged_journal_changes_nothing(journal: object, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    staged = leave_staged(folder, journal, "old-0", "new-0")
    (folder / "link").symlink_to(tmp_path)
    before = names_in(tmp_path)
    with pytest.raises(OutputError, match=f"{staged / 'journal'}: is damaged"):
        CheckpointWriter(folder, SHARDS, overwrite=True)
    assert names_in(tmp_path) == before


def test_files_in_the_way_of_the_staged_ones(tmp_path: Path) -> None:
    for number, make in enumerate((Path.touch, lambda path: path.symlink_to(tmp_path), os.mkfifo)):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "merge.part")
        with pytest.raises(OutputError, match=r"merge\.part: is in the way of a folder that a merge needs"):
            CheckpointWriter(folder, SHARDS, overwrite=True)
    leave_staged(tmp_path / "mine", None, "old-0", "new-0")
    with pytest.raises(OutputError, match="old-0: no merge knows this file; move it out of"):
        CheckpointWriter(tmp_path / "mine", SHARDS, overwrite=True)


def test_a_file_that_somebody_put_in_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    staged = leave_staged(
        tmp_path,
        {"earlier": ["a.txt"], "files": ["b.txt"], "shards": ["model.safetensors"]},
        "old-0",
        "new-0",
    )
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(
        OutputError, match=r"a\.txt: is in the place of an earlier file, .*old-0; move it away"
    ):
        CheckpointWriter(tmp_path, SHARDS, overwrite=True)
    assert (tmp_path / "a.txt").read_text() == "mine" and (staged / "old-0").exists()
    (tmp_path / "a.txt").unlink()
    CheckpointWriter(tmp_path, SHARDS, overwrite=True).abort()
    assert names_in(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old-0"


def test_a_name_that_is_no_utf8_is_brought_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    leave_staged(tmp_path, {"earlier": [name], "files": [], "shards": ["model.safetensors"]}, "old-0")
    CheckpointWriter(tmp_path, SHARDS, overwrite=True).abort()
    assert names_in(tmp_path) == [name]


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, ONE_FILE)
    (tmp_path / "1_Pooling").write_text("mine")
    with (
        pytest.raises(OutputError, match="1_Pooling: is a file, but a folder needs this name; move it away"),
        CheckpointWriter(tmp_path, SHARDS, overwrite=True) as writer,
    ):
        writer.add_file("1_Pooling/config.json", b"{}")
    assert names_in(tmp_path) == ["1_Pooling", "model.safetensors"]


def test_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with CheckpointWriter(tmp_path, SHARDS, key="one", record=record_of) as writer:
        for name, tensor in NEW.items():
            writer.write(name, 0, memoryview(raw(tensor)))
        for number in range(5):
            writer.add_file(f"{number}.json", b"{}")
        writer.finish()
    assert_same(load_folder(tmp_path), NEW)
