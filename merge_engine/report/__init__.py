"""What became of the task vectors of a merge, as a page and as JSON. A layer above the engine."""

from merge_engine.report.writing import write_report

__all__ = ["write_report"]
