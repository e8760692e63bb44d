"""``merge-engine bench``: time merges on this machine, beside mergekit and a bare copy."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from merge_engine.checkpoint import parse_size
from merge_engine.cli.terminal import console
from merge_engine.errors import OptionError


def bench(
    sizes: Annotated[str, typer.Option(help="Shapes of models, such as 0.5b,1.1b,3b,7b,moe.")] = "1.1b",
    models: Annotated[str, typer.Option(help="Numbers of fine-tunes to merge, such as 2,5,10,20.")] = "2",
    methods: Annotated[str, typer.Option(help="Methods, such as linear,ties,della; or all.")] = "ties,linear",
    cache: Annotated[
        str, typer.Option(help="Inputs in the page cache (warm), not (cold), or both.")
    ] = "warm",
    rounds: Annotated[int, typer.Option(min=1, help="How often each contestant runs.")] = 5,
    mergekit: Annotated[
        Path | None,
        typer.Option(exists=True, help="The mergekit-yaml script, if the shell does not find it."),
    ] = None,
    mergekit_rounds: Annotated[int, typer.Option(min=0, help="How often mergekit runs; it is slow.")] = 1,
    torch_rounds: Annotated[int, typer.Option(min=0, help="How often TIES in plain torch runs.")] = 1,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the checkpoints; by default $MERGE_ENGINE_BENCH_DIR, else the user's cache."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="The folder to write to; on /dev/shm no disk slows the merge."
        ),
    ] = None,
    shard_sizes: Annotated[str, typer.Option(help="Sizes of input files, such as 5GB,50MB.")] = "5GB",
    distinct: Annotated[
        int | None, typer.Option(min=1, help="Fine-tunes with data of their own; the rest are links.")
    ] = None,
    slow_disk: Annotated[
        str | None, typer.Option(help="Slow merge_engine and the copy to so many bytes a second: 200MB.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of time against models and bytes.")] = None,
) -> None:
    """Time merges of synthetic models on this machine, beside mergekit, plain torch and a bare copy.

    Contestants take turns. Nothing is downloaded; only the checkpoints stay in the folder.
    """
    from merge_engine.bench.checkpoints import cache_folder  # these import torch
    from merge_engine.bench.contestants import METHODS
    from merge_engine.bench.probe import measure_limits
    from merge_engine.bench.results import save as save_results
    from merge_engine.bench.shapes import ARCHITECTURES
    from merge_engine.bench.suite import Result, Suite, measure_case
    from merge_engine.bench.tables import case_table, fit_table

    if plot is not None:
        from merge_engine.bench.plots import plot as draw  # fails now if it cannot be done
    root = folder or cache_folder()
    found = shutil.which("mergekit-yaml")
    script = mergekit or (Path(found) if found else None)
    suite = Suite(
        root=root,
        output=output or root,
        sizes=_chosen("--sizes", sizes, ARCHITECTURES),
        models=tuple(_count(text) for text in models.split(",")),
        methods=tuple(METHODS) if methods == "all" else _chosen("--methods", methods, METHODS),
        caches=("warm", "cold") if cache == "both" else _chosen("--cache", cache, ("warm", "cold")),
        shard_sizes=tuple(_bytes("--shard-sizes", size) for size in shard_sizes.split(",")),
        pace=None if slow_disk is None else _bytes("--slow-disk", slow_disk),
        distinct=distinct,
        rounds={
            "copy": rounds,
            "merge_engine": rounds,
            "torch": torch_rounds,
            "mergekit": mergekit_rounds if script else 0,
        },
        mergekit=script,
    )
    suite.check_space()
    if script is None and mergekit_rounds:
        console.print("mergekit is left out: no mergekit-yaml was found; --mergekit says where it is")
    limits = measure_limits(suite.root)
    if suite.output != suite.root:
        limits = measure_limits(suite.output)
    results: list[Result] = []
    for case in suite.cases():
        console.print(f"\n[bold]{case}[/bold]")
        results.append(measure_case(suite, case, limits))
        console.print(case_table(results[-1]))
        if save is not None:  # after each case: a long suite may be stopped
            save_results(save, suite, limits, results)
    if (table := fit_table(results)) is not None:
        console.print(table)
    if plot is not None:
        draw(results, plot)


def _chosen(option: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise OptionError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"--models: {text!r} is not a number of models; write 2 or 2,5,10")
    return int(text)


def _bytes(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise OptionError(f"{option}: {error}") from None
