"""The search for the best values of a merge: Optuna proposes, a session merges, a function of the caller scores.

The package is named after what it does, because ``merge_engine.search`` is the function.
"""

from merge_engine.searching.loop import search
from merge_engine.searching.result import Comparison, SearchResult

__all__ = ["Comparison", "SearchResult", "search"]
