"""The tables of methods and parameters in docs/recipes.md, made from the code.

They are between ``<!-- methods -->`` and ``<!-- /methods -->``, and the same for parameters. The meaning of a
parameter is not in the code: the words on the page are kept, and a new parameter has none at first. Methods may take
the same name for other things, so a name with other values has a row, and words, of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from merge_engine.methods import METHODS, Method
from merge_engine.recipe import Parameter, Scalar

Row: TypeAlias = tuple[str, str, str]
"""The name of a parameter, its scope, and its values."""


def with_tables(page: str) -> str:
    """The page with both tables as they should be. ``pytest tests/test_docs.py --update-snapshots`` writes it."""
    page = _replaced(page, "methods", method_table(METHODS.values()))
    return _replaced(page, "parameters", parameter_table(METHODS.values(), meanings(page)))


def method_table(methods: Iterable[Method]) -> str:
    """A row for each method: its parameters in order, with their defaults, required ones in bold."""
    rows = [(f"`{method.name}`", ", ".join(map(_with_default, method.parameters))) for method in methods]
    return _table(("method", "parameters"), rows)


def parameter_table(methods: Iterable[Method], meaning: Mapping[Row, str]) -> str:
    """A row for each parameter, in the order in which the methods first have them."""
    found = dict.fromkeys(row_of(p) for method in methods for p in method.parameters)
    rows = [(f"`{row[0]}`", *row[1:], meaning.get(row, "")) for row in found]
    return _table(("parameter", "scope", "values", "meaning"), rows)


def row_of(parameter: Parameter) -> Row:
    """What the row of a parameter says before its meaning."""
    return parameter.name, parameter.scope, parameter.allowed


def meanings(page: str) -> dict[Row, str]:
    """The meaning of each row on the page that has one."""
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| (.*) \|$", _between(page, "parameters"), re.MULTILINE
    )
    return {(name, scope, allowed): meaning for name, scope, allowed, meaning in rows if meaning}


def _with_default(parameter: Parameter) -> str:
    return f"**{parameter.name}**" if parameter.required else f"{parameter.name}: {_shown(parameter.default)}"


def _shown(value: Scalar | None) -> str:
    """A default as text in a recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value or "none")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _between(page: str, name: str) -> str:
    """The text between the two comments. Raises ``ValueError`` when one is missing."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    return page[page.index(start) + len(start) : page.index(end)]


def _replaced(page: str, name: str, table: str) -> str:
    return page.replace(_between(page, name), f"\n{table}\n")
