"""The way to a CUDA device: memory there for inputs and outputs, staging memory here, and copies between the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from merge_engine.backends.base import HEADROOM
from merge_engine.backends.memory import address_of, view_at
from merge_engine.errors import BackendError, DeviceMemoryError

if TYPE_CHECKING:
    from merge_engine._cuda import DeviceMemory, HostMemory, Native


class _Attached(NamedTuple):
    device: DeviceMemory
    host: HostMemory
    memory: memoryview  # the whole of ``device``


class DeviceLink:
    """Copies up, kernels (``compute``) and copies down, each on a stream of their own.

    Whoever asks for a copy waits for it, and nobody asks before what used the memory was waited for. So no event
    orders the streams. If a run ends early, native memory is kept until all copies are done.
    """

    def __init__(self, native: Native, device: int):
        self._native = native
        self._device = device
        self._up, self.compute, self._down = (native.Queue(device) for _ in range(3))
        self._attached: _Attached | None = None

    @property
    def attached(self) -> bool:
        """Whether memory is attached."""
        return self._attached is not None

    def attach(self, nbytes: int, scratch: int, staging: memoryview) -> memoryview:
        """Take memory of the device, and pin the staging memory (see ``Backend.attach``)."""
        needed = nbytes + scratch + HEADROOM
        try:
            if self._native.free_memory(self._device) < needed:
                raise MemoryError
            device = self._native.DeviceMemory(self.compute, nbytes=nbytes, zero=False)
        except MemoryError:
            raise DeviceMemoryError(
                f"CUDA device {self._device} has less than {needed / 2**20:,.0f} MiB of free memory"
            ) from None
        self.compute.wait()  # the memory is there for the other streams too
        memory = view_at(device.address, nbytes)
        self._attached = _Attached(device, self._native.HostMemory(staging), memory)
        return memory

    def detach(self) -> None:
        """Wait for all work, and let go of the memory."""
        try:
            for queue in (self._up, self.compute, self._down):
                queue.wait()
        finally:
            self._attached = None

    def upload(self, source: memoryview, target: memoryview) -> None:
        """See ``Backend.upload``."""
        device, host, _ = self._need()
        self._native.upload(
            self._up,
            to=device,
            to_at=address_of(target) - device.address,
            source=host,
            source_at=address_of(source) - host.address,
            nbytes=len(source),
        ).wait()

    def download(self, source: memoryview, target: memoryview) -> None:
        """See ``Backend.download``."""
        device, host, _ = self._need()
        self._native.download(
            self._down,
            to=host,
            to_at=address_of(target) - host.address,
            source=device,
            source_at=address_of(source) - device.address,
            nbytes=len(source),
        ).wait()

    def address(self, memory: memoryview) -> int:
        """Where a piece of the attached memory lies. Raises ``BackendError`` for other memory."""
        whole = self._need().memory
        address, start = address_of(memory) if memory else address_of(whole), address_of(whole)
        if not start <= address <= start + len(whole) - len(memory):
            raise BackendError("the cuda backend takes pieces of the memory that it attached, and no other")
        return address

    def _need(self) -> _Attached:
        if self._attached is None:
            raise BackendError("the cuda backend takes memory only while it is attached")
        return self._attached
