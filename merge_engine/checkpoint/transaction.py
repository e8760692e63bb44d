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
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from merge_engine.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from merge_engine.checkpoint.output_folder import (
    listed_files,
    naming,
    remove_listed,
    remove_unfinished,
    retire_previous_output,
    sync_folder,
)
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.checkpoint.unfinished import PART_SUFFIX, make_drafts, remove_drafts
from merge_engine.errors import OutputError
from merge_engine.text import some


class CheckpointTransaction:
    """Replaces the content of ``folder``, which is created if needed, with the planned shards and other files.

    The caller writes the shards: in this process to the file ``part_of``, or in any process with ``write_shard``
    into the folder from ``open_drafts``. As a context manager it calls ``abort`` unless ``finish`` succeeded. Check
    the folder with ``check_output_folder`` first: an earlier output is replaced without a question.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardLayout]):
        """Lock the folder and delete the files that a killed merge left in it.

        Raises ``OutputError`` if the folder cannot be written, or another merge is writing into it.
        """
        self._folder = folder
        self._shards = tuple(shards)
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
                remove_unfinished(folder)
            self._parts = [self.part_of(shard) for shard in shards]
        except BaseException:
            self.abort()
            raise

    def part_of(self, shard: ShardLayout) -> Path:
        """The file that a shard is written to until ``finish``."""
        return self._folder / shard.part_name

    def open_drafts(self) -> Path:
        """A new folder from which ``write_shard``, in any process, adds shards until ``finish`` or ``abort``.

        Raises ``OutputError``.
        """
        with naming(self._folder):
            self._drafts = make_drafts(self._folder)
        return self._drafts

    def add_file(self, relative_name: str, data: bytes) -> None:
        """Add a file such as config.json beside the weights; ``finish`` gives it its name.

        ``relative_name`` may have a subfolder (``1_Pooling/config.json``). Raises ``OutputError`` if it leads out of
        the folder or cannot be written.
        """
        relative = PurePosixPath(relative_name)
        target = self._folder / relative
        inside = target.parent.resolve().is_relative_to(self._folder.resolve())
        if not inside or relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise OutputError(f"{relative_name!r} is not the name of a file inside {self._folder}")
        part = target.with_name(target.name + PART_SUFFIX)
        with naming(target):
            self._make_folder(target.parent)
            self._side_parts[target] = part
            _write_file(part, data)

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
        self._release()

    def abort(self) -> None:
        """Give up: delete the ``.part`` files of the transaction and the folders made here, if they are empty.

        An earlier output in the folder stays as it is. If its weights are already being deleted, the new ones are
        complete and the only ones, so they stay. Does nothing after ``finish``.
        """
        with contextlib.suppress(OSError):  # the steps below matter more
            self._close_drafts()
        if self._lock_descriptor >= 0 and not self._retiring:
            for part in (*self._parts, *self._side_parts.values()):
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
            with naming(part), open(part, "rb", opener=_open_file) as file:
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
            _write_file(index_part, self._encode_index())
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


def _open_file(path: str, flags: int) -> int:
    """Open the file of this name: follow no link, and do not wait for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _write_file(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be a link to another file
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
