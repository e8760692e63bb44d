"""The limits of a run: memory, and the bytes of a chunk."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MEMORY = 400_000_000
"""Bytes of tensor data that a run holds in the host's memory at a time by default."""

PIECE = 16 << 20
"""Bytes of inputs and output in a chunk: large enough for disk throughput, small enough for the processor's cache."""

DEVICE_PIECE = 64 << 20
"""The same for a device, which has no such cache, and where each chunk takes launches."""

CACHED_PIECE = 8 << 20
"""Bytes of output in a chunk whose inputs are used in place."""

SIDE_BY_SIDE = 8
"""Most shards that are written at a time: one file on a RAM disk takes 2.4 GB/s however many threads write to it."""


@dataclass(frozen=True)
class Budget:
    """Limits of a run: ``memory`` in bytes of tensor data, of the host or of the device that computes.

    ``in_place`` says that inputs are used in the page cache and take none of the memory. ``piece`` and
    ``cached_piece`` are the bytes of a chunk, see ``PIECE``, ``DEVICE_PIECE`` and ``CACHED_PIECE``. ``side_by_side``
    shards are written at a time. ``whole_outputs`` says that outputs are wanted as whole tensors: then no more of them
    are begun at a time than fit into ``memory``, even if a tensor must be read several times.
    """

    memory: int = DEFAULT_MEMORY
    in_place: bool = False
    piece: int = PIECE
    cached_piece: int = CACHED_PIECE
    side_by_side: int = SIDE_BY_SIDE
    whole_outputs: bool = False
