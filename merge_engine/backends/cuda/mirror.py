"""Host memory and its mirror on a CUDA device: copies up, kernels and copies down, each on a stream of their own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from merge_engine.backends.base import HEADROOM
from merge_engine.backends.cuda.handles import DeviceArray, Results
from merge_engine.backends.memory import address_of
from merge_engine.errors import BackendError, DeviceMemoryError

if TYPE_CHECKING:
    from merge_engine._cuda import DeviceMemory, HostMemory, Native

PAGE = 4096
"""Where inputs and outputs start in attached memory (see ``Backend.attach``)."""

DETOUR = 64 << 10
"""Bytes that are copied in about the time that starting another copy takes."""


class _Mirrored(NamedTuple):
    device: DeviceMemory
    host: HostMemory


class DeviceMirror:
    """While host memory is attached, as many bytes on the device, each in the same place.

    Whoever uses a piece of the memory again must have waited for what used it before. Memory that is let go of earlier
    is kept until all copies are done: native memory sees to that itself.
    """

    def __init__(self, native: Native, device: int):
        self._native = native
        self._device = device
        self._up, self.compute, self._down = (native.Queue(device) for _ in range(3))
        self._mirrored: _Mirrored | None = None
        self._spare: list[tuple[int, HostMemory]] = []  # pinned memory for results, with its size

    @property
    def attached(self) -> bool:
        """Whether there is a mirror."""
        return self._mirrored is not None

    def attach(self, memory: memoryview, scratch: int) -> None:
        """Mirror host memory, and pin it (see ``Backend.attach``)."""
        needed = len(memory) + scratch + HEADROOM
        try:
            if self._native.free_memory(self._device) < needed:
                raise MemoryError
            mirrored = self._native.DeviceMemory(self.compute, nbytes=len(memory), zero=False)
        except MemoryError:
            raise DeviceMemoryError(
                f"CUDA device {self._device} has less than {needed / 2**20:,.0f} MiB of free memory"
            ) from None
        self.compute.wait()  # the mirror is there for the other streams too
        self._mirrored = _Mirrored(mirrored, self._native.HostMemory(memory))

    def detach(self) -> None:
        """Wait for all work, and let go of the memory."""
        try:
            for queue in (self._up, self.compute, self._down):
                queue.wait()
        finally:
            self._mirrored = None
            self._spare.clear()

    def address(self, memory: memoryview) -> int:
        """Where a view of the attached memory is mirrored."""
        device, host = self._attached()
        return device.address + (address_of(memory) - host.address if memory else 0)

    def upload(self, arrays: Sequence[DeviceArray]) -> None:
        """Copy the inputs of a batch to the device; kernels wait for them.

        What lies between two of them is an input of the batch that is not needed, or nothing.
        """
        copied = None
        for first, last in _joined(arrays, DETOUR):
            device, host = self._attached()
            at = first - device.address
            copied = self._native.upload(self._up, to=device, source=host, at=at, nbytes=last - first)
        if copied is not None:
            copied.hold_back(self.compute)

    def download(self, outputs: Sequence[DeviceArray], results: Results) -> None:
        """Copy the outputs of a batch to the host, and its results, once its kernels are done.

        Between two outputs may be one that the host has written, but not within a page.
        """
        assert results.ready is not None and results.memory is not None, "the batch was launched"
        results.ready.hold_back(self._down)
        for first, last in _joined(outputs, PAGE - 1):
            device, host = self._attached()
            at = first - device.address
            self._native.download(self._down, to=host, source=device, at=at, nbytes=last - first)
        results.arrived = self._bring_down(results.memory, results.nbytes)

    def _attached(self) -> _Mirrored:
        if self._mirrored is None:
            raise BackendError("the cuda backend takes host memory only while it is attached")
        return self._mirrored

    def _bring_down(self, memory: DeviceMemory, nbytes: int) -> Callable[[], bytes]:
        """Copy a few bytes to pinned memory. What is returned waits for them and all that comes down before."""
        capacity, pinned = self._take_pinned(nbytes)
        done = self._native.download(self._down, to=pinned, source=memory, at=0, nbytes=nbytes)

        def arrived() -> bytes:
            done.wait()
            data = ctypes.string_at(pinned.address, nbytes)
            self._spare.append((capacity, pinned))
            return data

        return arrived

    def _take_pinned(self, nbytes: int) -> tuple[int, HostMemory]:
        for i, (capacity, _) in enumerate(self._spare):
            if capacity >= nbytes:
                return self._spare.pop(i)
        return nbytes, self._native.HostMemory(nbytes=nbytes)


def _joined(arrays: Sequence[DeviceArray], gap: int) -> list[tuple[int, int]]:
    """The ranges of memory where arrays are. Those that are no more than ``gap`` bytes apart are one range."""
    ranges = [(array.address, array.address + array.nbytes) for array in arrays if array.count]
    result: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if result and first - result[-1][1] <= gap:
            result[-1] = result[-1][0], max(result[-1][1], last)
        else:
            result.append((first, last))
    return result
