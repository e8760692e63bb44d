"""A new output takes the place of an earlier one whole or not at all, wherever it is interrupted."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from written import (
    NEW,
    OLD,
    ONE_FILE,
    STATE,
    THREE_SHARDS,
    TWO_SHARDS,
    assert_same,
    load_folder,
    names_in,
    plan,
    write_all,
    write_checkpoint,
)

from merge_engine.checkpoint import CheckpointWriter, open_checkpoint
from merge_engine.errors import CheckpointError, OutputError


@pytest.mark.parametrize("before", [ONE_FILE, TWO_SHARDS, THREE_SHARDS])
@pytest.mark.parametrize("after", [ONE_FILE, TWO_SHARDS, THREE_SHARDS])
def test_overwrite(before: int, after: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, before)
    kept = tmp_path / "notes.txt", tmp_path / "adapter.safetensors"
    for file in kept:
        file.touch()
    with CheckpointWriter(tmp_path, plan(NEW, after)) as writer:
        write_all(writer, NEW)
        assert_same(load_folder(tmp_path), OLD)
        writer.finish()
    assert_same(load_folder(tmp_path), NEW)
    assert len(names_in(tmp_path)) == {ONE_FILE: 1, TWO_SHARDS: 3, THREE_SHARDS: 4}[after] + len(kept)


def test_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, TWO_SHARDS)
    before = names_in(tmp_path)
    CheckpointWriter(tmp_path, plan(NEW)).abort()
    assert names_in(tmp_path) == before
    assert_same(load_folder(tmp_path), OLD)


def test_leftovers_of_a_killed_merge_go(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model-00009-of-00009.safetensors.part").touch()
    (folder / "model.safetensors.part").symlink_to(outside)
    write_checkpoint(folder, STATE, 10**9)
    assert names_in(folder) == ["model.safetensors"]
    assert outside.read_text() == "precious"


# Replaces OLD by NEW; dies by SIGKILL at the n-th call that changes the folder, counted from the first write.
CHILD = """
import array, os, pathlib, signal, sys
from merge_engine.checkpoint import CheckpointTransaction, CheckpointWriter, OutputTensor, plan_shards, write_shard
from merge_engine.dtypes import F32
folder, limit, last = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
shards = plan_shards([OutputTensor(name, F32, (300,)) for name in "abc"], limit)
drafts = sys.argv[4] == "True"
writer = (CheckpointTransaction if drafts else CheckpointWriter)(folder, shards)
place = writer.open_drafts() if drafts else None
calls = 0
def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.pwrite = dying(os.pwrite)
os.fsync = dying(os.fsync)
pathlib.Path.replace = dying(pathlib.Path.replace)
pathlib.Path.unlink = dying(pathlib.Path.unlink)
pathlib.Path.rename = dying(pathlib.Path.rename)
pathlib.Path.rmdir = dying(pathlib.Path.rmdir)
data = {name: memoryview(array.array("f", [10.0 + i] * 300)) for i, name in enumerate("abc")}
writer.add_file("config.json", b"{}")
if drafts:
    for layout in shards:
        with write_shard(place, layout) as shard:
            for name in layout.tensors:
                shard.write(name, 0, data[name])
else:
    for name in "abc":
        writer.write(name, 0, data[name])
