"""The tables of docs/low_resource.md, made from ``results.json``. No number there is typed by hand.

python -m examples.low_resource.tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.low_resource.errors import ExampleError, told
from examples.low_resource.measure import CT_THEN_SFT, VARIANTS
from examples.low_resource.settings import CT_SNAPSHOTS, HERE, ct_tokens
from examples.low_resource.summary import BPB, ENGLISH, LOST, MEASURES, TAMIL, Rows, difference, spread

PAGE = HERE.parents[1] / "docs" / "low_resource.md"
RESULTS = HERE / "results.json"
LAST = CT_SNAPSHOTS[-1]
NAMES = {BPB: "Tamil bits per byte"} | {measure: measure.capitalize() for measure in (*TAMIL, *ENGLISH)}

COMPARISONS: tuple[tuple[str, tuple[str, int | None], tuple[str, int | None]], ...] = (
    ("TIES: last budget minus 100 steps", ("ties", LAST), ("ties", 100)),
    ("elect 4: last budget minus 100 steps", ("ties elect 4", LAST), ("ties elect 4", 100)),
    ("elect 4 minus TIES, 400 steps", ("ties elect 4", 400), ("ties", 400)),
    ("elect 4 minus TIES", ("ties elect 4", LAST), ("ties", LAST)),
    ("retain 0.6 minus TIES", ("ties retain 0.6", LAST), ("ties", LAST)),
    ("trim 0.5 minus TIES", ("ties trim 0.5", LAST), ("ties", LAST)),
    ("elect 4 minus task arithmetic", ("ties elect 4", LAST), ("task arithmetic", LAST)),
    ("upweighted sum minus elect 4", ("upweighted sum", LAST), ("ties elect 4", LAST)),
    ("TIES minus SFT", ("ties", LAST), ("SFT", None)),
    ("elect 4 minus SFT, 200 steps", ("ties elect 4", 200), ("SFT", None)),
    ("elect 4 minus SFT", ("ties elect 4", LAST), ("SFT", None)),
    ("elect 4 minus CT", ("ties elect 4", LAST), ("CT", LAST)),
    ("CT then SFT minus elect 4", (CT_THEN_SFT, LAST), ("ties elect 4", LAST)),
    ("CT then SFT minus upweighted sum", (CT_THEN_SFT, LAST), ("upweighted sum", LAST)),
)


def load_results() -> dict[str, Any]:
    """The results of the study."""
    try:
        content: dict[str, Any] = json.loads(RESULTS.read_text())
    except FileNotFoundError:
        raise ExampleError(
            f"{RESULTS}: not there; restore it with `git checkout`, or run "
            "`python -m examples.low_resource.study`"
        ) from None
    return content


def rows_by_seed() -> list[Rows]:
    """The rows of each seed."""
    return list(load_results()["seeds"].values())


def lost_table(seeds: Sequence[Rows]) -> str:
    """Share of SFT's kept entries that the election discards, by CT budget."""
    head = [
        "SFT's kept entries lost",
        *(f"{ct_tokens(steps) / 1e3:,.0f}k CT tokens" for steps in CT_SNAPSHOTS),
    ]
    methods = [variant.label for variant in VARIANTS if variant.recipe.startswith("ties")]
    rows = [[method, *(_spread(seeds, method, steps, LOST) for steps in CT_SNAPSHOTS)] for method in methods]
    return markdown(head, rows)


def score_table(seeds: Sequence[Rows]) -> str:
    """What every model can do, with the longest CT."""
    methods: list[tuple[str, int | None]] = [("base", None), ("SFT", None), ("CT", LAST)]
    methods += [(variant.label, LAST) for variant in VARIANTS]
    methods.append((CT_THEN_SFT, LAST))
    rows = [[name, *(_spread(seeds, name, steps, m) for m in MEASURES)] for name, steps in methods]
    return markdown(["model", *(NAMES[measure] for measure in MEASURES)], rows)


def difference_table(seeds: Sequence[Rows]) -> str:
    """Differences within a seed."""
    rows = []
    for label, one, other in COMPARISONS:
        cells = []
        for measure in MEASURES:
            found = difference(seeds, one, other, measure)
            cells.append(f"{found.mean:+.3f} (t {found.t:+.1f}; {found.above}/{found.seeds})")
        rows.append([label, *cells])
    return markdown(["difference", *(NAMES[measure] for measure in MEASURES)], rows)


TABLES = {"lost": lost_table, "scores": score_table, "differences": difference_table}


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with these tables, each between its two comments."""
    for name, table in tables.items():
        start, end = f"<!-- table {name} -->\n", "\n<!-- end -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = f"{before}{start}\n{table}{end}{after}"
    return page


def made() -> dict[str, str]:
    """The tables of the study by name."""
    seeds = rows_by_seed()
    return {name: make(seeds) for name, make in TABLES.items()}


def write_tables() -> Path:
    """Fill the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), made()), encoding="utf-8")
    return PAGE


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""

    def lines() -> Iterator[str]:
        yield "| " + " | ".join(head) + " |"
        yield "| --- |" + " ---: |" * (len(head) - 1)
        for row in rows:
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines()) + "\n"


def _spread(seeds: Sequence[Rows], method: str, steps: int | None, measure: str) -> str:
    found = spread(seeds, method, steps, measure)
    return f"{found.mean:.3f} ({found.sd:.3f})"


if __name__ == "__main__":
    told(lambda: print(f"tables in {write_tables()}"))
