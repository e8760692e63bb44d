"""The reference in docs/recipes.md lists every method and every parameter as the code declares them."""

from pathlib import Path

import pytest

from merge_engine.methods import METHODS
from merge_engine.recipe import Parameter, Recipe, Scalar

DOCS = Path(__file__).parents[1] / "docs"
PARAMETERS = {(p.name, p.scope, p.allowed): p for m in METHODS.values() for p in m.parameters}


def shown(value: Scalar | None) -> str:
    """A default as a recipe would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value or "none")


def method_row(name: str) -> str:
    """A method's row: parameters in the order of the code, each with its default."""
    cells = (
        f"**{p.name}**" if p.required else f"{p.name}: {shown(p.default)}" for p in METHODS[name].parameters
    )
    return f"| `{name}` | {', '.join(cells)} |"


def parameter_row(parameter: Parameter) -> str:
    """How a parameter's row begins."""
    return f"| `{parameter.name}` | {parameter.scope} | {parameter.allowed} |"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return (DOCS / "recipes.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", METHODS)
def test_method_is_documented(name: str, lines: list[str]) -> None:
    assert method_row(name) in lines


@pytest.mark.parametrize("parameter", PARAMETERS.values(), ids=lambda p: p.name)
def test_parameter_is_documented(parameter: Parameter, lines: list[str]) -> None:
    assert any(line.startswith(parameter_row(parameter)) for line in lines), parameter_row(parameter)


@pytest.mark.parametrize("key", Recipe.model_fields)
def test_key_is_documented(key: str, lines: list[str]) -> None:
    assert any(line.startswith(f"| `{key}` |") for line in lines)


def test_nothing_is_documented_that_is_not_there(lines: list[str]) -> None:
    rows = {line.split("`")[1] for line in lines if line.startswith("| `")}
    known = {p.name for p in PARAMETERS.values()} | set(METHODS) | set(Recipe.model_fields)
    assert rows <= known
