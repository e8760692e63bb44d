"""A session: inputs in memory, what was measured of them, and the devices that compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from merge_engine.arguments import path_of
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE, Checkpoint, parse_size
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.in_memory import WHOLE, Lane, Values, device_of, merge_in_memory
from merge_engine.engine.kept import Kept
from merge_engine.engine.publishing import result_of
from merge_engine.engine.run import plan_options
from merge_engine.engine.runs import Runs
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.to_folders import merge_to_folders
from merge_engine.errors import CheckpointError, OptionError
from merge_engine.observe.result import MergeResult
from merge_engine.operands import InMemory
from merge_engine.planning import (
    DEVICE_PIECE,
    Budget,
    MergePlan,
    Planner,
    Schedule,
    make_plan,
    plan_state_dicts,
)
from merge_engine.recipe import ModelReference, Recipe, RecipeSource
from merge_engine.session.merge import Merge
from merge_engine.session.places import Place
from merge_engine.session.recipes import recipe_of
from merge_engine.session.targets import Targets
from merge_engine.session.watching import Watched
from merge_engine.storage import give_back

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

T = TypeVar("T", bound=Targets)

_SHARE = 8
"""Answers take at most one part in so many of what the inputs take, or ``_LEAST`` bytes if that is more."""

_LEAST = 256 << 20

_LEAST_ROOM = 1 << 18
"""Bytes of a GPU's memory for what goes up to it."""


