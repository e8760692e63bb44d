"""Bringing the tensors of opened checkpoints into memory: once, with several threads, each to its place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_engine.backends.memory import view_at
from merge_engine.checkpoint import Checkpoint
from merge_engine.engine.mover import READ_THREADS
from merge_engine.errors import CheckpointError, DeviceMemoryError
from merge_engine.operands import InMemory, Operand
from merge_engine.recipe import ModelReference
from merge_engine.session.places import HOST, Place
from merge_engine.storage import OpenFiles, Way, available_memory, way_here
from merge_engine.tensors import new_tensor
from merge_engine.text import size_text, some
from merge_engine.workers import Workers

if TYPE_CHECKING:
    import torch

_PIECE = 16 << 20
"""Elements that a thread brings in one go: several threads share a large tensor."""

_STAGED = 4 << 20
"""Bytes that go up to a GPU at a time."""


def bring_all(
    opened: Mapping[ModelReference, Checkpoint], places: Sequence[Place]
) -> tuple[dict[ModelReference, Checkpoint], bool]:
    """The checkpoints with all of their tensors in memory, and whether some are not on the device that computes.

    Tensors go to the ``places`` with most room. What does not fit on any GPU stays in the host's memory. Raises
    ``CheckpointError`` for files that cannot be read or have changed, and for tensors that torch does not have, and
    ``DeviceMemoryError`` if the memory is too small, before anything is read.
    """
    distinct = {id(checkpoint): checkpoint for checkpoint in opened.values()}
    by_operand = {operand: name for each in distinct.values() for name, operand in each.tensors.items()}
    _demand_dtypes(by_operand)
    where, all_fit = _spread(by_operand, places)
    tensors = _read(where)
    residents = {
        operand: InMemory(
            by_operand[operand], tensor, operand.dtype, operand.shape, operand.owner, operand.label
        )
        for operand, tensor in tensors.items()
    }
    brought = {
        key: replace(each, tensors={name: residents[operand] for name, operand in each.tensors.items()})
        for key, each in distinct.items()
    }
    return {reference: brought[id(checkpoint)] for reference, checkpoint in opened.items()}, not all_fit


def _demand_dtypes(operands: Collection[Operand]) -> None:
    import torch

    lacking: dict[tuple[str, str], list[str]] = {}
    for operand in operands:
        if not hasattr(torch, operand.dtype.name) or operand.dtype.bits < 8:
            lacking.setdefault((operand.owner, str(operand.dtype)), []).append(operand.label)
    if lacking:
        raise CheckpointError(
            [
                f"{owner}: torch has no tensors of {dtype}, so these cannot be loaded: {some(labels)}; merge with run"
                for (owner, dtype), labels in lacking.items()
            ]
        )


def _spread(operands: Mapping[Operand, str], places: Sequence[Place]) -> tuple[dict[Operand, str], bool]:
    """The device of each operand, and whether all fit on those that compute.

    Operands of one name are together, because they are merged together.
    """
    sizes: dict[str, int] = {}
    for operand, name in operands.items():
        sizes[name] = sizes.get(name, 0) + _nbytes(operand)
    room = {place.device: place.room for place in places}
    available = available_memory() if places[0].backend.has_link else places[0].room
    left_over, device_of = 0, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        device = max(room, key=lambda device: room[device])
        if places[0].backend.has_link and room[device] < sizes[name]:
            device_of[name] = HOST
            left_over += sizes[name]
        else:
            device_of[name] = device
            room[device] -= sizes[name]
    needed = left_over if places[0].backend.has_link else sum(sizes.values())
    if needed > available:
        raise DeviceMemoryError(
            f"the inputs take {size_text(needed)} of the host's memory, but {size_text(available)} are available, "
            f"{size_text(needed - available)} too little; end other programs, or merge with run, which streams"
        )
    return {operand: device_of[name] for operand, name in operands.items()}, not left_over


def _read(where: Mapping[Operand, str]) -> dict[Operand, torch.Tensor]:
    """The tensors of operands, each on its device."""
    import torch

    files = frozenset(file for operand in where for file in operand.files)
    way = way_here(files)
    pinned = any(device.startswith("cuda") for device in where.values())
    tensors = {}
    workers = Workers(READ_THREADS, "load")
    with OpenFiles() as opened:
        under_way: list[Future[None]] = []
        workers.start()
        try:
            for operand, device in where.items():
                tensor = new_tensor(operand.shape, getattr(torch, operand.dtype.name), device)
                if pinned and device == HOST:
                    tensor = tensor.pin_memory()
                tensors[operand] = tensor
                flat = tensor.view(-1)
                bring = _bring if device == HOST else _bring_up
                under_way += [
                    workers.submit(bring, operand, flat[start : start + _PIECE], start, opened, way)
                    for start in range(0, operand.count, _PIECE)
                ]
            for each in under_way:
                each.result()
        finally:
            workers.close()
        opened.check_unchanged()
    return tensors


def _bring(operand: Operand, target: torch.Tensor, start: int, files: OpenFiles, way: Way) -> None:
    """Read elements into a piece of a tensor in the host's memory."""
    operand.read_into(view_at(target.data_ptr(), target.nbytes), start, files, way)


def _bring_up(operand: Operand, target: torch.Tensor, start: int, files: OpenFiles, way: Way) -> None:
    """Read elements into a buffer, and copy them to a piece of a tensor on a GPU."""
    import torch

    step = _STAGED // target.element_size()
    buffer = torch.empty(min(step, target.numel()), dtype=target.dtype, pin_memory=True)
    for at in range(0, target.numel(), step):
        part = buffer[: min(step, target.numel() - at)]
        _bring(operand, part, start + at, files, way)
        target[at : at + step].copy_(part)


def _nbytes(operand: Operand) -> int:
    return operand.count * operand.dtype.bits // 8
