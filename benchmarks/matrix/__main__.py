"""No slow cell: the time of every kind of merge in memory, as a multiple of a bfloat16 linear merge of as many models.

    python -m benchmarks.matrix [--only ties,della] [--dtypes bf16] [--sets avx512] [--save FILE] [--against PYTHON]

The cells are those of ``benchmarks/matrix/cells.py``. A time is the best of a few, without what planning a tiny merge
takes; on one thread it is the processor's, on more the clock's. Linear is measured again every few seconds, on the same
instruction set, so that the load of other programs cancels. A merge that takes a second is not repeated.

PYTHON is the interpreter of an environment with another version. Its merges take turns with this version's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import merge_engine
import merge_engine._native as native
from benchmarks.matrix import worker
from benchmarks.matrix.cells import MODELS, Cell, cells
from merge_engine.bench.machine import describe
from merge_engine.storage.machine import cores

SETS = ("avx512", "avx2", "baseline")
UNIT_AGE = 2.0
"""Seconds after which linear is measured again."""
UNIT_REPEATS = 9
LIMITS = (4, 8)
HERE = Path(merge_engine.__file__).parents[1]


class MeasurementError(Exception):
    """A cell that cannot be measured."""


@dataclass(frozen=True)
class Row:
    """A cell that was measured: nanoseconds an element, of linear, and of another version (NaN: none)."""

    cell: Cell
    set: str
    nanoseconds: float
    unit: float
    before: float

    @property
    def multiple(self) -> float:
        """Of linear."""
        return self.nanoseconds / self.unit


class Worker:
    """A process with a version of the package."""

    def __init__(self, python: Path, threads: int, **environment: str):
        line = [str(python), str(Path(worker.__file__)), str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(line, env={**os.environ, **environment}, **pipes)

    def nanoseconds(self, cell: Cell, instruction_set: str, elements: int, repeats: int) -> float:
        """For an element. Raises ``MeasurementError`` if the merge fails."""
        assert self._process.stdin and self._process.stdout
        request = {"cell": asdict(cell), "set": instruction_set, "elements": elements, "repeats": repeats}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process ended at {cell.label} with {cell.models} models in {cell.data}")
        answer = json.loads(line)
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return float(1e9 * answer["seconds"] / elements)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Unit:
    """Linear merges in bfloat16 by number of models and instruction set, not older than some seconds."""

    def __init__(self, measure: Callable[[Cell, str, int], float]):
        self._measure = measure
        self._known: dict[tuple[int, str], tuple[float, float]] = {}

    def of(self, models: int, instruction_set: str) -> float:
        """Nanoseconds an element."""
        when, value = self._known.get((models, instruction_set), (float("-inf"), 0.0))
        if time.monotonic() - when > UNIT_AGE:
            value = self._measure(Cell("linear", "bf16", 0, models, ()), instruction_set, UNIT_REPEATS)
            self._known[models, instruction_set] = time.monotonic(), value
        return value


def main() -> None:
    """Measure, and print the worst cells and a summary for each instruction set."""
    options = _parser().parse_args()
    chosen = list(_chosen(options))
    rows: list[Row] = []
    failed: list[str] = []
    this = Worker(Path(sys.executable), options.threads, PYTHONPATH=str(HERE))
    other = Worker(options.against, options.threads) if options.against else None
    unit = Unit(lambda cell, name, repeats: this.nanoseconds(cell, name, options.elements, repeats))
    for number, (cell, name) in enumerate(chosen):
        try:
            linear = unit.of(cell.models, name)
            before = float("nan")
            if other:
                before = other.nanoseconds(cell, name, options.elements, options.repeats)
            found = this.nanoseconds(cell, name, options.elements, options.repeats)
            rows.append(Row(cell, name, found, linear, before))
        except MeasurementError as error:
            failed.append(f"failed: {name}, {cell.data}, {cell.models} models, {cell.label}: {error}")
            print(failed[-1], file=sys.stderr)
        if number % 500 == 499:
            print(f"# {number + 1} of {len(chosen)}", file=sys.stderr, flush=True)
    for used in filter(None, (this, other)):
        used.close()
    for name in options.sets.split(","):
        of_set = sorted((row for row in rows if row.set == name), key=lambda row: -row.multiple)
        print(f"\n{name}: the worst of {len(of_set)} cells")
        print("\n".join(_listed(of_set[: options.worst])))
        print(f"\n{name}: times linear")
        print("\n".join(_summary(of_set)))
        if other:
            print(f"\n{name}: times linear, before")
            print("\n".join(_summary([replace(row, nanoseconds=row.before) for row in of_set])))
    if options.save:
        options.save.write_text("\n".join([*_header(), *_listed(rows), *failed]) + "\n")
    if failed:
        raise SystemExit(f"{len(failed)} cells failed, such as\n{failed[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    available = [name for name in SETS[:2] if native.runs(name)] or SETS[2:]
    parser.add_argument("--elements", type=int, default=1 << 22, help="of each tensor, about")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worst", type=int, default=40, help="cells that are printed")
    parser.add_argument("--only", help="methods, such as ties,della")
    parser.add_argument("--dtypes", help="kinds of data, such as bf16,fp32")
    parser.add_argument("--models", help="such as 2,5")
    parser.add_argument("--sets", default=",".join(available), help="instruction sets")
    parser.add_argument("--every", type=int, default=1, help="every so manieth cell only; take a prime")
    parser.add_argument("--save", type=Path, help="a file for all cells")
    parser.add_argument("--against", type=Path, metavar="PYTHON")
    return parser


def _chosen(options: argparse.Namespace) -> Iterator[tuple[Cell, str]]:
    """The cells of this run, with their instruction sets."""
    asked = {"method": options.only, "data": options.dtypes, "models": options.models}
    narrowed = [
        cell
        for cell in cells()
        if all(text is None or str(getattr(cell, name)) in text.split(",") for name, text in asked.items())
    ]
    for cell in narrowed[:: options.every]:
        for name in options.sets.split(","):
            yield cell, name


def _header() -> list[str]:
    about = describe({}, None)
    return [
        f"# {' '.join(['python -m benchmarks.matrix', *sys.argv[1:]])}",
        f"# {date.today()}, {json.dumps(about)}",
    ]


def _listed(rows: Iterable[Row]) -> Iterator[str]:
    """A line for each row."""
    yield "times linear | ns an element | before | before / after | set | models | data | zeros | merge"
    for row in rows:
        gain = f"{row.before:.2f} | {row.before / row.nanoseconds:.2f}" if row.before == row.before else " | "
        cell = row.cell
        yield (
            f"{row.multiple:.2f} | {row.nanoseconds:.3f} | {gain} | {row.set} | {cell.models} | {cell.data} | "
            f"{cell.zeros} % | {cell.label}"
        )


def _summary(rows: list[Row]) -> Iterator[str]:
    """A line for each group of cells. Those with 10 models are in a group of their own only."""
    yield f"{'cells':24}{'number':>8}{'median':>8}{'90 %':>8}{'worst':>8}" + "".join(
        f"{f'above {limit}':>10}" for limit in LIMITS
    )
    few = [row for row in rows if row.cell.models <= max(MODELS)]
    groups = {f"{' and '.join(map(str, MODELS))} models": [row for row in few if row.cell.models in MODELS]}
    for row in few:
        groups.setdefault(row.cell.method, []).append(row)
    for row in few:
        groups.setdefault(row.cell.data, []).append(row)
    for row in sorted(rows, key=lambda row: row.cell.models):
        groups.setdefault(f"{row.cell.models} model{'s' * (row.cell.models > 1)}", []).append(row)
    for name, group in groups.items():
        if group:
            yield f"{name:24}{_figures(sorted(row.multiple for row in group))}"


def _figures(multiples: list[float]) -> str:
    """Of multiples in rising order."""
    last = len(multiples) - 1
    at = [multiples[round(share * last)] for share in (0.5, 0.9, 1)]
    above = [sum(value > limit for value in multiples) / len(multiples) for limit in LIMITS]
    return (
        f"{len(multiples):8}" + "".join(f"{v:8.1f}" for v in at) + "".join(f"{100 * v:8.1f} %" for v in above)
    )


if __name__ == "__main__":
    main()
