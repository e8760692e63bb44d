"""Carry out a plan whose operands are tensors in memory, into tensors: visit by visit, in the calling thread.

Nothing is streamed: operands are used where they are, and brought to the device that computes if they are elsewhere. A
device works on many visits at a time, and is waited for at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_engine.backends import Backend
from merge_engine.backends.memory import view_at
from merge_engine.engine.batches import in_batches, is_copy
from merge_engine.engine.copying import differing
from merge_engine.engine.runs import Runs
from merge_engine.engine.work import Work
from merge_engine.methods import Action, Task
from merge_engine.operands import InMemory, Joined, Operand, Part, Rows, same_bytes
from merge_engine.planning import Budget, JointTask, Schedule, Visit
from merge_engine.storage import OpenFiles
from merge_engine.tensors import new_tensor

if TYPE_CHECKING:
    import torch

WHOLE = Budget(memory=2**62, in_place=True, cached_piece=2**62)
"""A tensor is cut only if it has more elements than a chunk may have."""

_UNDER_WAY = 16
"""Visits that a device has to do at most: what they use is let go of when they are done."""


class Values:
    """The elements of operands as tensors on the device ``place``, or, with None, wherever they are.

    What is composed of other tensors is made on first use, and kept until ``keep_only``. It is not thread-safe.
    """

    def __init__(self, place: str | None = None):
        import torch

        self._place = None if place is None else torch.device(place)
        self._made: dict[Operand, torch.Tensor] = {}
        self._arrays: dict[Operand, Any] = {}

    def of(self, operand: Operand) -> torch.Tensor:
        """The elements in row-major order, of shape [count]: a view, or a copy of a tensor with another layout.

        Those of ``InMemory`` are where its tensor is.
        """
        if isinstance(operand, InMemory):
            return operand.flat()
        if isinstance(operand, Part):
            return self.of(operand.whole)[operand.first : operand.first + operand.count]
        if operand not in self._made:
            self._made[operand] = self._make(operand)
        return self._made[operand]

    def array(self, operand: Operand, backend: Backend) -> Any:
        """An operand as an array of the backend that computes on the device, which takes no memory of its own."""
        found = self._arrays.get(operand)
        if found is None:
            tensor = self.here(self.of(operand))
            found = backend.tensor(tensor)
            if isinstance(operand, InMemory) and tensor.data_ptr() == operand.tensor.data_ptr():
                self._arrays[operand] = found
        return found

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy of it on the device."""
        if self._place is None or tensor.device == self._place:
            return tensor
        return tensor.to(self._place, non_blocking=True)

    def keep_only(self, operands: set[Operand]) -> None:
        """Let go of what was composed, but for these operands."""
        self._made = {operand: tensor for operand, tensor in self._made.items() if operand in operands}

    @property
    def composed(self) -> bool:
        """Whether anything that was composed is kept."""
        return bool(self._made)

    @property
    def nbytes(self) -> int:
        """Bytes of what was composed and is kept."""
        return sum(tensor.nbytes for tensor in self._made.values())

    def _make(self, operand: Operand) -> torch.Tensor:
        import torch

        if isinstance(operand, Joined):
            return torch.cat([self.here(self.of(part)) for part in operand.parts])
        return self.here(read_whole(operand))


def device_of(operand: Operand) -> str:
    """The device, as torch names it, of a tensor in memory or of the first that an operand is made of."""
    if isinstance(operand, InMemory):
        return str(operand.tensor.device)
    if isinstance(operand, Part):
        return device_of(operand.whole)
    if isinstance(operand, Joined):
        return device_of(operand.parts[0])
    assert isinstance(operand, Rows)
    return device_of(operand.operands[0])


def read_whole(operand: Operand) -> torch.Tensor:
    """The elements of an operand in the host's memory, of shape [count]."""
    import torch

    made = new_tensor((operand.count,), getattr(torch, operand.dtype.name), "cpu")
    if made.nbytes:
        with OpenFiles() as files:
            operand.read_into(view_at(made.data_ptr(), made.nbytes), 0, files)
    return made


