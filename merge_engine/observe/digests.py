"""Digests of merged tensors: they show whether two merges gave the same bytes.

The digest of a tensor is XXH3-128 over the digests of its blocks, 16 bytes each (canonical, big-endian), in order.
A block is 16 MiB of the tensor's bytes, the last one the rest; a tensor without bytes has no blocks. The digest of
a model is XXH3-128 over one line for each tensor, in order of the names (docs/architecture.md, "Digests").
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence

from xxhash import xxh3_128, xxh3_128_digest, xxh3_128_hexdigest

from merge_engine.errors import OutputError
from merge_engine.text import some

BLOCK = 16 << 20
"""Bytes of a block."""


class Digests:
    """The digests of tensors whose bytes come in pieces, from any thread.

    Pieces of different tensors and of different blocks may come in any order, also at the same time. Pieces of one
    block come in order, each after ``add`` has returned from the one before it. All methods are thread-safe.

    A digest is no protection against forgery. A cryptographic digest, BLAKE3, took a sixth of the processor time of a
    merge.
    """

    def __init__(self, sizes: Mapping[str, int]):
        """``sizes``: the number of bytes of every tensor, by name."""
        self._sizes = dict(sizes)
        self._blocks: dict[str, dict[int, bytes]] = {}
        self._given_up = False
        self._changed = threading.Condition()
        self._begun: dict[tuple[str, int], tuple[int, xxh3_128]] = {}

    def add(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a tensor from byte ``offset`` on. ``data`` is contiguous.

        Raises ``OutputError`` when the tensor has no such bytes, or when bytes of a block come twice or out of order,
        and ``KeyError`` for an unknown name.
        """
        size = self._sizes[name]
        if offset < 0 or offset + data.nbytes > size:
            raise _misuse(name, f"it has {size} bytes, not {data.nbytes} from {offset} on")
        if data.nbytes == size <= BLOCK and size:
            self._finish(name, 0, xxh3_128_digest(data))
            return
        data = data.cast("B") if data.nbytes else data
        while data.nbytes:
            block, start = divmod(offset, BLOCK)
            whole = min(BLOCK, size - block * BLOCK)
            piece = data[: whole - start]
            if piece.nbytes == whole:
                self._finish(name, block, xxh3_128_digest(piece))
            else:
                self._continue(name, block, start, piece, whole)
            offset, data = offset + piece.nbytes, data[piece.nbytes :]

    def blocks(self, names: Iterable[str] | None = None) -> dict[str, dict[int, bytes]]:
        """The digests (16 bytes) of all complete blocks, by tensor and number of the block: plain data to be sent.

        Tensors without a complete block are left out, and those that are not among ``names``, if these are given.
        """
        found = self._blocks.copy()
        return {name: dict(found[name]) for name in (found if names is None else names) if name in found}

    def wait_for(self, names: Collection[str]) -> None:
        """Wait until these tensors are digested. Raises ``OutputError`` once ``give_up`` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or all(map(self._is_complete, names)))
            if self._given_up:
                raise OutputError("the merge has failed before all tensors of a shard were digested")

    def give_up(self) -> None:
        """No more bytes will come."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def merge(self, blocks: Mapping[str, Mapping[int, bytes]]) -> None:
        """Take digests of blocks that another process computed, as its ``blocks`` gave them.

        A block may come twice. Raises ``OutputError`` if the two digests differ, or if there is no such block.
        """
        for name, by_number in blocks.items():
            for block, digest in by_number.items():
                if not 0 <= block * BLOCK < self._sizes.get(name, 0):
                    raise _misuse(name, f"it has no block {block}")
                if self._blocks.setdefault(name, {}).setdefault(block, digest) != digest:
                    raise _misuse(name, f"block {block} came to different bytes in two places")

    def by_name(self) -> dict[str, str]:
        """Hexadecimal digests of all tensors, in order of their names.

        Raises ``OutputError`` when some of their bytes have not come.
        """
        found: dict[str, str] = {}
        missing = []
        for name in sorted(self._sizes):
            blocks = self._blocks.get(name, {})
            count = self._count(name)
            if len(blocks) < count:
                missing.append(name)
            else:
                found[name] = tensor_digest([blocks[block] for block in range(count)])
        if missing:
            raise OutputError(f"internal error: not completely digested: {some(missing)}")
        return found

    def _continue(self, name: str, block: int, start: int, piece: memoryview, whole: int) -> None:
        """Take a part of a block. No other thread has the block meanwhile: it is not in ``_begun``."""
        expected, running = self._begun.pop((name, block), (0, None))
        if start != expected:
            raise _misuse(name, f"block {block} got byte {start} and not {expected}")
        running = running or xxh3_128()
        running.update(piece)
        if start + piece.nbytes == whole:
            self._finish(name, block, running.digest())
        else:
            self._begun[name, block] = (start + piece.nbytes, running)

    def _finish(self, name: str, block: int, digest: bytes) -> None:
        blocks = self._blocks.setdefault(name, {})
        if blocks.setdefault(block, digest) is not digest:
            raise _misuse(name, f"block {block} was digested twice")
        if len(blocks) == self._count(name):
            with self._changed:
                self._changed.notify_all()

    def _count(self, name: str) -> int:
        """The number of blocks of a tensor."""
        return -(-self._sizes[name] // BLOCK)

    def _is_complete(self, name: str) -> bool:
        return len(self._blocks.get(name, ())) == self._count(name)


def digest_of(data: bytes) -> str:
    """The hexadecimal digest of a file, or of a header: XXH3-128 of its bytes."""
    return xxh3_128_hexdigest(data)


def tensor_digest(blocks: Sequence[bytes]) -> str:
    """The hexadecimal digest of a tensor, from the digests of its blocks (16 bytes each) in order."""
    return xxh3_128_hexdigest(b"".join(blocks))


def model_digest(digests: Mapping[str, str]) -> str:
    """One digest for all tensors: XXH3-128 over the lines "<hexadecimal digest>  <name>" in order of the names.

    It does not depend on how the model is cut into shards.
    """
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return xxh3_128_hexdigest(lines.encode())


def _misuse(name: str, what: str) -> OutputError:
    return OutputError(f"internal error: digest of tensor {name!r}: {what}")
