"""The unit of work: one chunk of one tensor, and what is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_engine.methods import Need
from merge_engine.methods.needs import Step, steps
from merge_engine.planning.joint import JointTask, Part


@dataclass(frozen=True, slots=True)
class Visit:
    """One chunk of one tensor: elements [start, start + count).

    ``needs`` and ``steps`` are by group of the task: what is measured, and its readings in this visit; ``last`` says
    that they are complete after it. ``parts`` are merged. ``alone`` says that the chunk answers the needs for
    itself, as if it were a tensor, ``shared`` that ``steps`` are those of the shared groups of the schedule.
    ``inputs_are_there`` says that an earlier visit brought the inputs into memory, ``inputs_stay`` that a later one
    will use them, ``final`` that a tensor that is cut is merged after it.
    """

    task: JointTask
    start: int
    count: int
    needs: Sequence[Sequence[Need]]
    steps: Sequence[Sequence[Step]]
    last: bool
    parts: Sequence[Part] = ()
    alone: bool = False
    shared: bool = False
    inputs_are_there: bool = False
    inputs_stay: bool = False
    final: bool = True

    @property
    def whole(self) -> bool:
        """Whether the chunk is all of the tensor."""
        return self.count == self.task.count

    @property
    def ends(self) -> bool:
        """Whether the visit ends with the tensor."""
        return self.start + self.count == self.task.count

    def answers(self, group: int) -> bool:
        """Whether all needs of a group are answered after this visit."""
        now, working = self.steps[group], self.task.groups[group].task.working
        return self.last and (not now or now[-1] == steps(self.needs[group], working)[-1])
