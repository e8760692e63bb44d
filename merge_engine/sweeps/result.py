"""The result of a sweep: that of each recipe, and the page that shows them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsFloat, TypeAlias

from merge_engine.arguments import path_of
from merge_engine.errors import OptionError
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult
from merge_engine.recipe import Recipe
from merge_engine.text import shown, some

PAGE = "sweep.html"

Score: TypeAlias = float | tuple[float, float]
"""A measured number, or one with its standard error."""


@dataclass
class SweepResult:
    """A finished sweep.

    ``results`` has the result of each recipe by its label, ``recipes`` the recipe, and ``changes`` its values on the
    axes of a grid. ``ledger`` is that of all recipes together: bytes that were read once for all of them, bytes of all
    outputs. ``output`` is the folder that holds the outputs' folders, if there is one. ``taken_over`` are the labels
    of the recipes whose outputs were complete before. ``page`` shows the recipes side by side, if it was written.
    ``notes`` are messages for the user.
    """

    results: Mapping[str, MergeResult]
    recipes: Mapping[str, Recipe]
    changes: Mapping[str, Mapping[str, object]]
    ledger: Ledger
    output: Path | None = None
    taken_over: tuple[str, ...] = ()
    page: Path | None = None
    notes: list[str] = field(default_factory=list)

    def write_page(
        self,
        file: str | Path | None = None,
        *,
        scores: Mapping[str, Mapping[str, Score]] | None = None,
        norms: bool = False,
    ) -> tuple[Path, Path]:
        """Write the page of all recipes side by side, and its numbers as JSON; return the paths of both.

        ``file`` is by default ``sweep.html`` in the sweep's folder. ``scores`` has what the merged models scored, by
        label and name: numbers, or pairs of a number and its standard error. ``norms`` measures the norms of task
        vectors, from one more reading for each recipe.

        Raises ``OptionError`` for labels that the sweep does not have, for scores that are no numbers, and for no
        ``file`` where there is no folder;
        ``ReportError`` and ``OutputError`` as ``write_sweep_page`` does.
        """
        from merge_engine.report import SweepEntry, write_sweep_page

        scores = scores or {}
        if strange := [shown(label) for label in scores if label not in self.results]:
            raise OptionError(f"scores: the sweep has no recipe {some(strange)}")
        if problems := _wrong_scores(scores):
            raise OptionError(problems)
        if file is not None:
            file = path_of("file", file)
        elif self.output is not None:
            file = self.output / PAGE
        else:
            raise OptionError("file: must be given, because the outputs have no folder in common")
        entries = [
            SweepEntry(label, self.changes.get(label, {}), result, result.output, scores.get(label, {}))
            for label, result in self.results.items()
        ]
        axes = next(iter(self.changes.values()), {})
        return write_sweep_page(entries, axes, file, norms=norms)


def _wrong_scores(scores: Mapping[str, object]) -> list[str]:
    problems = []
    for label, by_name in scores.items():
        if not isinstance(by_name, Mapping):
            problems.append(f"scores: {label}: must be a map of names to scores, not {shown(by_name)}")
            continue
        for name, score in by_name.items():
            both = score if isinstance(score, tuple) and len(score) == 2 else (score,)
            if not all(each is None or isinstance(each, SupportsFloat) for each in both):
                problems.append(
                    f"scores: {label}: {name} must be a number, or a pair with its standard error, not {shown(score)}"
                )
    return problems
