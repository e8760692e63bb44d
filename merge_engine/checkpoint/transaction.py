"""A new checkpoint in a folder as one transaction: complete or not there, whoever writes its shards.

Everything is written to ``.part`` files. Only ``finish`` renames them, and the file that makes the folder
a checkpoint, the index or the single ``model.safetensors``, comes last. A process killed at any moment
leaves nothing that can be taken for a complete checkpoint, and an earlier output is kept until then: its
weights go once nothing but renaming the new ones is left to do, and from then on those are never deleted.
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
    """Replaces what is in ``folder``, which is created if need be, by the planned shards and other files.

    The shards are written by others: in this process into ``part_of``, or with ``write_shard`` in any process into
    what ``open_drafts`` gives. As a context manager it cleans up with ``abort`` unless ``finish`` was reached. Check
    the folder with ``check_output_folder`` first: an earlier output is replaced without asking.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardLayout]):
        """Locks the folder and deletes what a merge that was killed has left in it.

        Raises ``OutputError`` when the folder cannot be written, or another merge is writing into it.
        """
        self._folder = folder
        self._shards = tuple(shards)
        self._made_folders: list[Path] = []
        self._parts: list[Path] = []  # what is ours to delete
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
        """Add a file such as config.json beside the weights; it appears with ``finish``.

        ``relative_name`` may name a subfolder (``1_Pooling/config.json``). Raises ``OutputError`` when it
        leads out of the folder or cannot be written.
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

        Raises ``OutputError`` when a shard is missing or is not what was planned, after which it may be written
        again; and when a file cannot get its name: as long as the earlier output is complete it stays so, and
        afterwards the new weights are left as ``.part`` files.
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

        An earlier output in the folder stays as it is. Where its weights had begun to give way, the new
        ones are complete and the only ones, so they stay. Does nothing after ``finish``.
        """
        with contextlib.suppress(OSError):  # what follows matters more
            self._close_drafts()
        if self._lock_descriptor >= 0 and not self._retiring:
            for part in (*self._parts, *self._side_parts.values()):
                part.unlink(missing_ok=True)
            (self._folder / (INDEX_FILE + PART_SUFFIX)).unlink(missing_ok=True)
        for made in reversed(self._made_folders):
            with contextlib.suppress(OSError):  # someone else has put a file there
                made.rmdir()
        self._release()

    def __enter__(self) -> CheckpointTransaction:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _check_shards(self) -> None:
        """A part has its name only when it is complete, but it may be missing, or be another merge's."""
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
        """Rename everything, in the order that never shows old and new weights as one checkpoint.

        What can fail comes first: the weights of an earlier output give way only to ones that are ready.
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
        """Fail while nothing is lost, if a folder has the name of a file to write or to replace."""
        for target in (*targets, self._folder / SINGLE_FILE, self._folder / INDEX_FILE):
            if target.is_dir() and not target.is_symlink():
                raise OutputError(f"{target}: is a folder, but a file needs this name; move it away")

    def _rescue(self) -> str:
        """What to do about weights that are complete but could not get their names."""
        if not self._retiring or not any(part.exists() for part in self._parts):
            return ""
        return (
            f"; the new weights are complete: remove {PART_SUFFIX} from the names of the *{PART_SUFFIX} files "
            f"in {self._folder} to get the model, or run the merge again"
        )

    def _encode_index(self) -> bytes:
        """Compact, because the hub's loader refuses an index above 10 MiB."""
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
        """Copies of shards that are still being written come too late."""
        if self._drafts is not None:
            remove_drafts(self._drafts)
            self._drafts = None

    def _release(self) -> None:
        """Forget what was made, and let another merge have the folder."""
        self._parts, self._side_parts, self._made_folders = [], {}, []
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1


def _lock(folder: Path) -> int:
    """Hold the folder against other merges until the descriptor is closed, or the process ends."""
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
    """Open what has this name itself, not what a link leads to; a pipe is not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _write_file(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be a link to elsewhere
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
