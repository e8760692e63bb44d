"""Sweeps: many recipes over the same inputs, from one reading of them.

It is not called ``sweep``, because ``merge_engine.sweep`` is the function.
"""

from merge_engine.sweeps.grids import Grid, grid
from merge_engine.sweeps.result import SweepResult
from merge_engine.sweeps.sweeping import sweep

__all__ = ["Grid", "SweepResult", "grid", "sweep"]
