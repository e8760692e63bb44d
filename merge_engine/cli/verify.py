"""``merge-engine verify``: an output against the manifest of its merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import merge_engine
from merge_engine.cli import show
from merge_engine.cli.terminal import console


def verify(
    output: Annotated[Path, typer.Argument(readable=False, help="The output folder of a merge.")],
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Look also whether the inputs are still those that were merged.")
    ] = False,
) -> None:
    """Read an output once, and hold it against its manifest. The exit code is 1 if anything is wrong."""
    with show.Progress(console, "reading") as progress:
        found = merge_engine.verify(
            output, inputs=inputs, on_start=progress.start_bytes, progress=progress.advance
        )
    show.lines(console, [*found.lines, found.summary])
    if not found.complete:
        raise typer.Exit(1)
