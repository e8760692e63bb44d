"""Runs mergekit's own tests with its entry points served by this engine, and says who computed what.

    oracle/bin/python tests/oracle/mergekit_suite.py FOLDER/tests [arguments of pytest]

``FOLDER/tests`` are mergekit's tests (README.md says where they come from). For every test the calls are counted: the
checkpoints and the tensors that the engine merged, and what mergekit's own code computed, with the reason. The table
has one line for each file and counts test functions; a function with several cases counts as its worst case. Ends
with 1 if fewer functions pass than ``--least`` asks for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KINDS = ("engine", "both", "mergekit", "nothing merged", "skipped", "failed")
PASSED = KINDS[:4]
LEGEND = """\
engine: passed, and the engine computed every merge in it
both: passed, and mergekit's own code computed a part; mergekit: or all of it (reasons below)
nothing merged: passed, and nothing is merged in it: mergekit's own classes, checks of arguments, files
skipped: needs a device that this machine lacks
"""


@dataclass
class Function:
    """One test function: what its cases ended with, who computed, and why those failed that did."""

    outcomes: Counter[str] = field(default_factory=Counter)
    by_engine: Counter[str] = field(default_factory=Counter)
    handed: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        if self.outcomes["failed"]:
            return "failed"
        if not self.outcomes["passed"]:
            return "skipped"
        if self.handed:
            return "both" if self.by_engine else "mergekit"
        return "engine" if self.by_engine else "nothing merged"


class Recorder:
    """The plugin that watches pytest."""

    def __init__(self, tally: Any):
        self._tally = tally
        self.functions: dict[tuple[str, str], Function] = {}

    def pytest_runtest_setup(self) -> None:
        for counter in (self._tally.runs, self._tally.tensors, self._tally.handed):
            counter.clear()

    def pytest_runtest_logreport(self, report: Any) -> None:
        file, _, name = report.nodeid.partition("::")
        function = self.functions.setdefault((Path(file).name, name.partition("[")[0]), Function())
        if report.failed or (report.skipped and report.when == "setup"):
            function.outcomes["failed" if report.failed else "skipped"] += 1
        elif report.when == "call":
            function.outcomes["passed"] += report.passed
            function.outcomes["skipped"] += report.skipped
        if report.failed:
            said = getattr(report.longrepr, "reprcrash", None)
            text = str(said.message if said else report.longrepr)
            function.errors.append(f"{name.partition('[')[2].rstrip(']') or 'the only case'}: {text:.300}")
        if report.when == "call":
            function.by_engine.update({f"run {name}": n for name, n in self._tally.runs.items()})
            function.by_engine.update(self._tally.tensors)
            function.handed.update(self._tally.handed)


def table(functions: dict[tuple[str, str], Function]) -> str:
    """Functions of each kind by file, as a table in Markdown."""
    files: dict[str, Counter[str]] = {}
    for (file, _), function in functions.items():
        files.setdefault(file, Counter())[function.kind] += 1
    files["all"] = sum(files.values(), Counter())
    lines = [f"| file | functions | {' | '.join(KINDS)} |", f"| --- |{' ---: |' * (len(KINDS) + 1)}"]
    for file, kinds in files.items():
        cells = [file.removesuffix(".py"), kinds.total(), *(kinds[kind] for kind in KINDS)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def remarks(functions: dict[tuple[str, str], Function]) -> list[str]:
    """A line for each function that mergekit's code had a part in, that failed or was skipped."""
    lines = []
    for (file, name), function in functions.items():
        if function.kind in ("both", "mergekit"):
            reasons = ", ".join(f"{reason} ({n})" for reason, n in function.handed.items())
            lines.append(f"- {function.kind}: {file}::{name}: {reasons}; engine: {dict(function.by_engine)}")
        elif function.kind in ("failed", "skipped"):
            outcomes = ", ".join(f"{n} {kind}" for kind, n in function.outcomes.items() if n)
            lines.append(f"- {function.kind}: {file}::{name} ({outcomes})")
            lines += [f"    {' '.join(error.split())}" for error in function.errors[:3]]
    return lines


def main() -> int:
    """Run the tests and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", type=Path, help="mergekit's folder tests/")
    parser.add_argument("--least", type=int, default=0, help="functions that must pass")
    parser.add_argument("--list", action="store_true", help="also print every function and who computed")
    given, others = parser.parse_known_args()
    sys.path[:0] = [str(given.tests.resolve().parent), str(ROOT)]
    os.chdir(given.tests.resolve().parent)

    import pytest

    from merge_engine.integrations import mergekit

    with mergekit.installed() as tally:
        recorder = Recorder(tally)
        code = pytest.main(
            ["-q", "-p", "no:cacheprovider", "--tb=short", given.tests.name, *others], plugins=[recorder]
        )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return 2
    functions = recorder.functions
    print(f"\n{table(functions)}\n\n{LEGEND}")
    print("\n".join(remarks(functions)))
    if given.list:
        for (file, name), function in functions.items():
            print(f"{function.kind:15} {file}::{name}: {dict(function.by_engine)}")
    kinds = Counter(function.kind for function in functions.values())
    passed = sum(kinds[kind] for kind in PASSED)
    print(
        f"\n{passed} of {len(functions)} test functions pass, {kinds['engine'] + kinds['both']} of them with merges"
    )
    return int(passed < given.least)


if __name__ == "__main__":
    sys.exit(main())
