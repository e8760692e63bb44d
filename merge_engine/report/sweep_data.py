"""What the page of a sweep shows: its recipes with their results, and the shares that follow from the counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merge_engine.observe.result import MergeResult


@dataclass(frozen=True)
class SweepEntry:
    """One recipe of a sweep.

    ``values`` has its value on each axis of the grid; a list of recipes has no axes, and ``values`` is empty. ``folder``
    is the output folder, or None if the tensors went elsewhere. ``scores`` has measured scores by name: a number, or a
    number with its standard error.
    """

    label: str
    values: Mapping[str, object]
    result: MergeResult
    folder: Path | None = None
    scores: Mapping[str, float | tuple[float, float]] = field(default_factory=dict)
