"""What a merge method declares of each of its parameters: kind, range, default and scope."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from merge_engine.recipe.problems import shown
from merge_engine.recipe.settings import Scalar

_SWITCHES = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method.

    ``scope``: "model" has a value for each model and tensor, "tensor" one for each output tensor.
    ``required``: there must be a setting for it; else ``default`` stands in, which may be None (not set).
    ``minimum`` and ``maximum`` are allowed values themselves unless marked exclusive; NaN and infinity
    never are. ``choices``: the allowed texts; none given allows any. ``constant``: one value for the
    whole merge, so neither gradient nor filter.
    """

    name: str
    kind: type[bool] | type[int] | type[float] | type[str]
    scope: Literal["model", "tensor"]
    default: Scalar | None = None
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False
    choices: tuple[str, ...] = ()
    constant: bool = False

    @property
    def allowed(self) -> str:
        """The allowed values in words, such as ``a number with 0 <= density <= 1``."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"one of {', '.join(self.choices)}" if self.choices else "text"
        words = "a whole number" if self.kind is int else "a number"
        if self.minimum is None and self.maximum is None:
            return words
        lower = "" if self.minimum is None else f"{self.minimum:g} {'<' if self.exclusive_minimum else '<='} "
        upper = "" if self.maximum is None else f" {'<' if self.exclusive_maximum else '<='} {self.maximum:g}"
        return f"{words} with {lower}{self.name}{upper}"

    def read(self, raw: Scalar) -> Scalar:
        """The value of a recipe's scalar as this parameter's kind.

        Numbers may be given as text, for YAML reads ``1e-3`` as text, but true and false are not numbers.
        Switches may be given as 0 and 1. Where
        ``choices`` are texts, YAML's true and false read as "true" and "false". Raises ``ValueError``.
        """
        value = self._convert(raw)
        if value is None or not self._in_range(value):
            raise ValueError(f"must be {self.allowed}, not {shown(raw)}")
        return value

    def _convert(self, raw: Scalar) -> Scalar | None:
        if self.kind is bool:
            return _SWITCHES.get(str(raw).lower())
        if self.kind is str:
            if isinstance(raw, bool):
                return "true" if raw else "false"
            return raw if isinstance(raw, str) else None
        if isinstance(raw, bool):
            return None
        return _number(raw) if self.kind is float else _whole_number(raw)

    def _in_range(self, value: Scalar) -> bool:
        if isinstance(value, str):
            return not self.choices or value in self.choices
        if self.minimum is not None and (
            value < self.minimum or (self.exclusive_minimum and value == self.minimum)
        ):
            return False
        return self.maximum is None or (
            value < self.maximum or (not self.exclusive_maximum and value == self.maximum)
        )


def _number(raw: float | str) -> float | None:
    try:
        value = float(raw)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _whole_number(raw: float | str) -> int | None:
    if isinstance(raw, int):
        return raw
    if isinstance(raw, str):
        try:
            return int(raw)
        except ValueError:
            return None
    return int(raw) if raw.is_integer() else None
