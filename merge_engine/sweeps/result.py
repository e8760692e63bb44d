"""The result of a sweep: that of each recipe, and the page that shows them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult
from merge_engine.recipe import Recipe


@dataclass
class SweepResult:
    """A finished sweep.

    ``results`` has the result of each recipe by its label, ``recipes`` the recipe, and ``changes`` its values on the
    axes of a grid. ``ledger`` is that of all recipes together: bytes that were read once for all of them, bytes of all
    outputs. ``output`` is the folder that holds the outputs' folders, if there is one. ``taken_over`` are the labels
    of the recipes whose outputs were complete before. ``notes`` are messages for the user.
    """

    results: Mapping[str, MergeResult]
    recipes: Mapping[str, Recipe]
    changes: Mapping[str, Mapping[str, object]]
    ledger: Ledger
    output: Path | None = None
    taken_over: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
