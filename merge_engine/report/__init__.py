"""Pages about merges: the report of one merge, all recipes of a sweep side by side, the history of a search."""

from merge_engine.report.history import write_history
from merge_engine.report.sweep_data import SweepEntry
from merge_engine.report.sweep_page import write_sweep_page
from merge_engine.report.writing import write_report

__all__ = ["SweepEntry", "write_history", "write_report", "write_sweep_page"]
