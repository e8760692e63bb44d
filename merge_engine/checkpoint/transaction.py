"""A new checkpoint in a folder as one transaction: complete or not there, even if several processes write its shards.

Everything is written under names that no reader takes for a model. ``finish`` lets the new files take the place of the
earlier ones (``publication.py``). At every moment the folder holds the earlier model, the new one, or visibly none with
the earlier one kept in it; the next merge into the folder then brings the earlier one back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from merge_engine.checkpoint.layout import INDEX_FILE
from merge_engine.checkpoint.output_check import contents_in_the_way
from merge_engine.checkpoint.output_folder import HEADS, earlier_files, naming
from merge_engine.checkpoint.publication import Publication, recover
from merge_engine.checkpoint.records import complete_parts, open_own, write_record
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.checkpoint.staged_files import StagedFiles, pieces_of, refuse_taken
from merge_engine.checkpoint.unfinished import STAGING, discard, drafts_in, make_drafts, remove_parts
from merge_engine.errors import OutputError
from merge_engine.text import some


class CheckpointTransaction:
    """Replaces the content of ``folder``, which is created if needed, with the planned shards and other files.

    The caller writes the shards: in this process to the file ``part_of``, or in any process with ``write_shard``
    into the folder from ``open_drafts``. As a context manager it calls ``abort`` unless ``finish`` succeeded.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardLayout], *, key: str = "", overwrite: bool = False
    ):
        """Lock the folder, tidy up after a killed merge, and take over what a merge with the same ``key`` completed.

        ``key`` identifies the plan: everything that decides the bytes of the shards. Without one nothing is taken
        over or recorded. ``overwrite`` allows that an earlier output is replaced.

        Raises ``OutputError`` if the folder cannot be written, if another merge is writing into it, or if it holds
        files that may not be replaced. A killed merge's earlier output has been brought back even then.
        """
        self._folder = folder
        self._shards = tuple(shards)
        self._key = key
        self._overwrite = overwrite
        self._complete: dict[str, bytes] = {}
        self._recorded: set[str] = set()
        self._files: dict[str, tuple[int, str]] = {}
        self._staged = StagedFiles(folder)
        self._made_folders: list[Path] = []
        self._lock: _Lock | None = None
        self._published = False  # the new output is complete, and the earlier one may be still aside
        self._ours = False  # parts and staged files in the folder belong to this transaction
        try:
            with naming(folder):
                self._make_folder(folder)
                self._lock = _Lock(folder)
                recover(folder)
                if problems := contents_in_the_way(folder, overwrite):
                    raise OutputError(problems)
                self._refuse_taken([shard.name for shard in shards])
                self._ours = True
                if key:
                    self._complete = complete_parts(folder, shards, key)
                self._recorded = {*self._complete}
                remove_parts(folder, kept=frozenset(self._complete))
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
        recorded = [shard for shard in self._shards if shard.name in self._recorded]
        return [shard.name for shard in recorded if self.part_of(shard).exists()]

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
            return make_drafts(self._folder)

    def add_file(self, name: str, data: bytes) -> None:
        """Add a file such as config.json beside the weights; ``finish`` gives it its name.

        ``name`` may have a subfolder (``1_Pooling/config.json``). Raises ``OutputError`` if it leads out of the
        folder, if its place is taken, or if it cannot be written.
        """
        self._files[name] = self._staged.add(name, [data])

    def copy_file(self, name: str, source: Path) -> None:
        """``add_file`` the content of the regular file ``source``, of which 1 MiB at a time is in memory.

        Raises ``CheckpointError`` if the source cannot be read, and ``OutputError`` as ``add_file`` does.
        """
        self._files[name] = self._staged.add(name, pieces_of(source))

    def finish(self) -> None:
        """Check that every shard is there, and let the new files take the place of the earlier ones.

        Raises ``OutputError`` if a shard is missing or differs from the plan; it may then be written again. Also
        raises ``OutputError`` if a file cannot be written or renamed. The folder then holds its earlier content, or
        the next merge into it brings that back.
        """
        self._check_shards()
        with naming(self._folder):
            self._close_drafts()
            publication = self._prepare()
            self._publish(publication)
        with contextlib.suppress(OSError):  # the output is complete; the next merge deletes what is left
            publication.clear_away()
        self._release()

    def abort(self) -> None:
        """Give up: delete the files of the transaction, and the folders made here if they are empty.

        Recorded shards stay (``kept``), and so does an earlier output. Does nothing after ``finish``; one that was
        interrupted while it deleted the earlier output goes on.
        """
        steps: list[Callable[[], None]] = []
        if self._published:
            steps.append(lambda: recover(self._folder))
        if self._ours:
            steps += [self._discard_staged, self._close_drafts, self._remove_parts]
        steps += [made.rmdir for made in reversed(self._made_folders)]  # one with files of others stays
        for step in steps:
            # The error that led here matters more; the next merge tidies up.
            with contextlib.suppress(OSError, OutputError):
                step()
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

    def _prepare(self) -> Publication:
        """What ``finish`` is going to do. All new files are on the disk by then. Raises ``OSError``."""
        if len(self._shards) > 1:
            self._staged.add(INDEX_FILE, [self._encode_index()])
        self._staged.sync()
        files, shards = self._staged.names, [shard.name for shard in self._shards]
        self._refuse_taken([*files, *shards])
        earlier = earlier_files(self._folder, [*files, *shards])
        self._refuse_put_there(earlier)
        records = [shard.record_name for shard in self._shards if shard.name in self._recorded]
        return Publication(self._folder, [*earlier, *records], files, shards)

    def _refuse_put_there(self, earlier: Sequence[str]) -> None:
        """Raise ``OutputError`` for files that came during the merge, and would be lost or mixed with the new ones."""
        if earlier and not self._overwrite:
            raise OutputError(
                f"{self._folder}: {some(earlier)} came into it during the merge and would be replaced; move them away, "
                "or pass --overwrite"
            )
        if problems := contents_in_the_way(self._folder, overwrite=True):
            raise OutputError(problems)

    def _publish(self, publication: Publication) -> None:
        """Do all of it or nothing."""
        self._ours = False  # from here on the journal says what becomes of the files
        try:
            publication.begin()
            publication.carry_out()
            self._published = True
        except BaseException as error:
            try:
                publication.undo()
            except OSError as failed:
                raise OutputError(
                    f"{self._folder}: cannot be written: {failed.strerror}; the files of its earlier model are kept in "
                    f"{self._folder / STAGING}, and the next merge into {self._folder} brings them back"
                ) from error
            self._ours = True
            raise
        self._recorded.clear()

    def _refuse_taken(self, names: Iterable[str]) -> None:
        """Raise ``OutputError``, before anything changes, if a folder has the name of a file to write or replace."""
        for name in (*names, *HEADS):
            refuse_taken(self._folder, name)

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
        """Remove the folders of drafts: shards that other processes are still writing are too late."""
        for drafts in drafts_in(self._folder):
            discard(drafts)

    def _discard_staged(self) -> None:
        if (self._folder / STAGING).is_dir():
            discard(self._folder / STAGING)

    def _remove_parts(self) -> None:
        remove_parts(self._folder, kept=frozenset(self._recorded))

    def _release(self) -> None:
        """Leave the files to the next transaction, and unlock the folder."""
        self._ours = self._published = False
        self._made_folders = []
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class _Lock:
    """A lock of a folder against other merges, until it is closed, nobody holds it any more, or the process ends.

    An interrupt may come when it is taken and not yet kept.
    """

    def __init__(self, folder: Path):
        self._descriptor = -1
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OutputError(f"{folder}: another merge is writing into this folder") from None
        except OSError:
            pass  # file systems without locks

    def close(self) -> None:
        """Unlock the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()
