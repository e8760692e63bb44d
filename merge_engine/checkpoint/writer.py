"""Writing a checkpoint in one process: any range of any tensor, in any order, from any thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from merge_engine.checkpoint.shard_writer import Piece, ShardWriter
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.checkpoint.transaction import CheckpointTransaction
from merge_engine.errors import OutputError
from merge_engine.storage.files import allow_many_files
from merge_engine.text import some


class CheckpointWriter:
    """Writes the planned shards into ``folder``, which is created if needed. The checkpoint is complete or not there.

    All shards are open at once, and none waits for another. As a context manager it calls ``abort`` unless ``finish``
    succeeded. Check the folder with ``check_output_folder`` first: the writer replaces an earlier output without a
    question.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardLayout]):
        """Reserve the disk space of all shards, except on a RAM disk, and write their headers.

        Raises ``OutputError`` if the disk is too small, the folder cannot be written, or another merge is writing
        into it.
        """
        self._folder = folder
        self._transaction = CheckpointTransaction(folder, shards)
        self._shards: list[ShardWriter] = []
        self._syncs = ThreadPoolExecutor(max_workers=max(1, len(shards)), thread_name_prefix="fsync")
        self._finished: dict[ShardWriter, Future[None]] = {}
        if len(shards) > 1:
            allow_many_files()
        try:
            for layout in shards:
                part = self._transaction.part_of(layout)
                self._shards.append(ShardWriter(part, layout, on_complete=self._sync))
        except BaseException:
            self.abort()
            raise
        self._shard_of = {name: shard for shard in self._shards for name in shard.layout.tensors}

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

    def add_file(self, relative_name: str, data: bytes) -> None:
        """See ``CheckpointTransaction.add_file``."""
        self._transaction.add_file(relative_name, data)

    def flush(self) -> None:
        """Check that all bytes came, and wait until they are on the disk. Call it after all writes have returned.

        Raises ``OutputError`` if a tensor is incomplete or the disk reports a failure; then call ``abort``, or leave
        the ``with`` block.
        """
        unwritten = [name for shard in self._shards for name in shard.unwritten()]
        if unwritten:
            raise OutputError(f"{self._folder}: internal error: not completely written: {some(unwritten)}")
        for shard in self._shards:
            if shard not in self._finished:  # a shard without data
                self._sync(shard)
        for finished in self._finished.values():
            finished.result()

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
        self._finished[shard] = self._syncs.submit(shard.finish)

    def _close(self) -> None:
        """Close the shards once no thread writes."""
        for shard in self._shards:
            shard.close()
        self._syncs.shutdown(wait=True)
