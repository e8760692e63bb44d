"""The wording of problems in recipes: one short line each, with the key's path, the value and a way out."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable

from pydantic import ValidationError

from merge_engine.text import did_you_mean

NOT_YET = frozenset(
    {
        "chat_template",
        "layer_range",
        "lora",
        "modules",
        "override_architecture",
        "slices",
        "tokenizer",
        "tokenizer_source",
    }
)
"""Keys of mergekit that are not supported yet."""

_LONGEST_TEXT = 80

_WORDING = {
    "bool_type": "must be true or false",
    "dict_type": "must be a map of names to values",
    "int_type": "must be a whole number",
    "invalid_key": "keys must be text",
    "model_type": "must be a map of keys to values",
    "string_type": "must be text",
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


def shown(value: object) -> str:
    """The value as text for a message: short, on one line, text in double quotes."""
    if isinstance(value, str):
        short = value if len(value) <= _LONGEST_TEXT else value[:_LONGEST_TEXT] + "..."
        return json.dumps(short, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return reprlib.repr(value)


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean "..."?`` with the known name nearest to a misspelt one, else all of them."""
    names = sorted(known)
    return did_you_mean(name, names) or (f"; known here: {', '.join(names)}" if names else "")


def unknown_key(path: str, key: str, known: Iterable[str]) -> str:
    """The line for a key that does not exist: not supported yet, or unknown with the nearest known key."""
    if key in NOT_YET:
        return f"{shown(path)} is not supported yet"
    return f"unknown key {shown(path)}{suggestion(key, known)}"


def describe(error: ValidationError, known_keys: dict[int, Iterable[str]]) -> list[str]:
    """One line for each problem of a pydantic error. ``known_keys``: the known keys by the length of their path."""
    details = error.errors(include_url=False)
    unsupported = {detail["loc"][-1] for detail in details if detail["type"] == "extra_forbidden"} & NOT_YET
    lines = []
    for detail in details:
        kind, place, value = detail["type"], detail["loc"], detail["input"]
        path = _dotted(place)
        if kind == "value_error":
            cause = detail["ctx"]["error"]
            problems = cause.problems if isinstance(cause, InvalidValue) else [("", str(cause))]
            lines += [f"{path}{below}: {message}" for below, message in problems]
        elif kind == "extra_forbidden":
            lines.append(unknown_key(path, str(place[-1]), known_keys[len(place)]))
        elif kind == "missing":
            # A recipe of slices has no models, and another line already reports the slices.
            if place != ("models",) or not unsupported & {"slices", "modules"}:
                lines.append(f"{path}: missing, but required")
        elif kind == "too_short":
            # Pydantic does not count entries with problems, which have lines of their own: report only an empty list.
            if not value:
                lines.append(f"{path}: must name at least one model")
        else:
            wording = _WORDING.get(kind, detail["msg"].replace("Input should", "must").replace("'", '"'))
            lines.append(f"{path}: {wording}, not {shown(value)}" if path else f"the recipe {wording}")
    return lines


def _dotted(place: tuple[int | str, ...]) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place if step != "[key]")
    return "".join(steps).lstrip(".")
