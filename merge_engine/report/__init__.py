"""Pages about merges, and their numbers as JSON: of one merge, of a sweep, of a search."""

from merge_engine.report.writing import write_report

__all__ = ["write_report"]
