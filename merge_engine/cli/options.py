"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merge_engine.arguments import threads_of

RecipeFile = Annotated[
    Path, typer.Argument(readable=False, help="The recipe, a YAML file in mergekit's format.")
]
Device = Annotated[
    str,
    typer.Option(
        help="auto (a GPU where that is expected to be faster), cpu, cuda, or cuda:1 for the second one."
    ),
]
BackendName = Annotated[
    str, typer.Option("--backend", help="auto, cpu, cuda, triton or reference.", show_default=True)
]
Threads = Annotated[
    int | None,
    typer.Option(callback=threads_of, show_default="all cores", help="Threads that compute."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Tensor data held at a time, in memory of the device that computes.",
        show_default="400MB; on a GPU a quarter of what is free",
    ),
]
ShardSize = Annotated[str, typer.Option(help="Size of an output file, such as 5GB or 500MB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output in the folder.")]

Lenient = Annotated[
    bool,
    typer.Option("--lenient", help="Ignore keys and parameters that do not exist, as mergekit does."),
]
IntermediateDir = Annotated[
    Path | None,
    typer.Option(
        "--intermediate-dir",
        "-I",
        readable=False,
        help="Keep in this folder what other recipes of the file make, by name.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Merge on a Ray cluster: auto (the one that runs on this machine), HOST:PORT, or local.",
    ),
]
RayPath = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HERE=THERE",
        help="With --ray: what is below the folder HERE on this machine is below THERE on the nodes; "
        "NODE:HERE=THERE is for one of them.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only warnings and errors.")]

SHARD_SIZE = "5GB"
