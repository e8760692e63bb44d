"""What is said about the recipes of a sweep: each line once, with the labels of the recipes that it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from merge_engine.errors import MergeError, PlanError
from merge_engine.text import some

T = TypeVar("T")


def for_each(labels: Sequence[str], make: Callable[[int], T]) -> list[T]:
    """What ``make`` gives for the number of each recipe.

    Raises one ``MergeError`` with the problems of all recipes. A line that all of them have stands there once; others
    begin with the label.
    """
    made: list[T] = []
    errors: dict[int, MergeError] = {}
    for number in range(len(labels)):
        try:
            made.append(make(number))
        except MergeError as error:
            errors[number] = error
    if errors:
        kinds = {type(error) for error in errors.values()}
        problems = {number: error.problems for number, error in errors.items()}
        raise (kinds.pop() if len(kinds) == 1 else PlanError)(with_labels(labels, problems))
    return made


def with_labels(labels: Sequence[str], lines: Mapping[int, Sequence[str]]) -> list[str]:
    """Lines about recipes, by their numbers, each once. Those that are not about all begin with the labels."""
    having: dict[str, list[int]] = {}
    for number, own in lines.items():
        for line in own:
            having.setdefault(line, []).append(number)
    return [
        line if len(numbers) == len(labels) else f"{some([labels[number] for number in numbers], 3)}: {line}"
        for line, numbers in having.items()
    ]
