"""The space of a search: for each name the values that may be proposed. Only the form is checked here.

A name is that of a change of a recipe (see ``recipe/changes.py``). What is allowed for it:

- a pair ``(low, high)``: all numbers between them, both included;
- a map ``{"low": ..., "high": ..., "log": True}``, or with ``"step"`` in place of ``"log"``: the same on a logarithmic
  scale, or in steps;
- a list of numbers, texts and switches: one of them;
- a single value: fixed in all trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

from merge_engine.recipe import Scalar
from merge_engine.recipe.problems import suggestion
from merge_engine.text import shown

_KEYS = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included; with a ``step`` only ``low``, ``low + step`` and so on.

    ``log``: proposals are spread evenly over their logarithms.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __contains__(self, value: object) -> bool:
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not self.low <= value <= self.high
        ):
            return False
        return self.step is None or _steps(self.low, float(value), self.step) is not None

    def nearest(self, value: Scalar) -> Scalar:
        """The number of the range that is meant: 0.6 where adding up steps of 0.1 gives 0.6000000000000001."""
        if self.step is None or isinstance(value, int):
            return value
        step, low = Decimal(str(self.step)), Decimal(str(self.low))
        return float(low + round((Decimal(str(value)) - low) / step) * step)

    @property
    def tried(self) -> tuple[Scalar, ...]:
        """Values that are allowed only if all others are."""
        return self.low, self.high

    @property
    def plain(self) -> object:
        """The range as JSON has it."""
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


@dataclass(frozen=True)
class Choices:
    """One of these values."""

    values: tuple[Scalar, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def nearest(self, value: Scalar) -> Scalar:
        """The value itself."""
        return value

    @property
    def tried(self) -> tuple[Scalar, ...]:
        """Values that are allowed only if all others are: all of them."""
        return self.values

    @property
    def plain(self) -> object:
        """The choices as JSON has them."""
        return list(self.values)


Domain: TypeAlias = Range | Choices


@dataclass(frozen=True)
class Space:
    """The names that a search varies, with their values, and those that it fixes."""

    varied: Mapping[str, Domain]
    fixed: Mapping[str, Scalar]

    @property
    def tried(self) -> Iterator[tuple[str, tuple[Scalar, ...]]]:
        """For each name, values that are allowed only if all others are."""
        yield from ((name, domain.tried) for name, domain in self.varied.items())
        yield from ((name, (value,)) for name, value in self.fixed.items())

    @property
    def plain(self) -> dict[str, object]:
        """The space as JSON has it, in the order of names."""
        both = {name: domain.plain for name, domain in self.varied.items()} | dict(self.fixed)
        return {name: both[name] for name in sorted(both)}


def read_space(raw: object, problems: list[str]) -> Space:
    """The space from what a caller gives; see the module's text. ``problems`` gets a line for each that has none."""
    if not isinstance(raw, Mapping):
        problems.append(f"space: must be a map of names to values, not {shown(raw)}")
        raw = {}
    varied: dict[str, Domain] = {}
    fixed: dict[str, Scalar] = {}
    before = len(problems)
    for name, given in raw.items():
        if not isinstance(name, str):
            problems.append(f"space: names must be text, not {shown(name)}")
            continue
        try:
            read = _read(given)
        except ValueError as error:
            problems.append(f"space: {name}: {error}")
            continue
        if isinstance(read, Range | Choices):
            varied[name] = read
        else:
            fixed[name] = read
    if not varied and len(problems) == before and isinstance(raw, Mapping):
        problems.append("space: varies nothing; give a name a range (low, high) or a list of choices")
    return Space(varied, fixed)


def _read(given: object) -> Domain | Scalar:
    """Raises ``ValueError`` that says what is wrong."""
    if isinstance(given, tuple):
        if len(given) != 2:
            raise ValueError(f"a range is a pair (low, high), not {shown(given)}; choices are a list")
        return _range({"low": given[0], "high": given[1]})
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in _KEYS]
        if unknown:
            raise ValueError(f"unknown key {shown(unknown[0])}{suggestion(str(unknown[0]), _KEYS)}")
        if "low" not in given or "high" not in given:
            raise ValueError('a range needs both "low" and "high"')
        return _range(given)
    if isinstance(given, list):
        return _choices(given)
    return _scalar(given)


def _range(given: Mapping[str, Any]) -> Domain | Scalar:
    low, high = _number(given["low"], "low"), _number(given["high"], "high")
    log, step = given.get("log", False), given.get("step")
    if low > high:
        raise ValueError(f"the range is empty: {shown(low)} is larger than {shown(high)}; swap them")
    if not isinstance(log, bool):
        raise ValueError(f"log must be True or False, not {shown(log)}")
    if log and low <= 0:
        raise ValueError(f"a range with log must begin above 0, not at {shown(low)}")
    if step is not None:
        step = _number(step, "step")
        if log:
            raise ValueError("takes a step or log, not both")
        if step <= 0:
            raise ValueError(f"step must be larger than 0, not {shown(step)}")
        if _steps(low, high, step) is None:
            raise ValueError(f"steps of {shown(step)} do not lead from {shown(low)} to {shown(high)}")
    return low if low == high else Range(low, high, log, step)


def _choices(given: list[object]) -> Domain | Scalar:
    if not given:
        raise ValueError("has no choices; give some, or leave the name out")
    values = tuple(_scalar(each) for each in given)
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"the choice {shown(value)} is there twice; remove one")
    return values[0] if len(values) == 1 else Choices(values)


def _scalar(given: object) -> Scalar:
    if isinstance(given, bool | str):
        return given
    if isinstance(given, Real):
        return _number(given, "a value")
    raise ValueError(f"must be a range, a list of choices, or a number, text or switch, not {shown(given)}")


def _number(given: object, what: str) -> float:
    """A finite number, whole ones as ``int``."""
    if not isinstance(given, Real) or isinstance(given, bool):
        raise ValueError(f"{what} must be a number, not {shown(given)}")
    if not math.isfinite(given):
        raise ValueError(f"{what} must be finite, not {given}")
    return int(given) if isinstance(given, int) else float(given)


def _steps(low: float, high: float, step: float) -> int | None:
    """The number of steps from ``low`` to ``high``; None if they do not lead there. Decimals count as written."""
    steps = (Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step))
    return int(steps) if steps == steps.to_integral_value() else None
