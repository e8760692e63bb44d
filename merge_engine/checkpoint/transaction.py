"""A new checkpoint in a folder as one transaction: complete or not there, even if several processes write its shards.

Everything is written to ``.part`` files. Only ``finish`` renames them. The file that makes the folder a checkpoint,
the index or the single ``model.safetensors``, is renamed last. So a process killed at any moment leaves nothing
that looks like a complete checkpoint. The weights of an earlier output are deleted only when all that is left to do
is to rename the new ones; from then on the new ones are never deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from xxhash import xxh3_128

from merge_engine.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from merge_engine.checkpoint.output_folder import (
    listed_files,
    naming,
    remove_listed,
    remove_unfinished,
    retire_previous_output,
    sync_folder,
)
from merge_engine.checkpoint.records import complete_parts, open_own, write_record
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.checkpoint.unfinished import PART_SUFFIX, make_drafts, remove_drafts
from merge_engine.errors import CheckpointError, OutputError
from merge_engine.text import some

_PIECE = 1 << 20


class CheckpointTransaction:
    """Replaces the content of ``folder``, which is created if needed, with the planned shards and other files.

    The caller writes the shards: in this process to the file ``part_of``, or in any process with ``write_shard``
    into the folder from ``open_drafts``. As a context manager it calls ``abort`` unless ``finish`` succeeded. Check
    the folder with ``check_output_folder`` first: an earlier output is replaced without a question.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardLayout], *, key: str = "", overwrite: bool = False
    ):
        """Lock the folder, and take over the complete parts that a merge with the same ``key`` recorded there.

        ``key`` identifies the plan: everything that decides the bytes of the shards. Without one nothing is taken
        over or recorded. ``overwrite`` allows that an earlier output is replaced.

        Raises ``OutputError`` if the folder cannot be written, or another merge is writing into it.
        """
        self._folder = folder
        self._shards = tuple(shards)
        self._key = key
        self._overwrite = overwrite
        self._complete: dict[str, bytes] = {}
        self._recorded: set[str] = set()
        self._files: dict[str, tuple[int, str]] = {}
        self._made_folders: list[Path] = []
        self._parts: list[Path] = []  # of this transaction, deleted by abort
        self._side_parts: dict[Path, Path] = {}
        self._drafts: Path | None = None
        self._retiring = False
        self._lock_descriptor = -1
        try:
            with naming(folder):
                self._make_folder(folder)
                self._lock_descriptor = _lock(folder)
                self._refuse_folders([folder / shard.name for shard in shards])
                if key:
                    self._complete = complete_parts(folder, self._shards, key)
                self._recorded = set(self._complete)
                kept = [shard for shard in self._shards if shard.name in self._complete]
                remove_unfinished(
                    folder, {name for shard in kept for name in (shard.part_name, shard.record_name)}
                )
            self._parts = [self.part_of(shard) for shard in shards]
        except BaseException:
            self.abort()
            raise

    def part_of(self, shard: ShardLayout) -> Path:
        """The file that a shard is written to until ``finish``."""
        return self._folder / shard.part_name

    @property
    def complete(self) -> Mapping[str, bytes]:
        """The records of the shards that an earlier merge left complete, by the shard's name. They stay as they are."""
        return self._complete

    @property
    def kept(self) -> list[str]:
        """The names of the recorded shards, which ``abort`` keeps. None after ``finish``."""
        return [shard.name for shard in self._shards if shard.name in self._recorded]

    @property
    def files(self) -> Mapping[str, tuple[int, str]]:
        """Size in bytes and XXH3-128 digest (hexadecimal) of every file added beside the weights, by name."""
        return self._files

    def record(self, shard: ShardLayout, record: bytes) -> None:
        """Note durably that the shard is complete, so that the next merge with the same key begins after it.

        Call it when the part is on the disk. ``record`` is given back by ``complete``. Does nothing without a key.
        Thread-safe. Raises ``OutputError``.
        """
        if self._key:
            with naming(self._folder / shard.record_name):
                write_record(self._folder, shard, self._key, record)
            self._recorded.add(shard.name)

    def forget(self) -> None:
        """Let ``abort`` delete the recorded shards as well, because no merge can go on from them."""
        self._key = ""
        self._recorded.clear()

    def open_drafts(self) -> Path:
        """A new folder from which ``write_shard``, in any process, adds shards until ``finish`` or ``abort``.

        Raises ``OutputError``.
        """
        with naming(self._folder):
            self._drafts = make_drafts(self._folder)
        return self._drafts

    def add_file(self, name: str, data: bytes) -> None:
        """Add a file such as config.json beside the weights; ``finish`` gives it its name.

        ``name`` may have a subfolder (``1_Pooling/config.json``). Raises ``OutputError`` if it leads out of the
        folder or cannot be written.
        """
        self._add(name, [data])

    def copy_file(self, name: str, source: Path) -> None:
        """``add_file`` the content of the regular file ``source``, of which 1 MiB at a time is in memory.

        Raises ``CheckpointError`` if the source cannot be read, and ``OutputError`` as ``add_file`` does.
        """
        self._add(name, _pieces_of(source))

    def _add(self, name: str, pieces: Iterable[bytes]) -> None:
        relative = PurePosixPath(name)
        target = self._folder / relative
        inside = target.parent.resolve().is_relative_to(self._folder.resolve())
        if not inside or relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise OutputError(f"{name!r} is not the name of a file inside {self._folder}")
        part = target.with_name(target.name + PART_SUFFIX)
        with naming(target):
            self._make_folder(target.parent)
            self._side_parts[target] = part
            self._files[name] = _write_file(part, pieces)

    def finish(self) -> None:
        """Check that every shard is there, and give all files their names, the index last.

        Raises ``OutputError`` if a shard is missing or differs from the plan; it may then be written again. Also
        raises ``OutputError`` if a file cannot be renamed: either the earlier output is still complete, or the new
        weights stay as ``.part`` files.
        """
        self._check_shards()
        try:
            with naming(self._folder):
                self._close_drafts()
                self._publish()
        except OutputError as error:
            raise OutputError(f"{error}{self._rescue()}") from error
        for shard in self._shards:
            (self._folder / shard.record_name).unlink(missing_ok=True)
        self._recorded.clear()
        self._release()

    def abort(self) -> None:
        """Give up: delete the ``.part`` files of the transaction and the folders made here, if they are empty.

        An earlier output in the folder stays as it is. If its weights are already being deleted, the new ones are
        complete and the only ones, so they stay. Does nothing after ``finish``.
        """
        with contextlib.suppress(OSError):  # the steps below matter more
            self._close_drafts()
        if self._lock_descriptor >= 0 and not self._retiring:
            dropped = [self.part_of(shard) for shard in self._shards if shard.name not in self._recorded]
            for part in (*dropped, *self._side_parts.values()):
                part.unlink(missing_ok=True)
            (self._folder / (INDEX_FILE + PART_SUFFIX)).unlink(missing_ok=True)
        for made in reversed(self._made_folders):
            with contextlib.suppress(OSError):  # it has files of others
                made.rmdir()
        self._release()

    def __enter__(self) -> CheckpointTransaction:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _check_shards(self) -> None:
        """Raise ``OutputError`` unless every part is there and has the planned size and header."""
        missing = [shard.name for shard in self._shards if not self.part_of(shard).exists()]
        if missing:
            raise OutputError(f"{self._folder}: not written: {some(missing)}; write them, and finish then")
        for shard in self._shards:
            part = self.part_of(shard)
            with naming(part), open(part, "rb", opener=open_own) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_size != shard.size:
                    raise OutputError(
                        f"{part}: has {found.st_size} bytes, not {shard.size}; write the shard again"
                    )
                if file.read(len(shard.header)) != shard.header:
                    raise OutputError(
                        f"{part}: begins with another header than was planned; write the shard again"
                    )

    def _publish(self) -> None:
        """Rename everything, in an order that never shows old and new weights as one checkpoint.

        Steps that can fail come first: the weights of an earlier output are deleted only when the new ones are ready.
        """
        names = [shard.name for shard in self._shards]
        targets = [self._folder / name for name in names]
        self._refuse_folders([*targets, *self._side_parts])
        index_part = self._folder / (INDEX_FILE + PART_SUFFIX)
        if len(self._shards) > 1:
            _write_file(index_part, [self._encode_index()])
        written = {*targets, *self._side_parts, *self._parts, index_part}
        stale = [file for file in listed_files(self._folder) if file not in written]
        for target, part in self._side_parts.items():
            part.replace(target)
        changed = {target.parent for target in self._side_parts} | {
            made.parent for made in self._made_folders
        }
        for folder in {self._folder, *changed}:
            sync_folder(folder)
        self._retiring = True
        retire_previous_output(self._folder, kept=names)
        remove_listed(self._folder, stale)
        for part, target in zip(self._parts, targets, strict=True):
            part.replace(target)
        sync_folder(self._folder)
        if len(self._shards) > 1:
            index_part.replace(self._folder / INDEX_FILE)
            sync_folder(self._folder)

    def _refuse_folders(self, targets: Sequence[Path]) -> None:
        """Raise ``OutputError``, before anything is lost, if a folder has the name of a file to write or to replace."""
        for target in (*targets, self._folder / SINGLE_FILE, self._folder / INDEX_FILE):
            if target.is_dir() and not target.is_symlink():
                raise OutputError(f"{target}: is a folder, but a file needs this name; move it away")

    def _rescue(self) -> str:
        """The way out for weights that are complete but could not be renamed, for the end of a message; else ""."""
        if not self._retiring or not any(part.exists() for part in self._parts):
            return ""
        return (
            f"; the new weights are complete: remove {PART_SUFFIX} from the names of the *{PART_SUFFIX} files "
            f"in {self._folder} to get the model, or run the merge again"
        )

    def _encode_index(self) -> bytes:
        """The index as compact JSON, because the hub's loader refuses an index above 10 MiB."""
        weight_map = {name: shard.name for shard in self._shards for name in shard.tensors}
        total = sum(tensor.nbytes for shard in self._shards for tensor in shard.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode("utf-8")

    def _make_folder(self, folder: Path) -> None:
        missing = [level for level in (folder, *folder.parents) if not level.exists()]
        for level in reversed(missing):
            level.mkdir()
            self._made_folders.append(level)

    def _close_drafts(self) -> None:
        """Remove the folder of drafts: shards that other processes are still writing are too late."""
        if self._drafts is not None:
            remove_drafts(self._drafts)
            self._drafts = None

    def _release(self) -> None:
        """Forget the files of this transaction, and unlock the folder."""
        self._parts, self._side_parts, self._made_folders = [], {}, []
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1


def _lock(folder: Path) -> int:
    """Lock the folder against other merges, until the returned descriptor is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{folder}: another merge is writing into this folder") from None
    except OSError:
        pass  # file systems without locks
    return descriptor


def _write_file(path: Path, pieces: Iterable[bytes]) -> tuple[int, str]:
    """Write a new file durably. Returns its size and its XXH3-128 digest, hexadecimal."""
    path.unlink(missing_ok=True)  # it may be a link to another file
    digest, size = xxh3_128(), 0
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _pieces_of(source: Path) -> Iterator[bytes]:
    """The content of a regular file, in pieces of at most 1 MiB. Raises ``CheckpointError``."""
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is not waited for
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{source}: is not a regular file, so it is not copied; remove it")
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
