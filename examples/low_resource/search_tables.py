"""The tables of the search in docs/low_resource.md, made from ``search.json``. No number there is typed by hand.

python -m examples.low_resource.search_tables
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.low_resource.comparing import RIVALS
from examples.low_resource.errors import ExampleError, told
from examples.low_resource.halves import BITS, ENGLISH, TAMIL
from examples.low_resource.settings import HERE, SEARCH_SPACES
from examples.low_resource.tables import PAGE, filled, markdown

RESULTS = HERE / "search.json"
NAMES = {
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "ties_elect": "TIES, elect",
    "ties_retain": "TIES, retain",
    "ties_trim": "TIES, trim",
}
Results = Mapping[str, Any]
"""The content of ``search.json``."""


def load_search() -> Results:
    """The results of the search."""
    try:
        content: Results = json.loads(RESULTS.read_text())
    except FileNotFoundError:
        raise ExampleError(
            f"{RESULTS}: not there; restore it with `git checkout`, or run "
            "`python -m examples.low_resource.search`"
        ) from None
    return content


def area_table(results: Results) -> str:
    """What each method's front dominates on the half that judges."""
    head = [
        "method",
        "values searched",
        "hypervolume",
        *(f"minus {NAMES[rival]}" for rival in RIVALS),
        "by seed",
    ]
    rows = []
    for method, found in results["hypervolume"].items():
        beside = [_signed(found.get(f"minus {rival}")) for rival in RIVALS]
        seeds = ", ".join(f"{value:.3f}" for value in found["of seeds"])
        rows.append([NAMES[method], str(len(SEARCH_SPACES[method])), _number(found["value"]), *beside, seeds])
    return markdown(head, rows)


def budget_table(results: Results) -> str:
    """The English accuracy of what each method chooses within budgets of Tamil."""
    return _by_budget(results, "English accuracy", _english)


def chosen_table(results: Results) -> str:
    """What the same recipes have in Tamil."""
    return _by_budget(
        results, "Tamil bits per byte; accuracy", lambda found: f"{found[BITS][0]:.3f}; {found[TAMIL][0]:.3f}"
    )


def baseline_table(results: Results) -> str:
    """The models that are merged, and the recipes as they are, on the half that judges."""
    measures = (BITS, ENGLISH, TAMIL)
    rows = [
        [NAMES.get(name, name), *(_number(found[measure]) for measure in measures)]
        for name, found in results["baselines"].items()
    ]
    return markdown(["not searched", *measures], rows)


TABLES = {"search": area_table, "budgets": budget_table, "chosen": chosen_table, "baselines": baseline_table}


def write() -> Path:
    """Fill the page."""
    results = load_search()
    text = filled(PAGE.read_text(encoding="utf-8"), {name: make(results) for name, make in TABLES.items()})
    PAGE.write_text(text, encoding="utf-8")
    return PAGE


def _by_budget(results: Results, title: str, cell: Callable[[Mapping[str, Any]], str]) -> str:
    """A column for each budget; nothing where a method has no recipe within it."""
    budgets = results["budgets"]
    head = [title, *(f"at most {each['bits per byte']:.2f}" for each in budgets)]
    rows = [
        [NAMES[method], *(cell(each[method]) if method in each else "" for each in budgets)]
        for method in results["hypervolume"]
    ]
    return markdown(head, rows)


def _english(found: Mapping[str, Any]) -> str:
    beside = found[ENGLISH].get(f"minus {RIVALS[0]}")
    return f"{found[ENGLISH]['value'][0]:.3f}" + (f" ({_signed(beside)})" if beside else "")


def _number(found: Sequence[float]) -> str:
    return f"{found[0]:.3f} ± {found[1]:.3f}"


def _signed(found: Sequence[float] | None) -> str:
    return "" if found is None else f"{found[0]:+.3f} ± {found[1]:.3f}"


if __name__ == "__main__":
    told(lambda: print(f"tables in {write()}"))
