"""One file of a checkpoint while it is written: any range of any tensor, in any order, from any thread."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from merge_engine.checkpoint.output_folder import naming
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.checkpoint.unfinished import new_draft
from merge_engine.errors import OutputError
from merge_engine.storage import PAGE, as_bytes, mount_of
from merge_engine.text import some

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)

Piece = tuple[str, int, memoryview]
"""Bytes of a tensor: its name, the first byte's offset in the tensor, and the bytes (C-contiguous)."""


@contextlib.contextmanager
def write_shard(drafts: Path, layout: ShardLayout) -> Iterator[ShardWriter]:
    """Write one shard of a transaction that another process may have opened.

    ``drafts`` is the folder from ``CheckpointTransaction.open_drafts``. At the end of the ``with`` block the shard
    is complete, on the disk, and a part of the transaction; after an exception nothing is left of it. Any process
    may write it again. The copy that was begun last counts; an earlier one that is still being written is refused
    at its end.

    Raises ``OutputError`` when bytes are missing at the end, when the file cannot be written, and when the copy is
    refused because the shard was begun again or the transaction is over.
    """
    part = drafts.parent / layout.part_name
    with naming(part):
        draft = new_draft(drafts, layout.name)
    shard = ShardWriter(draft, layout)
    try:
        with naming(part):
            shard.open()  # another process may remove the file before the first write
        yield shard
        shard.finish()
        with naming(part):
            draft.replace(part)
    except OutputError as error:
        if draft.exists():
            raise
        raise OutputError(
            f"{part}: this copy of the shard is not used: another process has begun it again, or the merge that it "
            "belongs to has ended"
        ) from error
    finally:
        shard.close()
        with contextlib.suppress(
            OSError
        ):  # what led here matters more; the end of the transaction deletes drafts
            draft.unlink(missing_ok=True)


