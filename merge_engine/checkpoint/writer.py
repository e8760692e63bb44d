"""Writing a checkpoint in one process: any range of any tensor, in any order, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from merge_engine.checkpoint.shard_writer import Piece, ShardWriter
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.checkpoint.transaction import CheckpointTransaction
from merge_engine.errors import OutputError
from merge_engine.storage.files import allow_many_files
from merge_engine.text import some


class CheckpointWriter:
    """Writes the planned shards into ``folder``, which is created if needed. The checkpoint is complete or not there.

    No shard waits for another; each is open from its first write until it is on the disk. As a context manager it calls
    ``abort`` unless ``finish`` succeeded. Check the folder with ``check_output_folder`` first: the writer replaces an
    earlier output without a question.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardLayout],
        *,
        key: str = "",
        overwrite: bool = False,
        record: Callable[[ShardLayout], bytes] | None = None,
    ):
        """Reserve the disk space of all shards, except on a RAM disk, and write their headers.

        ``key`` and ``overwrite`` are those of ``CheckpointTransaction``. Shards that are complete already are not
        opened, and nothing may be written to them. ``record`` is called for every other shard once it is on the disk,
        in a thread of the writer. It may wait for other threads, but must return or raise after an error as well,
        because ``abort`` waits for it. Its bytes are given to ``CheckpointTransaction.record``.

        Raises ``OutputError`` if the disk is too small, the folder cannot be written, or another merge is writing
        into it.
        """
        self._folder = folder
        self._record = record
        self._transaction = CheckpointTransaction(folder, shards, key=key, overwrite=overwrite)
        self._shards: list[ShardWriter] = []
        # Threads of its own, because an executor starts none any more once the main thread has ended.
        self._syncs: list[threading.Thread] = []
        self._synced: set[ShardWriter] = set()  # or a thread is at it
        self._failures: dict[ShardWriter, Exception] = {}
        if len(shards) > 1:
            allow_many_files()
        try:
            for layout in shards:
                if layout.name in self.complete:
                    continue
                part = self._transaction.part_of(layout)
                self._shards.append(ShardWriter(part, layout, on_complete=self._sync))
        except BaseException:
            self.abort()
            raise
        self._shard_of = {name: shard for shard in self._shards for name in shard.layout.tensors}

    @property
    def complete(self) -> Mapping[str, bytes]:
        """See ``CheckpointTransaction.complete``."""
        return self._transaction.complete

    @property
    def kept(self) -> list[str]:
        """See ``CheckpointTransaction.kept``."""
        return self._transaction.kept

    def forget(self) -> None:
        """See ``CheckpointTransaction.forget``. Call it when no write is under way; ``abort`` must follow."""
        self._close()
        self._transaction.forget()

    @property
    def files(self) -> Mapping[str, tuple[int, str]]:
        """See ``CheckpointTransaction.files``."""
        return self._transaction.files

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write ``data`` (C-contiguous) as the tensor's bytes from byte ``offset`` on. Thread-safe.

        Raises ``OutputError`` when the write fails, or when the tensor has no such bytes or has got them already.
        After a failed write the bytes may be written again.
        """
        self._shard_of[name].write(name, offset, data)

    def write_batch(self, pieces: Iterable[Piece]) -> None:
        """``write`` many pieces; small neighbours in a shard are written as one. Thread-safe."""
        by_shard: dict[ShardWriter, list[Piece]] = {}
        for piece in pieces:
            by_shard.setdefault(self._shard_of[piece[0]], []).append(piece)
        for shard, its_pieces in by_shard.items():
            shard.write_batch(its_pieces)

    def add_file(self, name: str, data: bytes) -> None:
        """See ``CheckpointTransaction.add_file``."""
        self._transaction.add_file(name, data)

    def copy_file(self, name: str, source: Path) -> None:
        """See ``CheckpointTransaction.copy_file``."""
        self._transaction.copy_file(name, source)

    def flush(self) -> None:
        """Check that all bytes came, and wait until they are on the disk. Call it after all writes have returned.

        Raises ``OutputError`` if a tensor is incomplete or the disk reports a failure; then call ``abort``, or leave
        the ``with`` block.
        """
        unwritten = [name for shard in self._shards for name in shard.unwritten()]
        if unwritten:
            raise OutputError(f"{self._folder}: internal error: not completely written: {some(unwritten)}")
        for shard in self._shards:
            if shard not in self._synced:  # a shard without data, or no thread could be started
                self._synced.add(shard)
                self._complete(shard)
        self._wait_for_syncs()
        for shard in self._shards:
            if shard in self._failures:
                raise self._failures[shard]

    def finish(self) -> None:
        """Flush, and give all files their names, the index last.

        Raises ``OutputError`` as ``flush`` and ``CheckpointTransaction.finish`` do.
        """
        self.flush()
        self._close()
        self._transaction.finish()

    def abort(self) -> None:
        """Give up, once no write is under way: see ``CheckpointTransaction.abort``. Does nothing after ``finish``."""
        self._close()
        self._transaction.abort()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _sync(self, shard: ShardWriter) -> None:
        """Start to flush a complete shard to the disk while others are still written."""
        thread = threading.Thread(target=self._complete, args=(shard,), name="fsync")
        try:
            thread.start()
        except RuntimeError:  # no more threads: flush does it
            return
        self._syncs.append(thread)
        self._synced.add(shard)

    def _complete(self, shard: ShardWriter) -> None:
        try:
            shard.finish()
            if self._record is not None:
                self._transaction.record(shard.layout, self._record(shard.layout))
        except Exception as error:  # raised by flush
            self._failures[shard] = error

    def _wait_for_syncs(self) -> None:
        for thread in list(self._syncs):
            thread.join()

    def _close(self) -> None:
        """Close the shards once no thread writes."""
        for shard in self._shards:
            if shard not in self._synced:  # the others close when they are on the disk, and may be recorded
                shard.close()
        self._wait_for_syncs()
