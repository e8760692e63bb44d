"""Whether models belong together, from their configs, tokenizers and names: found before anything is merged.

A misfit that makes the result meaningless is a problem, unless the recipe allows its kind. One that may be meant is a
warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge_engine.checkpoint import Checkpoint
from merge_engine.recipe import Recipe


@dataclass
class Findings:
    """What does not fit: ``problems`` prevent the merge, ``warnings`` do not. One line for each cause."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine(
    recipe: Recipe, base: Checkpoint | None, models: Mapping[int, Checkpoint], donor: Checkpoint
) -> Findings:
    """Compare the inputs of a merge; ``models`` are by recipe position."""
    return Findings()
