"""Input files: size and time, and that each is opened once, from any thread, and closed."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import merge_engine._native as _native
from merge_engine.errors import CheckpointError
from merge_engine.storage import File, Mount, OpenFiles, mount_of

CONTENT = bytes(range(256)) * 100


@pytest.fixture
def file(tmp_path: Path) -> File:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return File.of(path)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_what_is_known_of_a_file(file: File) -> None:
    stat = file.path.stat()
    assert (file.size, file.mtime_ns, file.inode) == (len(CONTENT), stat.st_mtime_ns, stat.st_ino)
    assert pickle.loads(pickle.dumps(file)) == file and hash(File.of(file.path)) == hash(file)
    os.utime(file.path, ns=(0, stat.st_mtime_ns + 1))
    assert File.of(file.path) != file


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        File.of(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'}: cannot be read: No such file or directory"


def test_every_file_is_opened_once_and_closed(tmp_path: Path) -> None:
    files = []
    for number in range(5):
        (tmp_path / str(number)).write_bytes(CONTENT[number:])
        files.append(File.of(tmp_path / str(number)))
    before = open_descriptors()
    with OpenFiles() as opened, ThreadPoolExecutor(8) as pool:
        assert open_descriptors() == before  # each when it is first used
        descriptors = list(pool.map(opened.descriptor, 20 * files))
        direct = list(pool.map(opened.direct_descriptor, 20 * files))
        mappings = list(pool.map(opened.mapping, 20 * files))
        for number, file in enumerate(files):
            for found in (descriptors, direct, mappings):
                assert len(set(found[number::5])) == 1
            assert os.preadv(descriptors[number], [bytearray(10)], 0) == 10
            if mount_of(tmp_path).local:
                mapping = mappings[number]
                assert mapping is not None and bytes(mapping.view(0, file.size)) == CONTENT[number:]
        assert open_descriptors() == before + 5 + sum(descriptor >= 0 for descriptor in set(direct))
    assert open_descriptors() == before


def test_what_is_made_of_a_file_is_made_once(file: File) -> None:
    made: list[Path] = []

    def load(path: Path) -> object:
        made.append(path)
        return object()

    with OpenFiles() as opened, ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: opened.kept(file, load), range(50)))) == 1
    assert made == [file.path]


def test_a_file_that_cannot_be_opened(file: File) -> None:
    file.path.unlink()
    with OpenFiles() as opened:
        for opening in (opened.descriptor, opened.mapping, lambda file: opened.kept(file, Path)):
            with pytest.raises(CheckpointError) as caught:
                opening(file)
            assert str(caught.value) == f"{file.path}: cannot be read: No such file or directory"
        assert opened.direct_descriptor(file) == -1


@pytest.mark.parametrize("size", (0, len(CONTENT) - 1, len(CONTENT) + 1))
def test_a_file_whose_size_has_changed(file: File, size: int) -> None:
    with OpenFiles() as opened:
        past = opened.direct_descriptor(file) >= 0
    os.truncate(file.path, size)
    with OpenFiles() as opened:
        before = open_descriptors()
        openings = [opened.descriptor, opened.mapping, lambda file: opened.kept(file, Path)]
        for opening in [*openings, *([opened.direct_descriptor] if past else [])]:
            for _ in range(2):
                with pytest.raises(CheckpointError) as caught:
                    opening(file)
                said = "its size has changed since its header was read; run the merge again"
                assert str(caught.value) == f"{file.path}: {said}"
        assert open_descriptors() == before


def rewrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"other")
    os.utime(path)  # the times of a file system may be coarser than this test


def replace(path: Path) -> None:
    """By a file of the same size and time."""
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rewrite, "it has been written to since its header was read"),
        (replace, "another file has taken its place since its header was read"),
    ],
)
def test_a_file_that_is_another_one_when_it_is_opened(
    file: File, change: Callable[[Path], None], said: str
) -> None:
    with OpenFiles() as opened:
        past = opened.direct_descriptor(file) >= 0
    change(file.path)
    with OpenFiles() as opened:
        before = open_descriptors()
        openings = [opened.descriptor, opened.mapping, lambda file: opened.kept(file, Path)]
        for opening in [*openings, *([opened.direct_descriptor] if past else [])]:
            with pytest.raises(CheckpointError) as caught:
                opening(file)
            assert str(caught.value) == f"{file.path}: {said}; run the merge again"
        assert open_descriptors() == before


def test_numbers_of_files_on_a_network_may_change(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mount, "local", False)
    replace(file.path)
    with OpenFiles() as opened:
        assert opened.descriptor(file) >= 0


@pytest.mark.parametrize("way", ("descriptor", "direct_descriptor", "mapping", "kept"))
def test_a_file_that_is_written_to_while_it_is_open(file: File, way: str) -> None:
    with OpenFiles() as opened:
        assert getattr(opened, way)(file, *([Path] if way == "kept" else [])) != -1
        opened.check_unchanged()
        replace(file.path)
        opened.check_unchanged()  # what is open is still the same
    with OpenFiles() as opened:
        file = File.of(file.path)
        getattr(opened, way)(file, *([Path] if way == "kept" else []))
        rewrite(file.path)
        with pytest.raises(CheckpointError) as caught:
            opened.check_unchanged()
    said = "it has been written to while it was merged; run the merge again once nothing writes to it"
    assert str(caught.value) == f"{file.path}: {said}"


def test_a_file_that_is_replaced_while_it_is_loaded(file: File) -> None:
    with OpenFiles() as opened, pytest.raises(CheckpointError, match="another file has taken its place"):
        opened.kept(file, replace)


def test_files_of_a_network_are_never_mapped(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping of theirs would be read one page at a time, and a lost server would block the process."""
    monkeypatch.setattr(Mount, "local", False)
    with OpenFiles() as opened:
        assert opened.mapping(file) is None
        assert os.preadv(opened.descriptor(file), [bytearray(10)], 0) == 10


