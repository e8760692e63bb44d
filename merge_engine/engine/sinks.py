"""Where merged tensors go besides a checkpoint folder, and what is noted on the way."""

from __future__ import annotations

import ctypes
import hashlib
from typing import TYPE_CHECKING, Protocol

from merge_engine.engine.plan import Plan

if TYPE_CHECKING:
    import torch


class Sink(Protocol):
    """Takes merged tensors, piece by piece."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a tensor from byte ``offset`` on. The pieces of a tensor come in order."""


class MemorySink:
    """Merged tensors in memory, allocated whole."""

    def __init__(self, plan: Plan):
        import torch

        self.tensors: dict[str, torch.Tensor] = {
            job.name: torch.empty(job.shape, dtype=getattr(torch, job.out.name)) for job in plan.jobs
        }

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Copy into the tensor."""
        tensor = self.tensors[name]
        target = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        memoryview(target).cast("B")[offset : offset + len(data)] = data


class DigestingSink:
    """Passes everything on and keeps the SHA-256 of every tensor's bytes."""

    def __init__(self, sink: Sink):
        self._sink = sink
        self._hashes: dict[str, hashlib._Hash] = {}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Digest while the bytes are still in the cache, then pass them on."""
        self._hashes.setdefault(name, hashlib.sha256()).update(data)
        self._sink.write(name, offset, data)

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) by tensor name, in order of the names."""
        return {name: self._hashes[name].hexdigest() for name in sorted(self._hashes)}
