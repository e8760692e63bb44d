"""Sessions: inputs in memory, merged again and again.

``load`` reads the inputs once. ``Session.merge`` plans a merge of them, and ``Merge`` carries it out: into new tensors,
into a module of torch in place, or into a folder.
"""

from merge_engine.session.loading import load
from merge_engine.session.merge import Merge
from merge_engine.session.session import Session

__all__ = ["Merge", "Session", "load"]
