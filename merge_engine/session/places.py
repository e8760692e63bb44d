"""Where a session computes and holds its tensors: the host, or one or several GPUs."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

from merge_engine.backends import HEADROOM, Backend, create_backend
from merge_engine.errors import OptionError
from merge_engine.storage import available_memory

HOST = "cpu"
"""The host's memory, as torch names it."""


@dataclass(frozen=True)
class Place:
    """A backend, and the bytes of its device's memory that tensors of the session may take."""

    backend: Backend
    room: int

    @property
    def device(self) -> str:
        """The device, as torch names it."""
        return self.backend.tensors_on


def places_of(
    device: str | Sequence[str],
    backend: str | Backend,
    threads: int | None,
    memory: int | None,
    notes: list[str],
) -> list[Place]:
    """The places for the arguments of ``load``: one for each device. ``memory`` limits the room on each GPU, in bytes.

    Why a GPU that is there cannot be used is added to ``notes``. Raises ``BackendError`` and ``OptionError``.
    """
    names = [device] if isinstance(device, str) else list(device) if isinstance(device, Sequence) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise OptionError(f"device: must be a device or a list of devices, not {reprlib.repr(device)}")
    if len(set(names)) < len(names):
        raise OptionError(f"device: names one twice: {', '.join(names)}")
    if isinstance(backend, Backend):
        if len(names) > 1:
            raise OptionError(
                "backend: one backend computes on one device; give its name for several devices"
            )
        backends = [backend]
    else:
        backends = [create_backend(backend, threads, name, notes) for name in names]
    if len(backends) > 1 and not all(each.has_link for each in backends):
        raise OptionError("device: several devices must all be GPUs")
    return [Place(each, _room(each, memory)) for each in backends]


def _room(backend: Backend, memory: int | None) -> int:
    """Bytes that tensors may take: a GPU needs some for outputs, counts and masks as well."""
    free = backend.free_memory()
    if free is None:
        return available_memory()
    room = max(free - 2 * HEADROOM, 0)
    return room if memory is None else min(memory, room)
