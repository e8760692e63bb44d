"""The matrix: every shape of recipe by our command line and by mergekit's, and what differs.

usage: python tests/oracle/recipe_matrix.py ORACLE_PYTHON [--published] [--only TEXT] [--precision bf16] [--work FOLDER]

ORACLE_PYTHON is the python of an environment with mergekit (README.md). Both tools merge the same recipes in the same
folder; ours once with ``arithmetic: mergekit`` and once by default. Everything is loaded in transformers. With
``--published`` recipes of published models are merged, once more by the real command lines. The exit code is 0 if all
is as the shapes expect it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from matrix.command_lines import run_both
from matrix.running import PRECISIONS, Matrix, Row
from matrix.shapes import FILES, PUBLISHED, load_shapes
from matrix.table import print_table, summary


def main() -> int:
    """Run the matrix, and print it."""
    arguments = argparse.ArgumentParser(description="every shape of recipe, by both tools")
    arguments.add_argument("oracle", help="the python of an environment with mergekit")
    arguments.add_argument("--only", default="", help="shapes whose title holds this text")
    arguments.add_argument("--published", action="store_true", help="recipes of published models instead")
    arguments.add_argument("--precision", choices=PRECISIONS, action="append")
    arguments.add_argument(
        "--work", type=Path, help="keep models and outputs in this folder, which must not exist"
    )
    given = arguments.parse_args()
    files = PUBLISHED if given.published else FILES
    shapes = [shape for title, shape in load_shapes(files).items() if given.only in title]
    work = Path(tempfile.mkdtemp()) if given.work is None else given.work.resolve()
    rows: list[Row] = []
    try:
        for precision in given.precision or PRECISIONS:
            matrix = Matrix(work, given.oracle, precision, shapes, deep=given.published)
            rows += matrix.rows()
            print(
                f"{precision}: {len(shapes)} merges in {matrix.seconds_theirs:.0f} s by mergekit, twice as many in "
                f"{matrix.seconds_ours:.0f} s by ours",
                file=sys.stderr,
            )
        print_table(rows)
        failed = run_both(work / rows[0].precision, given.oracle, shapes) if given.published else []
    finally:
        if given.work is None:
            shutil.rmtree(work)
    print()
    for row in rows:
        for reason in row.wrong:
            print(f"not as expected: {row.shape.title} ({row.precision}): {reason}")
    for reason in failed:
        print(f"failed: {reason}")
    print(summary(rows))
    return 1 if failed or any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
