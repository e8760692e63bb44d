"""What every command that merges does: show progress, warnings and result, and clean up when interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import merge_engine
from merge_engine.checkpoint import MANIFEST_NAME
from merge_engine.cli import show, terminal
from merge_engine.cli.interrupts import Interruptible
from merge_engine.cli.terminal import console
from merge_engine.planning import Schedule
from merge_engine.recipe import Recipe


def merge(recipe: Path | tuple[Recipe, ...], output: Path, *, quiet: bool = False, **options: Any) -> None:
    """Merge into a folder, and print what was done; with ``quiet`` only warnings. ``options`` are those of ``run``."""
    warned: dict[str, None] = {}

    def warn(lines: Sequence[str]) -> None:
        show.warnings(line for line in lines if line not in warned)
        warned.update(dict.fromkeys(lines))

    def start(schedule: Schedule) -> None:
        warn(schedule.plan.warnings)
        progress.start(schedule)

    with Interruptible(output / MANIFEST_NAME) as interruptible:
        with show.Progress(console, shown=not quiet) as progress:
            result = merge_engine.run(recipe, output, on_schedule=start, progress=progress.advance, **options)
        interruptible.end()
        terminal.result_is_on_disk()
        warn(result.warnings)
        if not quiet:
            show.result(console, result)