writer.finish()
"""


@pytest.mark.parametrize(
    ("before", "after", "drafts"),
    [
        *(
            (before, after, False)
            for before in (None, ONE_FILE, THREE_SHARDS)
            for after in (ONE_FILE, TWO_SHARDS)
        ),
        (None, TWO_SHARDS, True),
        (THREE_SHARDS, TWO_SHARDS, True),
    ],
)
def test_killed_at_any_moment(before: int | None, after: int, drafts: bool, tmp_path: Path) -> None:
    """After a kill at any step the folder holds the old checkpoint, the new one, or visibly none."""
    outcomes = []
    for last in range(1, 100):
        folder = tmp_path / str(last)
        if before is not None:
            write_checkpoint(folder, OLD, before)
        arguments = [str(folder), str(after), str(last), str(drafts)]
        code = subprocess.run([sys.executable, "-c", CHILD, *arguments]).returncode
        try:
            open_checkpoint(folder)
        except CheckpointError as error:
            assert "unfinished" in str(error)
            outcomes.append("none")
        else:
            state = load_folder(folder)
            outcomes.append("new" if state["a"][0] == 10 else "old")
            assert_same(state, NEW if outcomes[-1] == "new" else OLD)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        write_checkpoint(folder, NEW, after)  # the next run gets through
        assert_same(load_folder(folder), NEW)
        assert not any(name.startswith("m") and name.endswith(".part") for name in names_in(folder))
    assert code == 0
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)
    assert outcomes.count("none") >= 2
    assert ("old" in outcomes) == (before is not None)


@pytest.mark.parametrize(
    ("name", "early"),
    [
        ("README.md", False),
        ("README.md", True),
        ("model.safetensors", True),
        ("model.safetensors.index.json", False),
        ("model.safetensors.index.json", True),
    ],
)
def test_folder_with_the_name_of_a_file(name: str, early: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, TWO_SHARDS if name == "model.safetensors" else ONE_FILE)

    def attempt() -> None:
        with CheckpointWriter(tmp_path, plan(NEW, TWO_SHARDS)) as writer:
            (tmp_path / name).mkdir(exist_ok=True)
            writer.add_file("README.md", b"new")
            write_all(writer, NEW)
            writer.finish()

    if early:
        (tmp_path / name).mkdir()
    before = {*names_in(tmp_path), name}
    with pytest.raises(OutputError, match=f"{name}: is a folder, but a file needs this name"):
        attempt()
    assert set(names_in(tmp_path)) == before
    (tmp_path / name).rmdir()
    assert_same(load_folder(tmp_path), OLD)


@pytest.mark.parametrize("call", ["unlink", "replace"])
def test_failure_after_the_old_weights_gave_way(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the new weights are the only ones: they stay, complete, and the error says how to get them."""
    write_checkpoint(tmp_path, OLD, THREE_SHARDS)
    real = getattr(Path, call)

    def failing(path: Path, *arguments: object, **options: object) -> object:
        if path.name.startswith("model-00002-of-0000"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    def attempt() -> None:
        with CheckpointWriter(tmp_path, plan(NEW, TWO_SHARDS)) as writer:
            write_all(writer, NEW)
            monkeypatch.setattr(Path, call, failing)
            writer.finish()

    with pytest.raises(
        OutputError, match=r"Input/output error .*the new weights are complete: remove \.part"
    ):
        attempt()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(tmp_path)
    for part in tmp_path.glob("*.part"):
        part.replace(part.with_suffix(""))
    assert_same(load_folder(tmp_path), NEW)


def write_with_files(folder: Path, names: list[str], manifest: object) -> None:
    with CheckpointWriter(folder, plan(STATE, ONE_FILE)) as writer:
        for name in names:
            writer.add_file(name, b"x")
        writer.add_file("merge_manifest.json", json.dumps(manifest).encode())
        write_all(writer, STATE)
        writer.finish()


def test_side_files_of_the_earlier_output_go(tmp_path: Path) -> None:
    first = ["config.json", "tokenizer.model", "sub/a.json", "shared/b.json"]
    write_with_files(tmp_path, first, {"files": [*first, "model.safetensors.part", "gone.txt"]})
    (tmp_path / "notes.txt").touch()
    (tmp_path / "shared" / "mine.txt").touch()
    write_with_files(tmp_path, ["config.json"], {"files": ["config.json"]})
    assert names_in(tmp_path) == [
        "config.json",
        "merge_manifest.json",
        "model.safetensors",
        "notes.txt",
        "shared",
        "shared/mine.txt",
    ]
    assert_same(load_folder(tmp_path), STATE)


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {},
        {"files": "a.txt"},
        {"files": ["a.txt", 1]},
        {"files": ["a.txt", "../outside.txt"]},
        {"files": ["a.txt", "link/outside.txt"]},
        {"files": ["a.txt", "circle/x"]},
        {"files": ["a.txt", "\0"]},
        {"files": ["a.txt", "\ud800/x"]},
        {"files": ["a.txt", "."]},
    ],
)
def test_manifests_that_are_not_ours_decide_nothing(manifest: object, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "outside.txt").touch()
    (folder / "link").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    (folder / "a.txt").touch()
    (folder / "merge_manifest.json").write_text(json.dumps(manifest))
    write_with_files(folder, [], {})
    assert (folder / "a.txt").exists()
    assert (tmp_path / "outside.txt").exists()
