"""Imports run downwards, by the table of docs/architecture.md: also those in functions, and those for types only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "merge_engine"
NATIVE = {"_cuda", "_native", "_native_types", "kernels"}
"""Below everything: code that imports nothing of the package but itself."""


def levels() -> dict[str, int]:
    """The height of each package and of each module that is in none, from the table."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    found = re.search(r"^Imports run downwards\..*?^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    lines = found[1].splitlines()
    return {name: len(lines) - number for number, line in enumerate(lines) for name in line.split()}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What is imported of merge_engine: the line, and the part right below it, empty for merge_engine itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "merge_engine":
                yield node.lineno, rest.partition(".")[0]


def upwards(source: str, place: str, heights: dict[str, int]) -> list[str]:
    """The imports that a module in this package may not make."""
    return [
        f"line {line}: {name or 'merge_engine'}"
        for line, name in imported(ast.parse(source))
        # The package itself gives names of all levels up to ``run``.
        if name not in NATIVE and name != place and heights[place] <= heights.get(name, heights["running"])
    ]


def test_the_table_has_every_package_and_module() -> None:
    there = {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.is_dir() and (path / "__init__.py").exists()) or path.suffix == ".py"
    }
    assert set(levels()) == there - {"__init__", "__main__", "kernels"}


def test_imports_run_downwards() -> None:
    heights, wrong = levels(), []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if place not in {"__init__", "__main__"}:
            found = upwards(file.read_text("utf-8"), place, heights)
            wrong += [f"{file.relative_to(ROOT)}, {line}" for line in found]
    assert wrong == []


def test_kernels_import_nothing_but_kernels() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert {name for _, name in imported(ast.parse(file.read_text("utf-8")))} <= {"kernels"}, file


def test_what_is_wrong_is_found() -> None:
    heights = levels()
    assert upwards("def f():\n    from merge_engine.distributed.running import OnRay", "engine", heights) == [
        "line 2: distributed"
    ]
    assert upwards("from merge_engine import run", "sweeps", heights) == ["line 1: run"]
    assert upwards("import merge_engine", "session", heights) == ["line 1: merge_engine"]
    assert upwards("from merge_engine.session import load", "sweeps", heights) == ["line 1: session"]
    assert upwards("import merge_engine\nfrom merge_engine.engine import run", "cli", heights) == []
