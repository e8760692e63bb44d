"""Whether two tensors hold the same bytes."""

from __future__ import annotations

from itertools import chain

from merge_engine.operands.base import Operand
from merge_engine.operands.in_memory import InMemory
from merge_engine.operands.stored import Unwritten
from merge_engine.storage import OpenFiles

_SAMPLE = 1 << 16
_SAMPLES = 16
_PIECE = 1 << 20


def same_bytes(one: Operand, other: Operand, *, sampled: bool = False) -> bool:
    """Whether two tensors of one dtype, with elements of whole bytes, have one shape and hold the same bytes.

    Tensors in files that differ are mostly found so from their first 64 KiB. ``sampled`` reads at most 1 MiB of each:
    then a difference may remain unseen. Raises ``CheckpointError`` when a file cannot be read.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if isinstance(one, Unwritten) or isinstance(other, Unwritten):
        return False
    if isinstance(one, InMemory) and isinstance(other, InMemory):
        return one.same_bytes(other)
    nbytes, size = one.count * one.dtype.itemsize, one.dtype.itemsize
    samples = ((nbytes * i // _SAMPLES // size * size, _SAMPLE) for i in range(_SAMPLES))
    pieces = ((start, _PIECE) for start in range(0, 0 if sampled else nbytes, _PIECE))
    with OpenFiles() as files:
        for start, most in chain(samples, pieces):
            length = min(most, nbytes - start)
            held = [memoryview(bytearray(length)) for _ in range(2)]
            for operand, memory in zip((one, other), held, strict=True):
                operand.read_into(memory, start // size, files)
            if held[0] != held[1]:
                return False
    return True