def test_a_file_system_without_mappings(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENODEV, "no mappings here")

    monkeypatch.setattr(_native, "Mapping", refuse)
    with OpenFiles() as opened:
        assert opened.mapping(file) is None


@pytest.mark.parametrize("call", ("open", "preadv"))
def test_a_file_system_without_direct_reads(file: File, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = getattr(os, call)

    def refuse(target: Any, how: Any, *rest: Any) -> Any:
        if (call == "open" and how & os.O_DIRECT) or call == "preadv":
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(target, how, *rest)

    before = open_descriptors()
    monkeypatch.setattr(os, call, refuse)
    with OpenFiles() as opened:
        assert opened.direct_descriptor(file) == -1
        assert open_descriptors() == before
        assert opened.descriptor(file) >= 0


def test_more_files_than_the_soft_limit(tmp_path: Path) -> None:
    """And twice as many descriptors, where they are read in both ways."""
    for number in range(100):
        (tmp_path / str(number)).write_bytes(b"x")
    script = """
import pathlib, resource, sys
from merge_engine.storage import File, OpenFiles
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
with OpenFiles() as opened:
    for path in pathlib.Path(sys.argv[1]).iterdir():
        opened.descriptor(File.of(path))
        opened.direct_descriptor(File.of(path))
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)


def test_the_deepest_mount_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "/dev/a / ext4 rw 0 0\n/dev/b /mnt/my\\040disk xfs rw 0 0\n/dev/c /mnt/my\\040disk nfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: mounts)
    assert str(mount_of(Path("/mnt/my disk/models"))) == "nfs /dev/c at /mnt/my disk"
    assert str(mount_of(Path("/mnt/my disks"))) == "ext4 /dev/a at /"
    assert not mount_of(Path("/mnt/my disk")).local and mount_of(Path("/mnt")).local
