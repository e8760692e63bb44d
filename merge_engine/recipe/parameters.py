"""The parameters of a merge method: kind, range, default and scope.

A method declares them as the fields of two dataclasses: one for the parameters of each model, and one for the
parameters of all models together. Type and default are those of the field; ``parameter`` adds the rest.
"""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from merge_engine.recipe.settings import Scalar
from merge_engine.text import shown

_SWITCHES = dict.fromkeys(("true", "yes", "on", "1", "1.0"), True) | dict.fromkeys(
    ("false", "no", "off", "0", "0.0"), False
)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method.

    ``scope``: "model" has a value for each model and tensor, "tensor" one for each output tensor. ``required``: a
    recipe must set it; otherwise ``default`` is used, which may be None (not set). ``minimum`` and ``maximum`` are
    allowed values themselves unless marked exclusive; NaN and infinity never are. ``choices``: the allowed texts;
    an empty tuple allows any. ``constant``: one value for the whole merge, so neither gradient nor filter.
    ``attribute``: the dataclass field of the value.
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
    attribute: str = ""

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

        Numbers may be text, because YAML reads ``1e-3`` as text, but true and false are not numbers. Switches may
        be 0 and 1. For ``choices`` of texts, these are "true" and "false". Raises ``ValueError``
        for a value of the wrong kind or out of range.
        """
        value = self._convert(raw)
        if value is None or not self._in_range(value):
            raise ValueError(f"must be {self.allowed}, not {shown(raw)}")
        return value

    def _convert(self, raw: Scalar) -> Scalar | None:
        if self.kind is bool:
            return _switch(raw)
        if self.kind is str:
            switch = None if isinstance(raw, str) else _switch(raw)
            if switch is not None and (isinstance(raw, bool) or "true" in self.choices):
                return "true" if switch else "false"
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


def parameter(
    default: Any = MISSING,
    *,
    name: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: bool = False,
    exclusive_maximum: bool = False,
    constant: bool = False,
) -> Any:
    """A dataclass field that a recipe may set. Without a default a recipe must set it.

    ``name`` is the key in recipes if it cannot be the field's name (``lambda`` is a keyword of Python). For the
    rest see ``Parameter``.
    """
    options = {
        "minimum": minimum,
        "maximum": maximum,
        "exclusive_minimum": exclusive_minimum,
        "exclusive_maximum": exclusive_maximum,
        "constant": constant,
    }
    return field(default=default, kw_only=True, metadata={"name": name, "options": options})


def declared(fields_of: type, scope: Literal["model", "tensor"]) -> tuple[Parameter, ...]:
    """The parameters that a dataclass declares, in the order of its fields.

    A field is a bool, int, float or str, or a ``Literal`` of texts, which are its choices; ``| None`` allows "not
    set" as the default. Raises ``TypeError`` for any other type.
    """
    hints = get_type_hints(fields_of)
    result = []
    for each in fields(fields_of):
        kind, choices = _kind_of(hints[each.name], f"{fields_of.__name__}.{each.name}")
        default: Any = each.default
        result.append(
            Parameter(
                each.metadata.get("name") or each.name,
                kind,
                scope,
                None if default is MISSING else default,
                default is MISSING,
                choices=choices,
                attribute=each.name,
                **each.metadata.get("options", {}),
            )
        )
    return tuple(result)


def _kind_of(hint: Any, place: str) -> tuple[Any, tuple[str, ...]]:
    """The kind of a field, and its choices. Raises ``TypeError`` for a type that no parameter has."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is Literal and all(isinstance(choice, str) for choice in get_args(hint)):
        return str, get_args(hint)
    if hint in (bool, int, float, str):
        return hint, ()
    raise TypeError(f"{place}: a parameter is a bool, int, float, str or a Literal of texts, not {hint}")


def _switch(raw: Scalar) -> bool | None:
    """True or false. Numbers are 1 or 0: tools that search for the best recipe write every value as a number."""
    if isinstance(raw, str):
        return _SWITCHES.get(raw.lower())
    return bool(raw) if raw in (0, 1) else None


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
