"""The recipes of a sweep: read, named, and planned with all their problems at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_engine.errors import OptionError, PlanError, RecipeError
from merge_engine.planning import MergePlan
from merge_engine.recipe import Recipe, RecipeSource, load_recipe
from merge_engine.sweeps.grids import MOST
from merge_engine.sweeps.messages import for_each
from merge_engine.text import counted, shown, some

_LONGEST_NAME = 200
"""Bytes of a folder's name."""


@dataclass(frozen=True)
class Member:
    """One recipe of a sweep: its label, which messages name, and the folder of its output, if it has one."""

    label: str
    recipe: Recipe
    folder: Path | None = None


def read_members(
    recipes: Mapping[str, RecipeSource] | Sequence[RecipeSource], lenient: bool
) -> dict[str, Recipe]:
    """The recipes by label.

    Those of a sequence get the names of their files, else their own names, else their numbers from 0. Raises
    ``RecipeError`` with all problems, and ``OptionError`` for no or too many recipes.
    """
    if isinstance(recipes, str | bytes | Path | Recipe) or not isinstance(recipes, Mapping | Iterable):
        raise OptionError(
            f"recipes: must be a mapping of labels to recipes, or a list, not {shown(str(recipes))}; "
            "a grid makes such a mapping"
        )
    pairs = list(recipes.items()) if isinstance(recipes, Mapping) else [(None, each) for each in recipes]
    if not pairs or len(pairs) > MOST:
        raise OptionError(f"recipes: a sweep has 1 to {MOST:,} recipes, not {len(pairs):,}")
    if problems := [
        f"recipes: a label must be text, not {shown(label)}"
        for label, _ in pairs
        if not (label is None or isinstance(label, str))
    ]:
        raise OptionError(problems)
    read = for_each(
        [label if label is not None else str(number) for number, (label, _) in enumerate(pairs)],
        lambda number: load_recipe(pairs[number][1], lenient=lenient),
    )
    labels = [
        label if label is not None else _name_of(source, recipe, number)
        for number, ((label, source), recipe) in enumerate(zip(pairs, read, strict=True))
    ]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise RecipeError(
            f"{some(list(map(shown, twice)))}: several recipes of this name; give a mapping of labels"
        )
    return dict(zip(labels, read, strict=True))


def in_folders(recipes: Mapping[str, Recipe], outputs: Path | Sequence[Path]) -> list[Member]:
    """The recipes with their folders: below one folder by label, or one each of a list.

    Raises ``OptionError`` for labels that no folder can have as a name, and for folders that are the same or one in
    the other.
    """
    if isinstance(outputs, Path):
        names = [folder_name(label) for label in recipes]
        folders = [outputs / name for name in names]
        problems = [
            f"{shown(label)}: cannot be the name of a folder; choose another label"
            for label, name in zip(recipes, names, strict=True)
            if not 0 < len(name.encode("utf-8", "replace")) <= _LONGEST_NAME
        ]
    else:
        folders, problems = list(outputs), []
        if len(folders) != len(recipes):
            raise OptionError(
                f"outputs: {counted(len(folders), 'folder')} for {counted(len(recipes), 'recipe')}; give one for each"
            )
    by_folder: dict[Path, list[str]] = {}
    for label, folder in zip(recipes, folders, strict=True):
        by_folder.setdefault(folder.absolute(), []).append(label)
    problems += [
        f"{folder}: is the output of {some([shown(label) for label in labels])}; give each its own"
        for folder, labels in by_folder.items()
        if len(labels) > 1
    ]
    problems += [
        f"{folder}: lies in the output of {shown(by_folder[above][0])}; give it a folder beside it"
        for folder in by_folder
        for above in folder.parents
        if above in by_folder
    ]
    if problems:
        raise OptionError(problems)
    return [
        Member(label, recipe, folder)
        for (label, recipe), folder in zip(recipes.items(), folders, strict=True)
    ]


def folder_name(label: str) -> str:
    """A label as the name of a folder: with ``_`` for what has another meaning in paths."""
    name = "".join("_" if one in "/\\\0" or not one.isprintable() else one for one in label).strip()
    return f"_{name[1:]}" if name.startswith(".") else name


def check_inputs(members: Sequence[Member], plans: Sequence[MergePlan]) -> None:
    """Raise ``PlanError`` unless one recipe has all inputs that the others have."""
    inputs = [{(given.label, given.fingerprint) for given in plan.inputs} for plan in plans]
    most = max(range(len(plans)), key=lambda number: len(inputs[number]))
    problems = [
        f"{member.label}: merges {some(sorted(label for label, _ in strange))}, which {members[most].label} does not; "
        "the recipes of a sweep share their inputs: merge this one on its own"
        for member, own in zip(members, inputs, strict=True)
        if (strange := own - inputs[most])
    ]
    if problems:
        raise PlanError(problems)


def _name_of(source: RecipeSource, recipe: Recipe, number: int) -> str:
    text = str(source) if isinstance(source, str | Path) else ""
    if isinstance(source, Path) or (text.endswith((".yml", ".yaml")) and "\n" not in text):
        return Path(text).stem
    return recipe.name or str(number)
