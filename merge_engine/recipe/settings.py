"""The forms that a parameter's setting may have in a recipe, in mergekit's format.

- a scalar: the value for every tensor;
- a list of scalars: a gradient over the layers (see ``gradients``);
- a map ``{filter: TEXT, value: SCALAR OR GRADIENT}``: for tensors whose name contains TEXT exactly;
  no filter, or ``"*"``, is for all;
- a list of such maps: the first that matches wins.

Only the form is checked here. ``parameters`` checks kinds and ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias, cast

from merge_engine.recipe.problems import InvalidValue, unknown_key
from merge_engine.text import shown

Scalar: TypeAlias = bool | int | float | str
ParameterSetting: TypeAlias = Scalar | list[Scalar] | dict[str, Any] | list[dict[str, Any]]

_EVERY_TENSOR = ("", "*")
_KINDS: tuple[tuple[type, Callable[[Any], Scalar]], ...] = (
    (bool, bool),
    (str, str),
    (Integral, int),
    (Real, float),
)


@dataclass(frozen=True)
class Rule:
    """One value, or the values of a gradient, and a filter for tensors.

    ``path``: the place in the recipe. ``filter``: part of the tensor's name; None matches all.
    """

    path: str
    filter: str | None
    values: tuple[Scalar, ...]


def read_setting(raw: object) -> ParameterSetting:
    """A plain copy of a setting. Raises ``InvalidValue`` with every place where its form is wrong."""
    problems: list[tuple[str, str]] = []
    setting = _read(raw, problems)
    if problems:
        raise InvalidValue(*problems)
    return cast(ParameterSetting, setting)


def rules(setting: ParameterSetting, path: str) -> list[Rule]:
    """The rules of a setting from ``read_setting``, in order. ``path``: its place in the recipe."""
    if isinstance(setting, dict):
        return [_rule(setting, path)]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        return [_rule(entry, f"{path}[{i}]") for i, entry in enumerate(setting) if isinstance(entry, dict)]
    return [Rule(path, None, _as_tuple(setting))]


def _rule(entry: dict[str, Any], path: str) -> Rule:
    name_part = entry.get("filter")
    every = name_part is None or name_part in _EVERY_TENSOR
    return Rule(f"{path}.value", None if every else name_part, _as_tuple(entry["value"]))


def _as_tuple(values: Any) -> tuple[Scalar, ...]:
    return tuple(values) if isinstance(values, list) else (values,)


def _read(raw: object, problems: list[tuple[str, str]]) -> object:
    if isinstance(raw, Mapping):
        return _read_filtered(raw, "", problems)
    if isinstance(raw, list | tuple) and any(isinstance(entry, Mapping) for entry in raw):
        if not all(isinstance(entry, Mapping) for entry in raw):
            problems.append(
                ("", "mixes maps with plain values; write each entry as {filter: ..., value: ...}")
            )
            return None
        return [_read_filtered(entry, f"[{i}]", problems) for i, entry in enumerate(raw)]
    return _read_values(raw, "", problems)


def _read_filtered(raw: Mapping[Any, Any], path: str, problems: list[tuple[str, str]]) -> object:
    known = ("filter", "value")
    entry: dict[str, object] = {}
    for key, given in raw.items():
        if key == "value":
            entry[key] = _read_values(given, f"{path}.value", problems)
        elif key == "filter":
            if given is not None and not isinstance(given, str):
                problems.append((f"{path}.filter", f"must be text, not {shown(given)}; put it in quotes"))
            entry[key] = given
        else:
            problems.append((path, unknown_key(str(key), str(key), known)))
    if "value" not in raw:
        problems.append((path, 'a map needs the key "value"'))
    return entry


def _read_values(raw: object, path: str, problems: list[tuple[str, str]]) -> object:
    if isinstance(raw, list | tuple):
        if not raw:
            problems.append((path, "is an empty list; give one value or leave the key out"))
        return [_read_scalar(value, f"{path}[{i}]", problems) for i, value in enumerate(raw)]
    return _read_scalar(raw, path, problems)


def _read_scalar(raw: object, path: str, problems: list[tuple[str, str]]) -> object:
    # Numbers of other libraries, such as numpy's, become plain, so that the recipe can be written as YAML.
    for kind, plain in _KINDS:
        if isinstance(raw, kind):
            return plain(raw)
    problems.append((path, f"must be a number, true, false or text, not {shown(raw)}"))
    return None
