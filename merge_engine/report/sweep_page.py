"""The page of a sweep: all recipes side by side, as small multiples over the axes of the grid and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from merge_engine.checkpoint import REPORT_NAMES
from merge_engine.errors import MergeError, ReportError
from merge_engine.report.merged_norms import Norms, measure_norms
from merge_engine.report.sweep_data import Measure, Sweep, SweepEntry, count_shares, score_of
from merge_engine.report.sweep_plots import MOST_BARS, MOST_PANELS, bars, combinations, legend, panels
from merge_engine.report.templates import fill, plot, require_extra, write
from merge_engine.report.values import score_text, text_of
from merge_engine.text import some


def write_sweep_page(
    entries: Sequence[SweepEntry], axes: Iterable[str], file: Path, *, norms: bool = False
) -> tuple[Path, Path]:
    """Write the page of a sweep, and the same numbers as JSON beside it (``sweep.html``, ``sweep.json``).

    For each recipe and model they show the shares of entries that were kept, lost to the election and saved by slack,
    and the scores that were given. ``axes`` are the names of the grid's axes, in the order in which they are shown:
    along x, as lines, as panels; empty for a list of recipes. ``norms`` reads the inputs and the output of each recipe
    once more, for the norms of the merged task vector and of what was kept of each task vector; where they cannot be
    read, the page says so.

    Returns the paths of both files. Raises ``ReportError`` if matplotlib is not installed, or the axes do not tell the
    recipes apart, and ``OutputError`` if the files cannot be written.
    """
    require_extra()
    measured, missing = _measure(entries) if norms else ([None] * len(entries), [])
    sweep = Sweep(entries, axes, measured)
    numbers = file.with_suffix(".json")
    write(file, _render(sweep, file.absolute().parent, missing))
    write(numbers, json.dumps(_numbers(sweep), indent=1, default=str) + "\n")
    return file, numbers


def _measure(entries: Sequence[SweepEntry]) -> tuple[list[Norms | None], list[str]]:
    """The norms of each recipe, and the reasons why some have none."""
    found: list[Norms | None] = []
    missing: dict[str, None] = {}
    for entry in entries:
        try:
            if entry.folder is None:
                raise ReportError(f"{entry.label}: its tensors are in no folder")
            found.append(measure_norms(entry.folder))
        except MergeError as error:
            found.append(None)
            missing[error.problems[0].rstrip(".")] = None
    return found, list(missing)


def _render(sweep: Sweep, home: Path, missing: Sequence[str]) -> str:
    drawn = [measure for measure in sweep.measures if any(point.value for point in measure.points)]
    zero = [measure for measure in sweep.measures if measure not in drawn]
    return fill(
        "sweep.html.jinja",
        title=home.name,
        recipes=len(sweep.entries),
        grid=bool(sweep.varying),
        axes=[
            {"name": axis, "all": ", ".join(map(text_of, values)), "varies": axis in sweep.varying}
            for axis, values in sweep.axes.items()
        ],
        models=list(sweep.models.values()),
        measures=[_section(sweep, measure) for measure in drawn],
        zero=[measure.title for measure in zero],
        missing=some(missing, 3),
        has_kept_norms=any(sweep.kept_norms),
        has_merged_norms=any(each is not None and each.merged_share is not None for each in sweep.norms),
        scores=sweep.scores,
        rows=[_row(sweep, number, home) for number in range(len(sweep.entries))],
    )


def _section(sweep: Sweep, measure: Measure) -> dict[str, Any]:
    """A measure with its plots."""
    if sweep.varying:
        made, left_out = panels(measure), "panels" if len(combinations(measure)) > MOST_PANELS else ""
    else:
        made = [bars(measure, [entry.label for entry in sweep.entries])]
        left_out = "recipes" if len(sweep.entries) > MOST_BARS else ""
    return {
        "title": measure.title,
        "text": measure.text,
        "legend": legend(measure),
        "panels": [{"title": each.title, "plot": plot(each.svg), "text": each.text} for each in made],
        "left_out": left_out
        and f"The first {MOST_PANELS if sweep.varying else MOST_BARS} {left_out} are drawn.",
    }


def _row(sweep: Sweep, number: int, home: Path) -> dict[str, Any]:
    """The table's row of one recipe."""
    entry, counts, norms = sweep.entries[number], sweep.counts[number], sweep.norms[number]
    parts = [
        {"name": axis, "value": text_of(entry.values[axis]), "differs": axis in sweep.varying}
        for axis in sweep.axes
    ]
    folder = entry.folder
    report = None if folder is None else folder / REPORT_NAMES[0]
    models: list[list[str]] = []
    for name in sweep.models:
        found = counts.get(name)
        shares = {} if found is None else count_shares(found, sweep.elements[number])
        models.append(
            [
                *(_percent(shares.get(key)) for key in ("kept_share", "lost_share", "saved_share")),
                _percent(sweep.kept_norms[number].get(name)),
            ]
        )
    return {
        "label": entry.label,
        "parts": parts,
        "says_all": entry.label == ",".join(f"{part['name']}={part['value']}" for part in parts),
        "folder": None if folder is None else _link(folder, home),
        "report": None if report is None or not report.exists() else _link(report, home),
        "models": models,
        "merged": _percent(None if norms is None else norms.merged_share),
        "scores": [score_text(*score_of(entry, name)) for name in sweep.scores],
    }


def _link(target: Path, home: Path) -> str:
    """A relative link from the page: it still leads there when both are moved together."""
    path = os.path.relpath(target.absolute(), home)
    return "./" + quote(os.fsencode(path))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _numbers(sweep: Sweep) -> dict[str, Any]:
    """The numbers of the page, unrounded; shares are from 0 to 1."""
    return {
        "axes": sweep.axes,
        "models": sweep.models,
        "recipes": [_recipe(sweep, number) for number in range(len(sweep.entries))],
    }


def _recipe(sweep: Sweep, number: int) -> dict[str, Any]:
    entry, norms = sweep.entries[number], sweep.norms[number]
    recipe: dict[str, Any] = {
        "label": entry.label,
        "values": dict(entry.values),
        "folder": None if entry.folder is None else str(entry.folder),
        "elements": sweep.elements[number],
        "models": {
            name: {**counts.as_dict(), **count_shares(counts, sweep.elements[number])}
            for name, counts in sweep.counts[number].items()
        },
        "scores": {
            name: dict(zip(("score", "error"), score_of(entry, name), strict=True)) for name in entry.scores
        },
    }
    if norms is not None:
        recipe["base_norm"], recipe["merged_norm"] = norms.base, norms.merged
        for name, share in sweep.kept_norms[number].items():
            recipe["models"][name]["kept_norm_share"] = share
    return recipe
