"""The search for the best values of a merge: Optuna proposes, a session merges, a function of the caller scores.

It is not called ``search``, because ``merge_engine.search`` is the function.
"""

from merge_engine.searches.loop import search
from merge_engine.searches.result import Comparison, SearchResult

__all__ = ["Comparison", "SearchResult", "search"]
