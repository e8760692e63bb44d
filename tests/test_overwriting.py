"""A new output takes the place of an earlier one whole or not at all, wherever it is interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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

from merge_engine.checkpoint import CheckpointWriter
from merge_engine.errors import OutputError


@pytest.mark.parametrize("before", [ONE_FILE, TWO_SHARDS, THREE_SHARDS])
@pytest.mark.parametrize("after", [ONE_FILE, TWO_SHARDS, THREE_SHARDS])
def test_overwrite(before: int, after: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, before)
    kept = tmp_path / "notes.txt", tmp_path / "adapter.safetensors"
    for file in kept:
        file.touch()
    with CheckpointWriter(tmp_path, plan(NEW, after), overwrite=True) as writer:
        write_all(writer, NEW)
        assert_same(load_folder(tmp_path), OLD)
        writer.finish()
    assert_same(load_folder(tmp_path), NEW)
    assert len(names_in(tmp_path)) == {ONE_FILE: 1, TWO_SHARDS: 3, THREE_SHARDS: 4}[after] + len(kept)


def test_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, TWO_SHARDS)
    before = names_in(tmp_path)
    CheckpointWriter(tmp_path, plan(NEW), overwrite=True).abort()
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
        with CheckpointWriter(tmp_path, plan(NEW, TWO_SHARDS), overwrite=True) as writer:
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


def write_with_files(folder: Path, names: list[str], manifest: object) -> None:
    with CheckpointWriter(folder, plan(STATE, ONE_FILE), overwrite=True) as writer:
        for name in names:
            writer.add_file(name, b"x")
        writer.add_file("merge_manifest.json", json.dumps(manifest).encode())
        write_all(writer, STATE)
        writer.finish()


@pytest.mark.parametrize("listing", [list, lambda names: {name: {"bytes": 1} for name in names}])
def test_side_files_of_the_earlier_output_go(listing: Callable[[list[str]], object], tmp_path: Path) -> None:
    first = ["config.json", "tokenizer.model", "sub/a.json", "shared/b.json"]
    write_with_files(
        tmp_path, first, {"files": listing([*first, "model.safetensors.part", "gone.txt", "n" * 5000])}
    )
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


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_link(path: Path) -> None:
    path.with_name("elsewhere.json").write_text('{"files": ["a.txt"]}')
    path.symlink_to("elsewhere.json")


def as_ten_gigabytes(path: Path) -> None:
    path.touch()
    os.truncate(path, 10_000_000_000)


@pytest.mark.parametrize(
    "make", [as_pipe, as_link, as_ten_gigabytes, lambda path: path.symlink_to("/dev/zero")]
)
def test_what_is_no_manifest_is_replaced_unread(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "merge_manifest.json")
    (tmp_path / "a.txt").touch()
    write_with_files(tmp_path, [], {"files": []})
    assert (tmp_path / "a.txt").exists()
    assert json.loads((tmp_path / "merge_manifest.json").read_bytes()) == {"files": []}
    assert not (tmp_path / "merge_manifest.json").is_symlink()
    assert_same(load_folder(tmp_path), STATE)


def test_a_link_as_output_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    for state, limit in ((OLD, TWO_SHARDS), (NEW, ONE_FILE)):
        write_checkpoint(tmp_path / "out", state, limit)
        assert_same(load_folder(tmp_path / "real"), state)
    assert (tmp_path / "out").is_symlink() and names_in(tmp_path / "real") == ["model.safetensors"]
