"""The way to a GPU: memory there for inputs and outputs, staging memory here, and copies between the two."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge_engine.backends.base import HEADROOM
from merge_engine.backends.memory import address_of, view_at
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


class TorchLink:
    """``nbytes`` bytes of ``device``'s memory, and copies between it and ``staging``, which is pinned.

    Copies up, kernels (``compute``) and copies down have a stream each. Whoever asks for a copy waits for it. A link
    that dies without ``close`` is closed then. Raises ``DeviceMemoryError`` when the device has too little memory for
    it and ``scratch`` more bytes.
    """

    def __init__(self, nbytes: int, scratch: int, staging: memoryview, device: torch.device):
        self._host = torch.frombuffer(staging, dtype=torch.uint8)
        needed = nbytes + scratch + HEADROOM
        try:
            if free_memory(device) < needed:
                raise torch.cuda.OutOfMemoryError
            self._device = torch.empty(nbytes, dtype=torch.uint8, device=device)
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
        self.memory = view_at(self._device.data_ptr(), nbytes)
        # Pinned memory is copied without a detour. Where it cannot be pinned, copies take longer, no more.
        cudart = torch.cuda.cudart()
        status = cudart.cudaHostRegister(self._host.data_ptr(), len(staging), 0)
        pinned = bool(status == cudart.cudaError.success)
        self._end = weakref.finalize(self, _let_go, self._host, pinned, streams)
        if not pinned:
            with contextlib.suppress(
                RuntimeError
            ):  # a refusal is reported once more, by whatever is launched next
                torch.zeros(1, device=device)

    def piece(self, memory: memoryview) -> torch.Tensor:
        """The bytes of a piece of the device's memory."""
        return _cut(self._device, memory)

    def upload(self, source: memoryview, target: memoryview) -> None:
        """See ``Backend.upload``."""
        self._copy(self._up, _cut(self._host, source), self.piece(target))

    def download(self, source: memoryview, target: memoryview) -> None:
        """See ``Backend.download``."""
        self._copy(self._down, self.piece(source), _cut(self._host, target))

    def close(self) -> None:
        """Wait for everything, and unpin the staging memory."""
        self._end()

    def _copy(self, stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        done.synchronize()


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody has taken, or that torch keeps for later."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    except torch.cuda.OutOfMemoryError:  # not even enough to ask
        return 0


def _cut(whole: torch.Tensor, memory: memoryview) -> torch.Tensor:
    """The bytes of ``whole`` that are those of a view."""
    first = address_of(memory) - whole.data_ptr() if len(memory) else 0
    return whole[first : first + len(memory)]


def _let_go(host: torch.Tensor, pinned: bool, streams: Sequence[torch.cuda.Stream]) -> None:
    """Wait for the streams, then unpin host memory, which is there until then."""
    try:
        for stream in streams:
            stream.synchronize()
    finally:
        if pinned:
            torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
