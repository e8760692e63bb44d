"""merge_engine: exact model merging at the speed of the disk.

    import merge_engine as me

    me.run("recipe.yaml", "merged/")                                     # checkpoints to a checkpoint
    me.merge_tensors(base, [a, b], "ties", density=0.2, weight=[0.5, 0.5])  # tensors to a tensor
    me.merge_state_dicts(base_sd, [sd_a, sd_b], "ties", density=0.2)
    me.load(base, [a, b]).merge("ties", density=0.3).into(model)          # inputs in memory, merged again and again
    me.plan("recipe.yaml")                                               # checks all inputs, merges nothing
    me.write_report("merged/")                                           # losses to the election, norms, angles
    me.verify("merged/")                                                 # its files against its manifest
    me.diff("merged/", "other/")                                         # what differs between two checkpoints

A method of your own is a class: see ``Method`` and ``register``. Every error that the caller can fix is a
``MergeError``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from merge_engine.errors import (
    BackendError,
    CheckpointError,
    ClusterError,
    ManifestError,
    MergeError,
    NonFiniteError,
    OptionError,
    OutputError,
    PlanError,
    RecipeError,
    ReportError,
    SearchError,
)

if TYPE_CHECKING:
    from merge_engine.backends.operations import (
        Band,
        Combine,
        Consensus,
        Dense,
        Divergence,
        Draw,
        Entry,
        Nearswap,
        Ranked,
        RankMask,
        Scored,
        TopShare,
        Variance,
    )
    from merge_engine.distributed.options import RayOptions
    from merge_engine.engine.resident import merge_state_dicts, merge_tensors
    from merge_engine.engine.run import plan, schedule
    from merge_engine.inspect.diff import Difference, TensorDifference, TensorType, diff
    from merge_engine.inspect.verify import Finding, Verification, verify
    from merge_engine.methods import (
        METHODS,
        Gram,
        KeyRanks,
        MaskedL1,
        MaskedSquares,
        Method,
        NonZero,
        Overlaps,
        Task,
        Together,
        register,
    )
    from merge_engine.observe.discards import Discards, discards
    from merge_engine.observe.result import MergeResult, ModelCounts, TensorResult
    from merge_engine.planning import MergePlan, Schedule
    from merge_engine.recipe import Recipe, load_recipe, parameter
    from merge_engine.report import write_report
    from merge_engine.running import run
    from merge_engine.searches import SearchResult, search
    from merge_engine.searches.lm_eval import LmEval
    from merge_engine.session import Merge, Session, load
    from merge_engine.sweeps import SweepResult, grid, sweep

# Each module is loaded on the first use of a name in it: a tool that imports this package but rarely merges starts
# fast.
_HOMES = {
    "merge_engine.backends.operations": (
        "Band",
        "Combine",
        "Consensus",
        "Dense",
        "Divergence",
        "Draw",
        "Entry",
        "Nearswap",
        "RankMask",
        "Ranked",
        "Scored",
        "TopShare",
        "Variance",
    ),
    "merge_engine.distributed.options": ("RayOptions",),
    "merge_engine.engine.resident": ("merge_state_dicts", "merge_tensors"),
    "merge_engine.engine.run": ("plan", "schedule"),
    "merge_engine.inspect.diff": ("Difference", "TensorDifference", "TensorType", "diff"),
    "merge_engine.inspect.verify": ("Finding", "Verification", "verify"),
    "merge_engine.methods": (
        "Gram",
        "KeyRanks",
        "METHODS",
        "MaskedL1",
        "MaskedSquares",
        "Method",
        "NonZero",
        "Overlaps",
        "Task",
        "Together",
        "register",
    ),
    "merge_engine.observe.discards": ("Discards", "discards"),
    "merge_engine.observe.result": ("MergeResult", "ModelCounts", "TensorResult"),
    "merge_engine.planning": ("MergePlan", "Schedule"),
    "merge_engine.recipe": ("Recipe", "load_recipe", "parameter"),
    "merge_engine.report": ("write_report",),
    "merge_engine.running": ("run",),
    "merge_engine.searches": ("SearchResult", "search"),
    "merge_engine.searches.lm_eval": ("LmEval",),
    "merge_engine.session": ("Merge", "Session", "load"),
    "merge_engine.sweeps": ("SweepResult", "grid", "sweep"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "BackendError",
    "Band",
    "CheckpointError",
    "ClusterError",
    "Combine",
    "Consensus",
    "Dense",
    "Difference",
    "Discards",
    "Divergence",
    "Draw",
    "Entry",
    "Finding",
    "Gram",
    "KeyRanks",
    "LmEval",
    "ManifestError",
    "MaskedL1",
    "MaskedSquares",
    "Merge",
    "MergeError",
    "MergePlan",
    "MergeResult",
    "Method",
    "ModelCounts",
    "Nearswap",
    "NonFiniteError",
    "NonZero",
    "OptionError",
    "OutputError",
    "Overlaps",
    "PlanError",
    "RankMask",
    "Ranked",
    "RayOptions",
    "Recipe",
    "RecipeError",
    "ReportError",
    "Schedule",
    "Scored",
    "SearchError",
    "SearchResult",
    "Session",
    "SweepResult",
    "Task",
    "TensorDifference",
    "TensorResult",
    "TensorType",
    "Together",
    "TopShare",
    "Variance",
    "Verification",
    "diff",
    "discards",
    "grid",
    "load",
    "load_recipe",
    "merge_state_dicts",
    "merge_tensors",
    "parameter",
    "plan",
    "register",
    "run",
    "schedule",
    "search",
    "sweep",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value
