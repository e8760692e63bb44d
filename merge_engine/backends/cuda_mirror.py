"""Host memory and its mirror on a CUDA device: copies up, kernels and copies down, each on a stream of their own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from merge_engine.backends.base import HEADROOM
from merge_engine.backends.cpu import address_of
from merge_engine.backends.cuda_handles import DeviceArray, Results
from merge_engine.errors import BackendError, DeviceMemoryError
from merge_engine.storage.memory import PAGE

DETOUR = 64 << 10
"""Bytes that are copied in about the time that starting another copy takes."""


class Mirror:
    """While host memory is attached, as many bytes on the device, each in the same place.

    Whoever uses a piece of the memory again must have waited for what used it before.
    """

    def __init__(self, native: Any, device: int):
        self._native = native
        self._device = device
        self._up, self.compute, self._down = (native.Stream(device) for _ in range(3))
        self._memory: Any = None
        self._pinned: Any = None
        self._host = 0
        self._spare: list[tuple[int, Any]] = []  # pinned memory for results, with its size

    @property
    def attached(self) -> bool:
        """Whether there is a mirror."""
        return self._memory is not None

    def attach(self, memory: memoryview, scratch: int) -> None:
        """Mirror host memory, and pin it (see ``Backend.attach``)."""
        needed = len(memory) + scratch + HEADROOM
        try:
            if self._native.free_memory(self._device) < needed:
                raise MemoryError
            self._memory = self._native.DeviceMemory(self.compute.queue, len(memory), False)
        except MemoryError:
            raise DeviceMemoryError(
                f"CUDA device {self._device} has less than {needed / 2**20:,.0f} MiB of free memory"
            ) from None
        self.compute.wait()  # the mirror is there for the other streams too
        self._host = address_of(memory)
        try:
            self._pinned = self._native.PinnedMemory(self._host, len(memory))
        except (RuntimeError, MemoryError):
            self._pinned = None  # a limit on locked memory: copies are slower then, and as right

    def detach(self) -> None:
        """Wait for all work, and let go of the memory."""
        for stream in (self._up, self.compute, self._down):
            stream.wait()
        self._memory = self._pinned = None
        self._spare.clear()

    def address(self, memory: memoryview) -> int:
        """Where a view of the attached memory is mirrored."""
        if self._memory is None:
            raise BackendError("the cuda backend takes host memory only while it is attached")
        return int(self._memory.address) + (address_of(memory) - self._host if memory else 0)

    def upload(self, arrays: Sequence[DeviceArray]) -> None:
        """Copy the inputs of a batch to the device; kernels wait for them.

        What lies between two of them is an input of the batch that is not needed, or nothing.
        """
        ranges = [(array.address, array.address + array.nbytes) for array in arrays if array.count]
        for first, last in _joined(ranges, DETOUR):
            host = first - self._memory.address + self._host
            self._native.upload(self._up.queue, first, host, last - first)
        if ranges:
            self._native.Event(self._up.queue).hold_back(self.compute.queue)

    def download(self, outputs: Sequence[DeviceArray], results: Results) -> None:
        """Copy the outputs of a batch to the host, and its results, once its kernels are done.

        Between two outputs may be one that the host has written, but not within a page.
        """
        down = self._down.queue
        results.ready.hold_back(down)
        ranges = [(array.address, array.address + array.nbytes) for array in outputs if array.count]
        for first, last in _joined(ranges, PAGE - 1):
            self._native.download(down, first - self._memory.address + self._host, first, last - first)
        results.arrived = self._bring_down(results.memory.address, results.nbytes)

    def _bring_down(self, address: int, nbytes: int) -> Callable[[], bytes]:
        """Copy a few bytes to pinned memory. What is returned waits for them and all that comes down before."""
        capacity, pinned = self._take_pinned(nbytes)
        self._native.download(self._down.queue, pinned.address, address, nbytes)
        done = self._native.Event(self._down.queue)

        def arrived() -> bytes:
            done.wait()
            data = ctypes.string_at(pinned.address, nbytes)
            self._spare.append((capacity, pinned))
            return data

        return arrived

    def _take_pinned(self, nbytes: int) -> tuple[int, Any]:
        for i, (capacity, _) in enumerate(self._spare):
            if capacity >= nbytes:
                return self._spare.pop(i)
        return nbytes, self._native.PinnedMemory(nbytes)


def _joined(ranges: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Ranges of memory, those in one that are no more than ``gap`` bytes apart."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if result and first - result[-1][1] <= gap:
            result[-1] = result[-1][0], max(result[-1][1], last)
        else:
            result.append((first, last))
    return result
