"""Runs our command line on a list of recipes, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from merge_engine.cli.app import app
from merge_engine.errors import MergeError


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Run something in another folder, to which the paths of a recipe are relative."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def merge(jobs: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Do all jobs as in in_mergekit.py, also ``lenient``. Returns each error by its output."""
    errors = {}
    for job in jobs:
        given = ["mergekit-multi" if job["several"] else "mergekit-yaml", job["config"]]
        parts = ["-I", job["output"] + "-parts", "--out-path"] if job["several"] else []
        options = [*parts, job["output"], "--quiet", *(["--lenient"] if job["lenient"] else [])]
        said = io.StringIO()
        try:
            with inside(job["folder"]), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                app([*given, *options], standalone_mode=False)
        except MergeError as error:
            errors[job["output"]] = "refused: " + " | ".join(error.problems)
        except BaseException as error:  # an exit, or a fault of ours
            if not (isinstance(error, SystemExit) and error.code in (0, None)):
                traceback.print_exc()
                errors[job["output"]] = f"crash: {type(error).__name__}: {error}"
    return errors
