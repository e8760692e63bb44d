"""The result of the matrix as a table, and in one line for each precision."""

from __future__ import annotations

from collections.abc import Sequence

from matrix.running import NEAR, PRECISIONS, Row


def _cells(row: Row) -> list[str]:
    if row.outcome != "yes":
        return [row.shape.title, row.precision, row.outcome, "", "", "", row.loads]
    weights, by_default = str(row.as_mergekit), str(row.default)
    if row.errors is not None:
        by_default += (
            f"; not as mergekit in float64: ours {row.errors[0]:.3%}, mergekit's {row.errors[1]:.3%}"
        )
    if row.shape.expect == "draws":
        kept, norms = row.as_mergekit.kept, row.as_mergekit.norms
        weights = f"other draws: kept {kept[0]:.3f} and {kept[1]:.3f}, L1 ratio {norms[0] / norms[1]:.3f}"
        by_default = ""
    if row.shape.why:
        by_default += f" ({row.shape.why})"
    beside = "; ".join(row.beside) or "="
    return [row.shape.title, row.precision, "yes", weights, by_default, beside, row.loads]


def print_table(rows: Sequence[Row]) -> None:
    """The table, in Markdown."""
    heads = (
        "recipe shape",
        "type",
        "ours",
        "weights with `arithmetic: mergekit`",
        "weights by default",
        "config, tokenizer, template, files",
        "loads",
    )
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "/")[:200] for cell in _cells(row)) + " |")


def summary(rows: Sequence[Row]) -> str:
    """One line of figures for each precision."""
    lines = []
    for precision in PRECISIONS:
        own = [row for row in rows if row.precision == precision]
        if not own:
            continue
        both = [row for row in own if row.shape.expect != "alone"]
        good = [row for row in both if not row.wrong]
        bits, near, draws = (
            sum(row.shape.expect == kind for row in good) for kind in ("bits", "near", "draws")
        )
        alone = sum(not row.wrong for row in own if row.shape.expect == "alone")
        lines.append(
            f"{precision}: {len(good)} of the {len(both)} shapes that mergekit merges are as expected: "
            f"{bits} the same bits, {near} within {NEAR:.0f} units of the last place or no farther from "
            f"mergekit in float64 than it is, {draws} other draws of the same kind; "
            f"{alone} of {len(own) - len(both)} that mergekit fails at are merged and load"
        )
    return "\n".join(lines)
