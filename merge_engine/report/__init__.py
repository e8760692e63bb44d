"""The report on a merge: losses to the election, norms and angles of the task vectors, as a page and as JSON."""

from merge_engine.report.writing import write_report

__all__ = ["write_report"]
