"""What a merge is, and in which order it is done."""

from merge_engine.planning.plan import Input, MergePlan, make_plan, measuring
from merge_engine.planning.schedule import DEFAULT_MEMORY, Budget, Schedule, Visit
from merge_engine.planning.tasks import Catalogue, make_tasks

__all__ = [
    "DEFAULT_MEMORY",
    "Budget",
    "Catalogue",
    "Input",
    "MergePlan",
    "Schedule",
    "Visit",
    "make_plan",
    "make_tasks",
    "measuring",
]
