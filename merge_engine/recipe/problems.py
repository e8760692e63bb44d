"""The wording of problems in recipes: one short line each, with the key's path, the value and a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from pydantic import ValidationError

from merge_engine.text import counted, did_you_mean, shown, some

Place: TypeAlias = tuple[int | str, ...]

_MOST_LINES = 20

_WORDING = {
    "bool_type": "must be true or false",
    "dict_type": "must be a map of names to values",
    "int_type": "must be a whole number",
    "invalid_key": "keys must be text",
    "model_type": "must be a map of keys to values",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be 32 hexadecimal digits",  # only digests have a pattern
    "string_type": "must be text",
    "string_unicode": "must be text of whole characters",
    "tuple_type": "must be a list",
}


class InvalidValue(ValueError):
    """One value of the recipe is wrong in one or more places.

    ``problems`` holds pairs: the place in the value (such as ``[1].filter``, or "" for the value itself) and the
    message.
    """

    def __init__(self, *problems: tuple[str, str]) -> None:
        self.problems = problems
        super().__init__("; ".join(message for _, message in problems))


def first(lines: Sequence[str], more: int = 0) -> list[str]:
    """The first lines of many, and one with the number of the others and of ``more`` problems without a line."""
    rest = max(len(lines) - _MOST_LINES, 0) + more
    return [*lines[:_MOST_LINES], counted(rest, "more problem")] if rest else list(lines)


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean "..."?`` with the known name nearest to a misspelt one, else all of them."""
    names = sorted(known)
    return did_you_mean(name, names) or (f"; known here: {', '.join(names)}" if names else "")


def unknown_key(path: str, key: str, known: Iterable[str]) -> str:
    """The line for a key that does not exist, with the nearest known key."""
    if key == "lora":
        return f'unknown key {shown(path)}; write the LoRA with the model, as "model: path+lora"'
    return f"unknown key {shown(path)}{suggestion(key, known)}"


def describe(
    error: ValidationError, known_keys: Callable[[Place], Iterable[str]] = lambda place: ()
) -> list[str]:
    """A line for each of the first problems of a pydantic error, and one with the number of the others.

    ``known_keys`` gives the known keys of the map that holds a place.
    """
    details = error.errors(include_url=False)
    lines: list[str] = []
    strange: dict[Place, list[str]] = {}  # unknown keys that resemble no known one, by their map
    for detail in details[:_MOST_LINES]:
        kind, place, value = detail["type"], detail["loc"], detail["input"]
        path = dotted(place)
        if kind == "value_error":
            cause = detail["ctx"]["error"]
            problems = cause.problems if isinstance(cause, InvalidValue) else [("", str(cause))]
            lines += [_line(path, below, message) for below, message in problems]
        elif kind == "extra_forbidden":
            key, known = str(place[-1]), known_keys(place)
            if key == "lora" or did_you_mean(key, known):
                lines.append(unknown_key(path, key, known))
            else:
                strange.setdefault(place[:-1], []).append(shown(path))
        elif kind == "missing":
            lines.append(f"{path}: missing, but required")
        elif kind == "too_long":
            lines.append(
                f"{path}: must have at most {detail['ctx']['max_length']} entries, not {len(value):,}"
            )
        elif kind == "too_short":
            # Pydantic does not count entries with problems, which have lines of their own: report only an empty list.
            if not value:
                lines.append(f"{path}: must name at least one model")
        else:
            wording = _WORDING.get(kind, detail["msg"].replace("Input should", "must").replace("'", '"'))
            lines.append(f"{path}: {wording}, not {shown(value)}" if path else f"the recipe {wording}")
    for above, keys in strange.items():
        known = ", ".join(sorted(known_keys((*above, ""))))
        lines.append(f"unknown key{'s' if len(keys) > 1 else ''} {some(keys)}; known here: {known}")
    return first(lines, more=max(len(details) - _MOST_LINES, 0))


def _line(path: str, below: str, message: str) -> str:
    """The line for a problem at ``below`` a path; one of the whole recipe has neither."""
    place = f"{path}{below}" if path else below.lstrip(".")
    return f"{place}: {message}" if place else f"the recipe {message}"


def dotted(place: Place) -> str:
    """The place as a path: ``models[0].parameters``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place if step != "[key]")
    return "".join(steps).lstrip(".")
