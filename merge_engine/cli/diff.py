"""``merge-engine diff``: what differs between two checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

import merge_engine
from merge_engine.cli import show
from merge_engine.cli.terminal import cell, console, say
from merge_engine.errors import MergeError
from merge_engine.inspect.diff import Difference, TensorDifference
from merge_engine.text import some

_SHOWN = 20

Named = Annotated[str, typer.Argument(help="A folder, a weight file, or a name on the hub.")]


def diff(
    a: Named,
    b: Named,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help=f"Show all that differs, not only {_SHOWN} of each kind.")
    ] = False,
) -> None:
    """Compare two checkpoints. The exit code is 0 if nothing differs, 1 if something does, and 2 after an error."""
    try:
        with show.Progress(console, "reading") as progress:
            found = merge_engine.diff(a, b, on_start=progress.start_bytes, progress=progress.advance)
    except MergeError as error:
        say("error", error.problems)
        raise typer.Exit(2) from None
    if as_json:
        # It escapes all control characters but one.
        typer.echo(json.dumps(found.as_dict(), indent=1).replace("\x7f", "\\u007f"))
    else:
        _print(found, None if everything else _SHOWN)
    if not found.same:
        raise typer.Exit(1)


def _print(found: Difference, limit: int | None) -> None:
    show.pairs(console, [("a", str(found.a)), ("b", str(found.b)), *_summary(found, limit)])
    if found.tensors:
        shown = sorted(found.tensors, key=_rank, reverse=True)[:limit]
        console.print(_table(shown))
        if len(shown) < len(found.tensors):
            show.lines(console, [f"{len(found.tensors) - len(shown)} more differ; --all shows them"])


def _summary(found: Difference, limit: int | None) -> Iterator[tuple[str, str]]:
    """Rows of subject and finding."""
    alone = len(found.only_in_a), len(found.only_in_b)
    different = f"{found.equal:,} equal, {len(found.tensors):,} different"
    yield "tensors", f"{different}, {alone[0]:,} only in a, {alone[1]:,} only in b"
    for side, names in (("a", found.only_in_a), ("b", found.only_in_b)):
        yield from ((f"only in {side}", text) for text in _named(names, limit))
    settings = list(found.config.items())
    for path, values in settings[:limit]:
        yield "config", f"{path}: {_setting(values, 'a')}, {_setting(values, 'b')}"
    if len(settings[:limit]) < len(settings):
        yield "config", f"{len(settings) - len(settings[:limit]):,} more settings differ"
    if found.tokens is not None:
        yield "tokenizer", f"{found.tokens:,} tokens differ"
    for state in ("different", "only in a", "only in b"):
        names = [name for name, its_state in found.files.items() if its_state == state]
        yield from (("files", f"{state}: {text}") for text in _named(names, limit))
    if found.same:
        yield "result", "nothing differs"


def _named(names: list[str], limit: int | None) -> list[str]:
    """A line for some names, or a line for each if there is no limit."""
    return names if limit is None or not names else [some(names)]


def _setting(values: dict[str, Any], side: str) -> str:
    if side not in values:
        return f"not in {side}"
    text = json.dumps(values[side], ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:59] + '…'} in {side}"


def _table(tensors: Iterable[TensorDifference]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("tensor", overflow="fold")
    table.add_column("dtype")
    table.add_column("shape")
    for heading in ("elements that differ", "largest difference"):
        table.add_column(heading, justify="right")
    for tensor in tensors:
        table.add_row(
            cell(tensor.name),
            _both(tensor.a.dtype, tensor.b.dtype),
            _both(_shape(tensor.a.shape), _shape(tensor.b.shape)),
            _count(tensor),
            "" if tensor.largest is None else f"{tensor.largest:.4g}",
        )
    return table


def _count(tensor: TensorDifference) -> str:
    if tensor.differing is None:
        return "not compared"
    share = f"{tensor.differing:,} ({tensor.differing / tensor.elements:.1%})" if tensor.elements else "0"
    parts = [
        f"{count:,} {what}"
        for count, what in ((tensor.nan, "with NaN"), (tensor.same_value, "by the sign of 0"))
        if count
    ]
    return ", ".join([share, *parts])


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a} / {b}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _rank(tensor: TensorDifference) -> tuple[bool, bool, float]:
    """What is no number comes first, then the largest difference."""
    return tensor.differing is None, tensor.nan > 0, float(tensor.largest or 0)