class ShardWriter:
    """Writes the new file ``part`` with the given ``layout``. ``write`` and ``write_batch`` are thread-safe."""

    def __init__(
        self, part: Path, layout: ShardLayout, on_complete: Callable[[ShardWriter], None] | None = None
    ):
        """Create the file with its header, and reserve its disk space: a disk too small is found at the start.

        ``on_complete`` is called in the thread that writes the last byte, and must not wait for the shard; for a
        shard without data it is never called. Raises ``OutputError``.
        """
        self.part = part
        self.layout = layout
        self._on_complete = on_complete
        self._missing = layout.size - len(layout.header)  # bytes of data
        # The bytes that are claimed by writes: starts and ends of their ranges in turns. A claim adds both its edges.
        # An edge that is there already is removed instead, because two ranges meet there.
        self._edges: list[int] = []
        self._state = threading.Condition(threading.Lock())
        self._under_way = 0  # writes
        self._open = True
        # Descriptors for writes through the page cache and past it: None until needed, -1 after the end, or if there
        # can be none. A sweep has many files, of which few are written at a time.
        self._descriptor: int | None = None
        self._direct: int | None = None
        self._opening = threading.Lock()
        with naming(part):
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                self._prepare(descriptor)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def open(self) -> int:
        """The descriptor for writes through the page cache. Opens the file, unless it is open or was closed.

        Raises ``OSError``.
        """
        with self._opening:
            if self._descriptor is None:
                self._descriptor = os.open(self.part, os.O_WRONLY | os.O_CLOEXEC)
            return self._descriptor

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write ``data`` (C-contiguous) as the tensor's bytes from byte ``offset`` on.

        Raises ``OutputError`` when the write fails, or when the tensor has no such bytes or has got them already.
        After a failed write the bytes may be written again.
        """
        data = as_bytes(data)
        self._write_at(self._position(name, offset, data.nbytes), data)

    def write_batch(self, pieces: Iterable[Piece]) -> None:
        """``write`` many pieces.

        Pieces smaller than a page are written together with their neighbours in the file.
        """
        placed = [
            (self._position(name, offset, data.nbytes), as_bytes(data)) for name, offset, data in pieces
        ]
        placed.sort(key=lambda place: place[0])
        small: list[memoryview] = []
        end = 0  # position in the file after the small pieces
        for position, data in placed:
            if small and (position != end or data.nbytes >= PAGE):
                self._write_joined(small, end)
                small = []
            if data.nbytes >= PAGE:
                self._write_at(position, data)
            elif data.nbytes:
                small.append(data)
                end = position + data.nbytes
        if small:
            self._write_joined(small, end)

    def unwritten(self) -> list[str]:
        """The names of the tensors with missing bytes, in the order of the file."""
        if self._missing == 0:
            return []
        return [
            tensor.name
            for tensor in self.layout.tensors.values()
            if tensor.nbytes and not self._covers(tensor.start, tensor.start + tensor.nbytes)
        ]

    def finish(self) -> None:
        """Wait until the file is on the disk, and close it, because shards may outnumber the limit of open files.

        Raises ``OutputError`` when bytes are missing, or when the disk reports a failure.
        """
        try:
            with self._state:
                self._wait_for_writes()
                self._under_way += 1  # so that no thread closes the file meanwhile
            try:
                if unwritten := self.unwritten():
                    raise OutputError(
                        f"{self.part}: internal error: not completely written: {some(unwritten)}"
                    )
                with naming(self.part):
                    os.fsync(self.open())
            finally:
                with self._state:
                    self._under_way -= 1
                    self._state.notify_all()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file, once no write is under way. It stays as it is; later writes raise ``OutputError``."""
        with self._state:
            self._wait_for_writes()  # the number of a closed descriptor may be given to another file
            descriptors = (self._descriptor, self._direct)
            self._descriptor = self._direct = -1
        for descriptor in descriptors:
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)

    def _prepare(self, descriptor: int) -> None:
        # A RAM disk would provide all pages at once, which delays the start.
        if mount_of(self.part.parent).kind != "tmpfs":
            try:
                os.posix_fallocate(descriptor, 0, self.layout.size)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        os.ftruncate(descriptor, self.layout.size)
        header = memoryview(self.layout.header)
        while header.nbytes:
            header = header[os.pwrite(descriptor, header, len(self.layout.header) - header.nbytes) :]

    def _position(self, name: str, offset: int, nbytes: int) -> int:
        """The position in the file of a piece of a tensor. Raises ``OutputError`` if the tensor has no such bytes."""
        tensor = self.layout.tensors[name]
        if offset < 0 or offset + nbytes > tensor.nbytes:
            raise OutputError(
                f"{self.part}: internal error: tensor {name!r} has {tensor.nbytes} bytes, not {nbytes} from "
                f"{offset} on"
            )
        return tensor.start + offset

    def _write_joined(self, pieces: list[memoryview], end: int) -> None:
        data = memoryview(b"".join(pieces))
        self._write_at(end - data.nbytes, data, on_pages=False)

    def _write_at(self, position: int, data: memoryview, on_pages: bool = True) -> None:
        """Write all of ``data``: whole pages past the page cache if that works and the memory is ``on_pages``.

        Writing through the page cache took several times the processor time on a virtual disk, and pushed the
        inputs out of the cache.
        """
        if not data.nbytes:
            return
        end = position + data.nbytes
        with self._state:
            self._check_claim(position, end)
            self._claim(position, end)
            self._under_way += 1
        written = False
        try:
            whole_pages = on_pages and data.nbytes >= PAGE and position % PAGE == 0
            with naming(self.part):
                self._write_all(data, position, self._open_direct() if whole_pages else -1)
            written = True
        finally:
            with self._state:
                if written:
                    self._missing -= data.nbytes
                    if self._missing == 0 and self._on_complete is not None:
                        self._on_complete(self)
                else:
                    self._claim(position, end)  # removes the edges again
                self._under_way -= 1
                self._state.notify_all()

    def _check_claim(self, start: int, end: int) -> None:
        """Raise ``OutputError`` for bytes that are claimed already, or after the file was closed.

        Bytes are claimed before they are written, so that none is written twice or to a closed file.
        """
        before = bisect_right(self._edges, start)
        if before % 2 or bisect_left(self._edges, end) != before:
            inside = start if before % 2 else self._edges[before]
            name = next(t.name for t in self.layout.tensors.values() if inside < t.start + t.nbytes)
            raise OutputError(f"{self.part}: internal error: tensor {name!r} was written twice")
        if not self._open:
            raise OutputError(f"{self.part}: internal error: written to after it was closed")

    def _claim(self, *edges: int) -> None:
        for edge in edges:
            at = bisect_left(self._edges, edge)
            if self._edges[at : at + 1] == [edge]:
                del self._edges[at]
            else:
                self._edges.insert(at, edge)

    def _covers(self, start: int, end: int) -> bool:
        before = bisect_right(self._edges, start)
        return before % 2 == 1 and self._edges[before] >= end

    def _wait_for_writes(self) -> None:
        """Refuse new writes, and wait for those under way. The caller holds ``_state``."""
        self._open = False
        self._state.wait_for(lambda: self._under_way == 0)

    def _open_direct(self) -> int:
        with self._opening:
            if self._direct is None:
                try:
                    flags = os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0)
                    self._direct = os.open(self.part, flags)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED + _TOO_MANY_OPEN:
                        raise
                    self._direct = -1
            return self._direct

    def _write_all(self, data: memoryview, position: int, direct: int) -> None:
        while data.nbytes:
            whole = data.nbytes // PAGE * PAGE if direct >= 0 and position % PAGE == 0 else 0
            try:
                descriptor, piece = (direct, data[:whole]) if whole else (self.open(), data)
                written = os.pwrite(descriptor, piece, position)
            except OSError as error:
                if not whole or error.errno not in _UNSUPPORTED:
                    raise
                direct = -1  # memory that is not aligned, or a file system that refuses this write
                continue
            data, position = data[written:], position + written
