"""The files of a search: the best recipes, the page, the numbers. Each is complete or not there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from merge_engine.checkpoint.durable import sync, sync_all
from merge_engine.checkpoint.output_folder import naming
from merge_engine.checkpoint.staged_files import refuse_taken
from merge_engine.errors import OutputError, SearchError
from merge_engine.recipe import Recipe
from merge_engine.report.history_data import SearchHistory, Trial
from merge_engine.text import some

STUDY_FILE = "study.db"
"""The storage of a search in its output folder."""
_PAGE, _NUMBERS = "history.html", "history.json"
_RECIPE = re.compile(r"(best|front-\d+)\.yaml")


def prepare_folder(folder: Path, inputs: Sequence[Path]) -> None:
    """Make the folder of a search. Raises ``OutputError`` if it cannot be, or holds files of others with our names.

    ``inputs`` are the folders of the models that are merged: nothing is written into them.

    Raises ``SearchError`` if matplotlib, which draws the page, is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SearchError(
            'the page of a search needs matplotlib; run: pip install "merge_engine[search]"'
        ) from None
    with naming(folder):
        for each in inputs:
            if each.is_dir() and folder.resolve().is_relative_to(each.resolve()):
                raise OutputError(f"{folder}: lies in the folder of the input {each}; write somewhere else")
        folder.mkdir(parents=True, exist_ok=True)
        ours = (folder / _NUMBERS).exists() or (folder / STUDY_FILE).exists()
        found = [each.name for each in _recipes_in(folder)] if not ours else []
    if found:
        raise OutputError(
            f"{folder}: holds {some(found)} of no search; move it away, or choose another folder"
        )


def write_files(folder: Path, history: SearchHistory, best: Sequence[tuple[Trial, Recipe]]) -> None:
    """Write the files of a search into a folder, in place of those of an earlier one.

    ``best``: the front with its recipes. The new files are on the disk before the first takes its place; those that
    name others come last. Raises ``OutputError`` and ``ReportError``.
    """
    from merge_engine.report.history import write_history

    several = len(history.objectives) > 1
    names = [f"front-{i}.yaml" if several else "best.yaml" for i in range(1, len(best) + 1)]
    texts = {name: _yaml(history, *each) for name, each in zip(names, best, strict=True)}
    texts[_NUMBERS] = json.dumps(_numbers(history, dict(zip(names, best, strict=True))), indent=1) + "\n"
    parts = {name: folder / f".{name}.part" for name in (*names, _PAGE, _NUMBERS)}
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in parts:
            refuse_taken(folder, name)
        try:
            for name, text in texts.items():
                parts[name].write_text(text, encoding="utf-8")
            write_history(history, parts[_PAGE])
            sync_all(list(parts.values()))
            for name, part in parts.items():
                part.rename(folder / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        for old in _recipes_in(folder):
            if old.name not in texts:
                old.unlink()
        sync(folder)


def _recipes_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if _RECIPE.fullmatch(each.name))


def _yaml(history: SearchHistory, trial: Trial, recipe: Recipe) -> str:
    """A recipe with a line that says which trial it is, and how it scored."""
    said = (
        "the recipe without changes"
        if trial.number == history.baseline
        else f"trial {trial.number} of a search"
    )
    scores = "".join(f", {name}: {value}" for name, value in _scores(history, trial).items())
    return f"# {said}{scores}\n{recipe.to_yaml()}"


def _numbers(history: SearchHistory, best: Mapping[str, tuple[Trial, Recipe]]) -> dict[str, object]:
    """The numbers of the page, unrounded."""
    return {
        "parameters": list(history.parameters),
        "objectives": [asdict(objective) for objective in history.objectives],
        "baseline": history.baseline,
        "best": {name: trial.number for name, (trial, _) in best.items()},
        "summary": list(history.summary),
        "importance": history.importance,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state,
                "values": dict(trial.values),
                "scores": _scores(history, trial),
                "standard_errors": dict(zip(_names(history), trial.errors, strict=False)),
                "seconds": trial.seconds,
                **({"reason": trial.reason} if trial.reason else {}),
            }
            for trial in history.trials
        ],
    }


def _scores(history: SearchHistory, trial: Trial) -> dict[str, float]:
    return dict(zip(_names(history), trial.scores, strict=False))


def _names(history: SearchHistory) -> list[str]:
    return [objective.name for objective in history.objectives]
