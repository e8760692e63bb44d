"""mergekit's Python interface, computed by this engine.

    from merge_engine.integrations.mergekit import merge_state_dicts, merge_tensors, run_merge

are functions with mergekit's names and arguments; mergekit need not be installed. Programs that call mergekit itself,
and mergekit's own commands, are served by the engine after

    from merge_engine.integrations import mergekit
    mergekit.install()

until ``uninstall``, or inside ``with mergekit.installed() as tally:``. docs/mergekit.md says what differs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_engine.integrations.mergekit.patches import install, installed, uninstall
    from merge_engine.integrations.mergekit.running import run_merge
    from merge_engine.integrations.mergekit.tally import Tally
    from merge_engine.integrations.mergekit.tensors import merge_state_dicts, merge_tensors

_HOME_OF = {
    "install": "patches",
    "installed": "patches",
    "uninstall": "patches",
    "run_merge": "running",
    "Tally": "tally",
    "merge_state_dicts": "tensors",
    "merge_tensors": "tensors",
}

__all__ = ["Tally", "install", "installed", "merge_state_dicts", "merge_tensors", "run_merge", "uninstall"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
