"""What the merges of the recipes of a schedule have come to, and what is measured for several of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, TypeAlias

from merge_engine.backends import Backend
from merge_engine.backends.operations import Chunk
from merge_engine.engine.answers import SharedAnswers
from merge_engine.engine.kept import Kept
from merge_engine.engine.measuring import Measurement
from merge_engine.engine.remembering import Remembering
from merge_engine.methods import Answers, Need, Operation, Task
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import TensorResult
from merge_engine.planning import JointTask, MergePlan, Schedule, Visit

Solved: TypeAlias = tuple[Operation, dict[int, Any]]
"""An operation whose masks the backend has solved, and for each model a handle to the number of entries that its mask
would keep without trim slack."""


class Before(NamedTuple):
    """The tensor of a group that was measured and is still there: its chunk, and the recipes that copy the base.

    Without a chunk nothing was measured, because all recipes copy.
    """

    chunk: Chunk | None
    unchanged: frozenset[int]


class Tally(Protocol):
    """Takes the chunks of all tensors that are measured together, in the place of a ``Measurement``."""

    def add(self, chunk: Chunk, task: Task) -> None:
        """Take a chunk. Those of a tensor come in order."""


class Run:
    """What the merge of one recipe has come to.

    ``results`` has an entry for each merged tensor. ``trimmed_to`` has, by model, the number of entries that a trim
    over the whole model would have kept without slack. ``decided`` are the answers to the shared needs, once a tensor
    was merged with them; ``shared`` measures them, if there are any. ``notes`` are messages for the user. ``label``
    names the recipe in messages, if there are several. ``failed`` says that this recipe was the reason for an error.
    """

    def __init__(
        self,
        plan: MergePlan,
        backend: Backend,
        ledger: Ledger,
        notes: list[str],
        shared: Measurement | None = None,
        label: str = "",
    ):
        self.plan = plan
        self.backend = backend
        self.ledger = ledger
        self.notes = notes
        self.shared = shared
        self.label = label
        self.failed = False
        self.results: dict[str, TensorResult] = {}
        self.trimmed_to: dict[int, int] = {}
        self.operations: dict[str, Solved] = {}
        self.decided: SharedAnswers | None = None

    def add(self, task: Task, count: int) -> TensorResult:
        """Add elements that were merged or copied to the results, and return that of the tensor."""
        result = self.results.setdefault(task.name, TensorResult(task.name, 0))
        result.elements += count
        return result


class Runs:
    """The runs of all recipes of a schedule, by their numbers, and what is measured for several of them together.

    ``answered`` is called with each tensor that is only measured, and its answers. ``known`` has each recipe's answers
    to the shared needs, if they are known. ``labels`` are the names of several recipes. ``kept`` has what was measured
    of the same tensors before, and takes what is measured; ``keeps`` says that there is such a thing. ``tally`` takes
    the chunks of visits that are ``shared``; None: measurements of the shared needs do.
    """

    def __init__(
        self,
        schedule: Schedule,
        backend: Backend,
        ledger: Ledger | None = None,
        notes: list[str] | None = None,
        answered: Callable[[Task, Answers], None] | None = None,
        known: Sequence[SharedAnswers | None] = (),
        labels: Sequence[str] = (),
        kept: Kept | None = None,
        tally: Tally | None = None,
    ):
        self.backend = backend
        self.tally = tally
        self.keeps = kept is not None
        self._kept = kept
        self.ledger = ledger or Ledger()
        self.notes = notes if notes is not None else []
        self.answered = answered
        self.shared: list[Measurement] = []
        self.last_shared = [group.tasks[-1] for group in schedule.shared]
        self.before: dict[tuple[JointTask, int], Before] = {}
        self._measurements: dict[tuple[JointTask, int], Measurement] = {}  # of tensors with several visits
        of_recipes: dict[int, Measurement] = {}
        for group in schedule.shared:
            answers = _together([known[recipe] for recipe in group.recipes if recipe < len(known)])
            measurement = self._measuring(group.tasks, group.needs, known=answers)
            self.shared.append(measurement)
            of_recipes |= dict.fromkeys(group.recipes, measurement)
        self.each = tuple(
            Run(
                plan,
                backend,
                self.ledger,
                self.notes,
                of_recipes.get(number),
                labels[number] if labels else "",
            )
            for number, plan in enumerate(schedule.plans)
        )

    def measurement(self, visit: Visit, number: int) -> Measurement:
        """The measurement that a visit belongs to, for a group of its task."""
        group, needs = visit.task.groups[number], visit.needs[number]
        task = group.task
        if visit.alone:
            return Measurement(self.backend, needs, task.working, visit.count)
        found = self._measurements.get((visit.task, number))
        if found is None:
            shared = None if group.shared is None else self.shared[group.shared]
            found = self._measuring([task], needs, shared)
            if not (visit.whole and visit.parts):
                self._measurements[visit.task, number] = found
        return found

    def _measuring(
        self,
        tasks: Sequence[Task],
        needs: Sequence[Need],
        shared: Measurement | None = None,
        known: SharedAnswers | None = None,
    ) -> Measurement:
        """A measurement of one tensor, or of several together."""
        working, elements = tasks[0].working, sum([task.count for task in tasks])
        if self._kept is None:
            return Measurement(self.backend, needs, working, elements, shared, known)
        return Remembering(self._kept.of(tasks), self.backend, needs, working, elements, shared, known)

    def beside(self, backend: Backend) -> Runs:
        """The part of the same runs that another backend does."""
        other = copy(self)
        other.backend = backend
        other.each = tuple(copy(run) for run in self.each)
        for run in other.each:
            run.backend = backend
        return other

    def forget(self, task: JointTask) -> None:
        """Let go of what was measured for a tensor."""
        for number, group in enumerate(task.groups):
            self._measurements.pop((task, number), None)
            self.before.pop((task, number), None)
            for part in group.parts:
                self.each[part.recipe].operations.pop(task.name, None)


def _together(known: Sequence[SharedAnswers | None]) -> SharedAnswers | None:
    """The answers of several recipes to shared needs, as those of one; None if they are not known."""
    answers = [each for each in known if each is not None]
    if not answers:
        return None
    return SharedAnswers(
        [pair for each in answers for pair in each.found], [pair for each in answers for pair in each.places]
    )
