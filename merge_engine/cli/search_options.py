"""The texts of ``merge-engine search`` that stand for a space, a function and directions."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from merge_engine.errors import OptionError, RecipeError
from merge_engine.recipe.changes import parse_change
from merge_engine.text import did_you_mean, shown

_RANGE = re.compile(r"(?P<low>[^,:]+?)\.\.(?P<high>[^,:]+?)(:(?P<how>[^,:]+))?")
_MISSPELT_RANGE = re.compile(r"\d\.\.|\.\.\d")
_RANGES = "; write a range as 0.1..0.9, 0..4:0.5 or 0.1..10:log"


def space_of(texts: list[str]) -> dict[str, object]:
    """The space from options: ``NAME=LOW..HIGH``, with ``:STEP`` or ``:log`` behind it, or ``NAME=VALUE,VALUE``.

    Raises ``OptionError`` with all texts that are neither.
    """
    space: dict[str, object] = {}
    problems: list[str] = []
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip()
        if name in space:
            problems.append(f"--space: {name} is there twice; give all its values at once")
        try:
            found = _RANGE.fullmatch(values.strip())
            if found:
                space[name] = _range_of(**found.groupdict())
            elif _MISSPELT_RANGE.search(values):
                raise ValueError(f"{name}: {shown(values)} is no range{_RANGES}")
            else:
                name, choices = parse_change(text)
                space[name] = choices if len(choices) > 1 else choices[0]
        except (RecipeError, ValueError) as error:
            problems.append(f"--space: {error}")
    if problems:
        raise OptionError(problems)
    return space


def _range_of(low: str, high: str, how: str | None) -> dict[str, object]:
    ends: dict[str, object] = {"low": _number(low), "high": _number(high)}
    if how == "log":
        return ends | {"log": True}
    return ends if how is None else ends | {"step": _number(how)}


def _number(text: str) -> float:
    """Raises ``ValueError`` for no number."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is no number{_RANGES}") from None


def function_named(name: str) -> Callable[[Any], Any]:
    """The function ``MODULE:FUNCTION``; modules in the current folder come first. Raises ``OptionError``."""
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise OptionError(f"--evaluate: must be MODULE:FUNCTION, such as scorer:evaluate, not {shown(name)}")
    if "/" in module or module.startswith(".") or module.endswith(".py"):
        way_out = f"write {Path(module).stem}:{function}, and run the command in its folder"
        raise OptionError(f"--evaluate: {shown(module)} is a file, not the name of a module; {way_out}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does when it is loaded
        said = f"{type(error).__name__}: {error}"
        raise OptionError(f"--evaluate: the module {shown(module)} cannot be loaded: {said}") from error
    found = getattr(loaded, function, None)
    if not callable(found):
        known = [each for each, value in vars(loaded).items() if callable(value) and not each.startswith("_")]
        near = did_you_mean(function, known)
        raise OptionError(f"--evaluate: the module {shown(module)} has no function {shown(function)}{near}")
    return cast("Callable[[Any], Any]", found)


def directions_of(given: list[str] | None) -> str | dict[str, str] | None:
    """Raises ``OptionError`` for several directions of which one has no name, or two the same."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [text.partition("=") for text in given]
    if unnamed := [name for name, equals, _ in pairs if not equals]:
        raise OptionError(f"--direction: with several objectives each needs a name: NAME={unnamed[0]}")
    names = [name for name, _, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise OptionError(f"--direction: {twice[0]} is there twice; give each objective a name of its own")
    return {name: direction for name, _, direction in pairs}
