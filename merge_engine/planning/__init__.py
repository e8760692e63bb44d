"""Tasks, plan and schedule: the work of a merge and its order, known before the first byte is read."""

from merge_engine.planning.again import Planner
from merge_engine.planning.budget import DEFAULT_MEMORY, DEVICE_PIECE, PIECE, SIDE_BY_SIDE, Budget
from merge_engine.planning.buffers import is_buffer
from merge_engine.planning.inputs import Catalogue, Inputs
from merge_engine.planning.intermediates import Intermediate, named
from merge_engine.planning.joint import JointTask, Part
from merge_engine.planning.plan import Input, MergePlan, check_recipe, make_plan, measuring, open_all
from merge_engine.planning.schedule import Schedule
from merge_engine.planning.state_dicts import plan_state_dicts
from merge_engine.planning.tasks import make_tasks
from merge_engine.planning.ties import may_be_tied
from merge_engine.planning.visits import Visit

__all__ = [
    "DEFAULT_MEMORY",
    "DEVICE_PIECE",
    "PIECE",
    "SIDE_BY_SIDE",
    "Budget",
    "Catalogue",
    "Input",
    "Inputs",
    "Intermediate",
    "JointTask",
    "MergePlan",
    "Part",
    "Planner",
    "Schedule",
    "Visit",
    "check_recipe",
    "is_buffer",
    "make_plan",
    "make_tasks",
    "may_be_tied",
    "measuring",
    "named",
    "open_all",
    "plan_state_dicts",
]
