"""Writing a checkpoint: any range of any tensor, in any order, from any thread; complete or not there.

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
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from merge_engine.checkpoint.header import TensorInfo
from merge_engine.checkpoint.layout import INDEX_FILE, PART_SUFFIX, SINGLE_FILE, some
from merge_engine.checkpoint.output_folder import (
    listed_files,
    remove_listed,
    remove_unfinished,
    retire_previous_output,
    sync_folder,
)
from merge_engine.checkpoint.shard_file import ShardFile
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.errors import OutputError
from merge_engine.storage.files import allow_many_files
from merge_engine.storage.memory import as_bytes
from merge_engine.storage.mounts import mount_of


class CheckpointWriter:
    """Writes the planned shards into ``folder``, which is created if need be.

    As a context manager it cleans up with ``abort`` unless ``finish`` was reached. Check the folder with
    ``check_output_folder`` first: the writer replaces an earlier output without asking.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardLayout]):
        """Reserves the disk space of all shards, except on a RAM disk, and writes their headers.

        Raises ``OutputError`` when the disk is too small, the folder cannot be written, or another merge is
        writing into it.
        """
        self._folder = folder
        self._made_folders: list[Path] = []
        self._shards: list[ShardFile] = []
        self._side_parts: dict[Path, Path] = {}
        self._missing: dict[str, int] = {}
        self._place: dict[str, tuple[ShardFile, TensorInfo]] = {}
        self._state = threading.Condition()
        self._writes_under_way = 0
        self._open = True
        self._retiring = False
        self._lock_descriptor = -1
        self._syncs = ThreadPoolExecutor(max_workers=max(1, len(shards)), thread_name_prefix="fsync")
        if len(shards) > 1:
            allow_many_files()
        try:
            with self._naming(folder):
                self._make_folder(folder)
                self._lock_descriptor = _lock(folder)
                self._refuse_folders([folder / shard.name for shard in shards])
                remove_unfinished(folder)
                # A RAM disk would make all pages at once, before anything else is done.
                reserve = mount_of(folder).kind != "tmpfs"
            for shard in shards:
                self._start(shard, reserve)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write ``data`` (C-contiguous) as the tensor's bytes from byte ``offset`` on. Thread-safe.

        Raises ``OutputError`` when the write fails or when more is written than the tensor has.
        """
        data = as_bytes(data)
        shard, tensor = self._place[name]
        if offset < 0 or offset + data.nbytes > tensor.nbytes:
            raise OutputError(
                f"{shard.part}: internal error: tensor {name!r} has {tensor.nbytes} bytes, not {data.nbytes} "
                f"from {offset} on"
            )
        self._claim(shard, name, data.nbytes)
        try:
            with self._naming(shard.part):
                shard.write(data, tensor.start + offset)
            self._count(shard, data.nbytes)
        except BaseException:
            with self._state:
                self._missing[name] += data.nbytes
            raise
        finally:
            with self._state:
                self._writes_under_way -= 1
                self._state.notify_all()

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
        with self._naming(target):
            self._make_folder(target.parent)
            self._side_parts[target] = part
            _write_file(part, data)

    def flush(self) -> None:
        """Check that all bytes came, and wait until they are on the disk.

        Raises ``OutputError`` when a tensor is incomplete or when the disk reports a failure; call ``abort``
        then, or leave the ``with`` block.
        """
        unwritten = [name for name, missing in self._missing.items() if missing]
        if unwritten:
            raise OutputError(f"{self._folder}: internal error: not completely written: {some(unwritten)}")
        for shard in self._shards:
            with self._naming(shard.part):
                if shard.synced is None:  # no tensor of it has any bytes
                    shard.sync()
                else:
                    shard.synced.result()

    def finish(self) -> None:
        """Flush, and give all files their names, the index last.

        Raises ``OutputError`` as ``flush`` does, and when a file cannot get its name: as long as the earlier
        output is complete it stays so, and afterwards the new weights are left as ``.part`` files.
        """
        self.flush()
        self._close()
        try:
            with self._naming(self._folder):
                self._publish()
        except OutputError as error:
            raise OutputError(f"{error}{self._rescue()}") from error
        self._release()

    def abort(self) -> None:
        """Give up: delete the ``.part`` files made here and the folders made here, if they are empty.

        An earlier output in the folder stays as it is. Where its weights had begun to give way, the new
        ones are complete and the only ones, so they stay. Waits for writes under way; does nothing after
        ``finish``.
        """
        self._close()
        if self._lock_descriptor >= 0 and not self._retiring:
            for part in (*(shard.part for shard in self._shards), *self._side_parts.values()):
                part.unlink(missing_ok=True)
            (self._folder / (INDEX_FILE + PART_SUFFIX)).unlink(missing_ok=True)
        for made in reversed(self._made_folders):
            with contextlib.suppress(OSError):  # someone else has put a file there
                made.rmdir()
        self._release()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _start(self, layout: ShardLayout, reserve: bool) -> None:
        part = self._folder / (layout.name + PART_SUFFIX)
        with self._naming(part):
            shard = ShardFile(layout, part)
            self._shards.append(shard)  # before anything can fail, so that abort knows it
            shard.prepare(reserve)
        for tensor in layout.tensors.values():
            self._missing[tensor.name] = tensor.nbytes
            self._place[tensor.name] = (shard, tensor)

    def _claim(self, shard: ShardFile, name: str, nbytes: int) -> None:
        """Start a write. Bytes are claimed before they are written: no late write meets a closed shard."""
        with self._state:
            if not self._open:
                raise OutputError(f"{shard.part}: internal error: written to after it was closed")
            if nbytes > self._missing[name]:
                raise OutputError(f"{shard.part}: internal error: tensor {name!r} was written twice")
            self._missing[name] -= nbytes
            self._writes_under_way += 1

    def _count(self, shard: ShardFile, nbytes: int) -> None:
        """Note what came; a shard that has all its bytes goes to disk while others are still filled."""
        with self._state:
            shard.missing -= nbytes
            if shard.missing == 0 and nbytes:
                shard.synced = self._syncs.submit(shard.sync_and_close)

    def _publish(self) -> None:
        """Rename everything, in the order that never shows old and new weights as one checkpoint.

        What can fail comes first: the weights of an earlier output give way only to ones that are ready.
        """
        names = [shard.layout.name for shard in self._shards]
        targets = [self._folder / name for name in names]
        self._refuse_folders([*targets, *self._side_parts])
        index_part = self._folder / (INDEX_FILE + PART_SUFFIX)
        if len(self._shards) > 1:
            _write_file(index_part, self._encode_index())
        written = {*targets, *self._side_parts, *(shard.part for shard in self._shards), index_part}
        stale = [file for file in listed_files(self._folder) if file not in written]
        for target, part in self._side_parts.items():
            part.replace(target)
        changed = {target.parent for target in self._side_parts} | {
            made.parent for made in self._made_folders
        }
        for folder in changed:
            sync_folder(folder)
        self._retiring = True
        retire_previous_output(self._folder, kept=names)
        remove_listed(self._folder, stale)
        for shard in self._shards:
            shard.part.replace(self._folder / shard.layout.name)
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
        if not self._retiring or not any(shard.part.exists() for shard in self._shards):
            return ""
        return (
            f"; the new weights are complete: remove {PART_SUFFIX} from the names of the *{PART_SUFFIX} files "
            f"in {self._folder} to get the model, or run the merge again"
        )

    def _encode_index(self) -> bytes:
        """Compact, because the hub's loader refuses an index above 10 MiB."""
        weight_map = {name: shard.layout.name for name, (shard, _) in self._place.items()}
        total = sum(tensor.nbytes for _, tensor in self._place.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode("utf-8")

    def _make_folder(self, folder: Path) -> None:
        missing = [level for level in (folder, *folder.parents) if not level.exists()]
        for level in reversed(missing):
            level.mkdir()
            self._made_folders.append(level)

    def _close(self) -> None:
        """Close the shards once no thread writes."""
        with self._state:
            self._open = False
            self._state.wait_for(lambda: self._writes_under_way == 0)
        self._syncs.shutdown(wait=True)
        for shard in self._shards:
            shard.close()

    def _release(self) -> None:
        """Forget what was made, and let another merge have the folder."""
        self._shards, self._side_parts, self._made_folders = [], {}, []
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1

    @contextlib.contextmanager
    def _naming(self, file: Path) -> Iterator[None]:
        """Turn the system's errors into one that names the file and the space left."""
        try:
            yield
        except OSError as error:
            free = "unknown"
            with contextlib.suppress(OSError):
                free = f"{shutil.disk_usage(self._folder).free / 1e9:.2f} GB"
            raise OutputError(f"{file}: cannot be written: {error.strerror} (free space: {free})") from error


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


def _write_file(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be a link to elsewhere
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
