"""The plan of a sweep: that of each recipe, without those whose outputs are complete already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_engine.checkpoint import MANIFEST_NAME, check_disk_space
from merge_engine.engine.made_before import is_made
from merge_engine.errors import PlanError
from merge_engine.planning import MergePlan, make_plan
from merge_engine.sweeps.messages import for_each
from merge_engine.sweeps.recipes import Member, check_inputs


@dataclass(frozen=True)
class SweepPlan:
    """The recipes of a sweep in order, with the plan of each, and the numbers of those that are complete already."""

    members: Sequence[Member]
    plans: Sequence[MergePlan]
    complete: frozenset[int]

    @property
    def missing(self) -> list[int]:
        """The numbers of the recipes that must be merged."""
        return [number for number in range(len(self.members)) if number not in self.complete]


def plan_sweep(members: Sequence[Member], *, shard_size: int, overwrite: bool, lenient: bool) -> SweepPlan:
    """Plan all recipes of a sweep. For the options see ``make_plan``.

    An output that is there already, made by the same recipe from the same inputs, is complete, unless it is to be
    overwritten. Raises ``MergeError`` with all problems of all recipes, and ``PlanError`` for recipes whose inputs
    differ and for outputs that do not fit on their disks together.
    """
    complete: set[int] = set()

    def plan(number: int) -> MergePlan:
        member = members[number]
        folder = member.folder
        if folder is not None and not overwrite and (folder / MANIFEST_NAME).exists():
            made = make_plan(member.recipe, folder, shard_size=shard_size, overwrite=True, lenient=lenient)
            if is_made(made, folder):
                complete.add(number)
                return made
        return make_plan(member.recipe, folder, shard_size=shard_size, overwrite=overwrite, lenient=lenient)

    plans = for_each([member.label for member in members], plan)
    check_inputs(members, plans)
    sizes = {
        member.folder: sum(shard.size for shard in planned.shards)
        for number, (member, planned) in enumerate(zip(members, plans, strict=True))
        if member.folder is not None and number not in complete
    }
    if problems := check_disk_space(sizes):
        raise PlanError(problems)
    return SweepPlan(members, plans, frozenset(complete))