@dataclass
class Inputs:
    """What a session merges.

    ``opened`` are the models with their tensors in memory. ``recipe`` names them; it is ``complete`` if it says how
    they are merged as well. ``goes_up`` says that some tensors are not on the device that merges them, and go up to it
    for each merge. ``watched`` are the state dicts that they are, if they are no checkpoints.
    """

    opened: Mapping[ModelReference, Checkpoint]
    recipe: Recipe
    complete: bool
    goes_up: bool = False
    watched: Watched | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors of all models, each once."""
        every = [operand for each in self.opened.values() for operand in each.tensors.values()]
        return list({id(o.tensor): o.tensor for o in every if isinstance(o, InMemory)}.values())

    def plan(self, recipe: Recipe, taking: Callable[[Any], object]) -> MergePlan:
        """The plan of a recipe. ``taking`` gets what its tasks were made of."""
        if self.watched is not None:
            return plan_state_dicts(recipe, self.opened, taking)
        return make_plan(
            recipe, None, shard_size=parse_size(DEFAULT_SHARD_SIZE), opened=self.opened, taking=taking
        )


@dataclass(frozen=True)
class Planned:
    """A plan, and the models that it is of."""

    plan: MergePlan
    opened: Mapping[ModelReference, Checkpoint]


class Session:
    """Models in memory, to be merged again and again. ``load`` makes one; use it in a ``with`` block, or close it.

    What is measured for one merge is kept for the next. Threads may share a session: merges wait for each other, since
    each uses all cores. ``notes`` are messages for the user.
    """

    def __init__(self, inputs: Inputs, places: Sequence[Place], notes: Sequence[str] = ()):
        self.notes = list(notes)
        self._inputs: Inputs | None = inputs
        self._places = list(places)
        self._values = [Values(place.device) for place in places]
        self._planner = Planner(inputs.plan)
        held = sum(tensor.nbytes for tensor in inputs.tensors)
        self._kept = Kept(max(held // _SHARE, _LEAST))
        self._lock = threading.RLock()

    def merge(self, what: str | RecipeSource | None = None, /, **changes: Any) -> Merge:
        """Plan a merge of the session's models, and check it. Nothing is computed yet.

        ``what``: the name of a method, for all models of the session; a recipe that names some of them (YAML text, a
        path, a mapping or a ``Recipe``); or nothing, for the recipe that the session was loaded with. ``changes`` are
        parameters and keys in place of those of the recipe: a value for all models, a list with one for each, or, under
        a name such as ``weight[1]``, one for a single model. ``lambda`` is a keyword of Python: write
        ``**{"lambda": 0.5}``. Weights default to 1 if only a method is named.

        Raises ``RecipeError``, ``PlanError`` and ``CheckpointError`` as ``plan`` does, and ``OptionError`` if the
        session is closed or was loaded without a recipe.
        """
        with self._in_use() as inputs:
            if what is None and not inputs.complete:
                raise OptionError("the session was loaded without a recipe; name a method, such as ties")
            return Merge(self, self.plan(recipe_of(inputs.recipe, inputs.opened, what, changes)))

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes that the session holds, by device: inputs and, under ``answers``, what was measured of them.

        The tensors of state dicts count, although they are the caller's.
        """
        held: dict[str, int] = {}
        with self._lock:
            for tensor in self._inputs.tensors if self._inputs is not None else ():
                held[str(tensor.device)] = held.get(str(tensor.device), 0) + tensor.nbytes
            for place, values in zip(self._places, self._values, strict=True):
                held[place.device] = held.get(place.device, 0) + values.nbytes
            held["answers"] = self._kept.nbytes
        return held

    def forget(self) -> None:
        """Let go of what was measured: the next merge measures anew."""
        with self._lock:
            self._kept.clear()

    def close(self) -> None:
        """Let go of all memory, once the merge under way is finished. What is closed stays closed.

        The tensors of state dicts stay. Those that the session has read are gone for its merges, too.
        """
        with self._lock:
            inputs, self._inputs = self._inputs, None
            self._values = [Values(place.device) for place in self._places]
            self._kept.clear()
            if inputs is not None and inputs.watched is None:
                for tensor in inputs.tensors:
                    tensor.untyped_storage().resize_(0)
                give_back()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def plan(self, recipe: Recipe) -> Planned:
        """Plan a recipe over the session's models. Raises as ``merge`` does."""
        with seldom_collected, self._in_use() as inputs:
            return Planned(self._planner.plan(recipe), inputs.opened)

    def carry_out(
        self,
        planned: Planned,
        targets: Callable[[MergePlan, Mapping[str, str], set[int]], T],
    ) -> tuple[MergeResult, T]:
        """Carry out a plan over the models in memory, into tensors; if the inputs were changed since, it is made anew.

        ``targets`` makes what takes the merged tensors, from the plan, the device that each is computed on, and the
        addresses of the inputs' memory. Raises ``CheckpointError`` if the inputs are changed meanwhile, and else what
        ``merge_in_memory`` raises.
        """
        with seldom_collected, self._in_use() as inputs:
            if planned.opened is not inputs.opened:
                planned = self.plan(planned.plan.recipe)
            plan = planned.plan
            of_task = self._division(plan)
            devices = {name: self._places[number].device for name, number in of_task.items()}
            memory = {tensor.untyped_storage().data_ptr() for tensor in inputs.tensors if tensor.nbytes}
            taking = targets(plan, devices, memory)
            schedule = Schedule(plan, self._budget(inputs))
            runs = Runs(schedule, self._places[0].backend, kept=self._kept)
            run, others = runs.each[0], [runs.beside(place.backend) for place in self._places[1:]]
            lanes = [Lane(*each) for each in zip((runs, *others), self._values, strict=True)]
            start = time.perf_counter()
            merge_in_memory(schedule, lambda task: lanes[of_task[task.name]], taking.target, taking.merged)
            run.ledger.seconds = time.perf_counter() - start
            if any(values.composed for values in self._values):
                used = {operand for task in plan.tasks for operand in task.inputs}
                for values in self._values:
                    values.keep_only(used)
            if inputs.watched is not None and inputs.watched.changed():
                raise CheckpointError("the inputs were changed while they were merged; merge them again")
            notes = [*taking.notes, *run.notes]
            return result_of(plan, run.results, run.trimmed_to, run.ledger, notes), taking

    def save(
        self,
        recipe: Recipe,
        output: str | Path,
        *,
        shard_size: int | str = DEFAULT_SHARD_SIZE,
        overwrite: bool = False,
    ) -> MergeResult:
        """Write the merge of a recipe to a folder: see ``Merge.save``."""
        folder = path_of("output", output)
        with self._in_use() as inputs:
            if inputs.watched is not None:
                raise OptionError(
                    "save: state dicts have neither config nor tokenizer; load the models from their folders"
                )
            options = plan_options(shard_size, overwrite, False)
            plan = make_plan(recipe, folder, **options, opened=inputs.opened)
            backend = self._places[0].backend
            with open_access(plan, backend) as access:
                (result,) = merge_to_folders(
                    schedule_for(plan, access, backend),
                    [folder],
                    backend,
                    access,
                    overwrite=options["overwrite"],
                    resumable=False,
                )
                return result

    @contextmanager
    def _in_use(self) -> Iterator[Inputs]:
        """The inputs as they are now, which nobody else uses meanwhile. Raises ``OptionError`` if it is closed."""
        with self._lock:
            if self._inputs is None:
                raise OptionError("the session is closed; load the models again")
            if self._inputs.watched is not None and self._inputs.watched.changed():
                self._inputs = replace(self._inputs, opened=self._inputs.watched.opened())
                self._values = [Values(place.device) for place in self._places]
                self._planner = Planner(self._inputs.plan)
            yield self._inputs

    def _budget(self, inputs: Inputs) -> Budget:
        """The schedule's limits. Tensors that are brought up to a GPU to be merged are cut, if it has little room."""
        if not inputs.goes_up:
            return WHOLE
        free = min(place.backend.free_memory() or 0 for place in self._places)
        room = min(place.room for place in self._places)
        return Budget(max(min(free // 2, room), _LEAST_ROOM), piece=DEVICE_PIECE)

    def _division(self, plan: MergePlan) -> dict[str, int]:
        """The number of the place that computes each tensor: where its inputs are, or else the one with least to do."""
        if len(self._places) == 1:
            return dict.fromkeys([task.name for task in plan.tasks], 0)
        numbers = {place.device: number for number, place in enumerate(self._places)}
        work = [0] * len(self._places)
        division = {}
        for task in plan.tasks:
            there = numbers.get(device_of(task.inputs[0]))
            number = min(range(len(work)), key=work.__getitem__) if there is None else there
            work[number] += task.count
            division[task.name] = number
        return division