class Lane(NamedTuple):
    """One of the devices that compute: its part of the runs, and the operands as it sees them."""

    runs: Runs
    values: Values


def merge_in_memory(
    schedule: Schedule,
    lane_of: Callable[[JointTask], Lane],
    target: Callable[[Task], torch.Tensor],
    merged: Callable[[Task, torch.Tensor], None],
) -> None:
    """Carry out a schedule.

    ``lane_of`` says where a task is computed. ``target`` makes the contiguous tensor that it is merged into, there, and
    ``merged`` is called with it once it is known to be filled. Raises ``NonFiniteError`` for NaN or infinity that the
    recipe does not allow, when others are already merged, and ``PlanError`` for tensors that can only be copied and
    differ.
    """
    under_way: deque[Work] = deque()
    targets: dict[str, torch.Tensor] = {}

    def finish(work: Work) -> None:
        work.wait()
        visit = work.visit
        if visit.ends:
            for part in visit.parts:
                merged(part.task, targets.pop(part.task.name))

    for task in schedule.plan.tasks:
        if not task.count:
            merged(task, target(task))
    for batch in in_batches(schedule.visits(), 0, WHOLE.memory):
        if is_copy(batch[0]):
            for visit in batch:
                runs, values = lane_of(visit.task)
                for part in visit.parts:
                    _copy(part.task, values, target, merged)
                    runs.each[part.recipe].add(part.task, visit.count)
            continue
        for lane, visits in _by_lane(batch, lane_of):
            under_way += _begin(lane, visits, target, targets)
        most = _UNDER_WAY if lane.runs.backend.has_link else 0
        while len(under_way) > most:
            finish(under_way.popleft())
    for each in under_way:
        finish(each)


def _by_lane(batch: Sequence[Visit], lane_of: Callable[[JointTask], Lane]) -> list[tuple[Lane, list[Visit]]]:
    """The visits of each device. Where they only measure, maybe for all tensors together, they stay in order."""
    found: list[tuple[Lane, list[Visit]]] = []
    for visit in batch:
        lane = lane_of(visit.task)
        candidates = found if visit.parts else found[-1:]
        there = next((visits for known, visits in candidates if known is lane), None)
        if there is None:
            there = []
            found.append((lane, there))
        there.append(visit)
    return found


def _begin(
    lane: Lane,
    visits: Sequence[Visit],
    target: Callable[[Task], torch.Tensor],
    targets: dict[str, torch.Tensor],
) -> list[Work]:
    """Hand visits over to a device. ``targets`` has the tensors of those that are not merged to their end."""
    backend = lane.runs.backend
    work = [Work(lane.runs, visit, partial(_arrays, lane, visit)) for visit in visits]
    with backend.together():
        for each in work:
            each.measure()
        for each in work:
            visit, outputs = each.visit, []
            for part in visit.parts:
                if (name := part.task.name) not in targets:
                    targets[name] = target(part.task)
                output = targets[name].view(-1)
                outputs.append(output if visit.whole else output[visit.start : visit.start + visit.count])
            each.merge(*map(backend.tensor, outputs))
    return work


def _arrays(lane: Lane, visit: Visit, count: int) -> list[Any]:
    """The first inputs of a visit as arrays of the backend."""
    runs, values = lane
    inputs = visit.task.inputs[:count]
    if visit.whole:
        return [values.array(operand, runs.backend) for operand in inputs]
    where = slice(visit.start, visit.start + visit.count)
    return [runs.backend.tensor(values.here(values.of(operand)[where])) for operand in inputs]


def _copy(
    task: Task,
    values: Values,
    target: Callable[[Task], torch.Tensor],
    merged: Callable[[Task, torch.Tensor], None],
) -> None:
    """Copy a tensor that can only be copied, and must be the same in all inputs."""
    assert task.action is Action.COPY
    first = task.inputs[0]
    for other in task.inputs[1:]:
        if not same_bytes(first, other):
            raise differing(task, first.owner, other.owner)
    tensor = target(task)
    tensor.view(-1).copy_(values.of(first))
    merged(task, tensor)
