"""The page of a search: what it found, what mattered, and every trial."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import combinations
from pathlib import Path
from typing import Any

from merge_engine.report.history_data import SearchHistory, Trial
from merge_engine.report.history_plots import (
    MOST_LINES,
    best_so_far,
    front,
    importances,
    parallel,
)
from merge_engine.report.templates import fill, plot, require_extra, write
from merge_engine.report.values import score_text, text_of

_MOST_PAIRS = 6  # of objectives that are drawn


def write_history(history: SearchHistory, file: Path) -> Path:
    """Write the history of a search as a page of HTML without other files, and return its path.

    It shows the best trials (the front, or with one objective the best score so far), lines of the parameters
    coloured by score, the importance of each parameter if it is known, and a table of all trials. Raises
    ``ReportError`` if matplotlib is not installed, and ``OutputError`` if the file cannot be written.
    """
    require_extra()
    write(file, _render(history, file.absolute().parent.name))
    return file


def _render(history: SearchHistory, title: str) -> str:
    trials = history.scored
    best = {trial.number for trial in history.front}
    rows = [_row(history, trial, best) for trial in history.trials]
    draws_lines = history.parameters and len(trials) > 1
    return fill(
        "history.html.jinja",
        title=title,
        counts=f"{len(history.trials):,}",
        unscored=len(history.trials) - len(trials),
        objectives=[
            {
                "name": objective.name,
                "direction": "larger" if objective.direction == "maximize" else "smaller",
                "importance": _importance(history, objective.name),
                "lines": plot(parallel(history, place)) if draws_lines else None,
            }
            for place, objective in enumerate(history.objectives)
        ],
        parameters=history.parameters,
        best=[row for row in rows if row["is_best"]],
        baseline=next((row for row in rows if row["is_baseline"]), None),
        gain=None if history.summary else _gain(history),
        summary=history.summary,
        progress=plot(best_so_far(history)) if trials and len(history.objectives) == 1 else None,
        fronts=_fronts(history) if trials else [],
        has_errors=any(error for trial in trials for error in trial.errors),
        left_out=f"The {MOST_LINES} best trials are drawn." if len(trials) > MOST_LINES else "",
        rows=rows,
    )


def _fronts(history: SearchHistory) -> list[dict[str, Any]]:
    """A plot for each pair of objectives."""
    on_front = len(history.front)
    pairs = list(combinations(range(len(history.objectives)), 2))[:_MOST_PAIRS]
    return [
        {
            "plot": plot(front(history, x, y)),
            "text": f"Points: {history.objectives[y].name} over {history.objectives[x].name}, one for each trial. "
            f"{on_front} of {len(history.scored)} are on the front. The table has all numbers.",
        }
        for x, y in pairs
    ]


def _importance(history: SearchHistory, objective: str) -> dict[str, Any] | None:
    shares = history.importance.get(objective)
    if not shares:
        return None
    ranked = sorted(shares, key=lambda name: -shares[name])
    text = ", ".join(f"{name} {shares[name]:.1%}" for name in ranked)
    return {"plot": plot(importances(shares)), "text": f"Bars: {text}"}


def _gain(history: SearchHistory) -> dict[str, str] | None:
    """With one objective: how much better the best trial is than the recipe without changes."""
    start = next((trial for trial in history.scored if trial.number == history.baseline), None)
    if start is None or len(history.objectives) != 1:
        return None
    best = history.front[0]
    sign = 1 if history.objectives[0].direction == "maximize" else -1
    gain = sign * (best.scores[0] - start.scores[0])
    errors = [trial.errors[0] if trial.errors else None for trial in (best, start)]
    if any(error is None for error in errors):
        return {"gain": f"{gain:.5g}", "errors": ""}
    error = math.hypot(*(error for error in errors if error is not None))
    return {"gain": score_text(gain, error), "errors": f"{gain / error:.1f}" if error else ""}


def _row(history: SearchHistory, trial: Trial, best: Collection[int]) -> dict[str, Any]:
    errors = trial.errors or (None,) * len(trial.scores)
    scores = [
        score_text(score if math.isfinite(score) else None, error)
        for score, error in zip(trial.scores, errors, strict=True)
    ]
    return {
        "number": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "is_best": trial.number in best,
        "is_baseline": trial.number == history.baseline,
        "settings": [
            {"name": name, "value": text_of(_plain(trial.values[name])) if name in trial.values else ""}
            for name in history.parameters
        ],
        "scores": scores or ["–"] * len(history.objectives),
        "seconds": "–" if trial.seconds is None else f"{trial.seconds:,.1f}",
    }


def _plain(value: object) -> object:
    """A float with four digits: more would hide the rest of the table."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
