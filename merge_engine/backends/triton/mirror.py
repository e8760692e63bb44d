"""Host memory and its mirror on a GPU: copies up, kernels and copies down, each on a stream of their own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge_engine.backends.base import HEADROOM
from merge_engine.backends.memory import address_of
from merge_engine.errors import DeviceMemoryError


@dataclass(frozen=True)
class Copy:
    """A small tensor on its way to the host, and the event at which it is there."""

    host: torch.Tensor
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, source: torch.Tensor) -> Copy:
        """Copy a tensor behind what the current stream has to do."""
        if source.device.type == "cpu":
            return cls(source, None)
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        stream = torch.cuda.current_stream(source.device)
        source.record_stream(stream)  # its memory is not used for anything else before it has been copied
        return cls(host, stream.record_event())

    def wait(self) -> torch.Tensor:
        """The values, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


class TorchMirror:
    """As many bytes on ``device`` as ``memory`` has, a byte for a byte.

    Whoever uses a piece of the memory again must have waited for what used it before. A mirror that dies without
    ``close`` is closed then. Raises ``DeviceMemoryError`` when the device has too little memory for it and
    ``scratch`` more bytes.
    """

    def __init__(self, memory: memoryview, scratch: int, device: torch.device):
        self._host = torch.frombuffer(memory, dtype=torch.uint8)
        self._address = self._host.data_ptr()
        needed = len(memory) + scratch + HEADROOM
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        try:
            if torch.cuda.mem_get_info(device)[0] + cached < needed:
                raise torch.cuda.OutOfMemoryError
            self._device = torch.empty(len(memory), dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError:
            raise DeviceMemoryError(
                f"GPU {device.index} has less than {needed >> 20:,} MiB of free memory"
            ) from None
        torch.cuda.synchronize(device)  # what had this memory before may have been at work on another stream
        self._up = torch.cuda.Stream(device)
        self.compute = torch.cuda.Stream(device)
        self._down = torch.cuda.Stream(device)
        streams = (self._up, self.compute, self._down)
        for stream in streams:  # torch knows only of the stream that was current when it gave the memory
            self._device.record_stream(stream)
        # Pinned memory is copied without a detour. Where it cannot be pinned, copies take longer, no more.
        cudart = torch.cuda.cudart()
        status = cudart.cudaHostRegister(self._address, len(memory), 0)
        pinned = bool(status == cudart.cudaError.success)
        self._end = weakref.finalize(self, _let_go, self._host, pinned, streams)
        if not pinned:
            with contextlib.suppress(
                RuntimeError
            ):  # a refusal is reported once more, by whatever is launched next
                torch.zeros(1, device=device)

    def pieces(self, memory: memoryview) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of a view of the memory, and those that mirror them."""
        first = address_of(memory) - self._address if len(memory) else 0
        piece = slice(first, first + len(memory))
        return self._host[piece], self._device[piece]

    def upload(self, memory: memoryview) -> torch.Tensor:
        """Copy a view of the memory to the device; kernels wait for it."""
        host, mirrored = self.pieces(memory)
        with torch.cuda.stream(self._up):
            mirrored.copy_(host, non_blocking=True)
        self.compute.wait_stream(self._up)
        return mirrored

    def download(self, mirrored: torch.Tensor, host: torch.Tensor, counts: torch.Tensor) -> Copy:
        """Copy an output down, and the counts that belong to it, behind what the kernels have to do so far."""
        self._down.wait_stream(self.compute)
        with torch.cuda.stream(self._down):
            host.copy_(mirrored, non_blocking=True)
            return Copy.of(counts)

    def close(self) -> None:
        """Wait for everything, and unpin the memory."""
        self._end()


def _let_go(host: torch.Tensor, pinned: bool, streams: Sequence[torch.cuda.Stream]) -> None:
    """Wait for the streams, then unpin host memory, which is there until then."""
    try:
        for stream in streams:
            stream.synchronize()
    finally:
        if pinned:
            torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
