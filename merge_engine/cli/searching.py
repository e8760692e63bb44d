"""``merge-engine search``: look for the values with which a merge scores best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

import merge_engine
from merge_engine.cli import INTERRUPTED, show, terminal
from merge_engine.cli.options import BackendName, Device, Quiet, RecipeFile, Threads
from merge_engine.cli.search_options import directions_of, function_named, space_of
from merge_engine.cli.terminal import cell, console, say
from merge_engine.errors import OptionError

if TYPE_CHECKING:
    from merge_engine.report.history_data import SearchHistory, Trial

_SHOWN = 12
"""Trials in the table while the search goes on."""


def search(
    recipe: RecipeFile,
    output: Annotated[
        Path,
        typer.Argument(readable=False, help="The folder for the best recipes, the history and the trials."),
    ],
    space: Annotated[
        list[str],
        typer.Option(
            help="What varies, once for each name: density=0.1..0.9, lambda=0.1..10:log, sign_slack[1]=0..4:0.5, "
            "or choices such as merge_method=ties,dare_ties."
        ),
    ],
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="The function that scores a merge; modules of this folder are found.",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness that score a merge, such as arc_easy,piqa.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task for --lm-eval.", show_default="all")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own for --lm-eval.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Items in a batch for --lm-eval.", show_default="8")
    ] = None,
    trials: Annotated[int, typer.Option(help="Proposals to score after the recipe itself.")] = 50,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which no trial begins.", show_default="none")
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(
            help="maximize or minimize; with several objectives once for each, as NAME=minimize.",
            show_default="maximize",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="tpe, nsga2 or cmaes.", show_default="tpe; nsga2 with several objectives"),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="A file or a URL of Optuna's for the trials.", show_default="study.db in the folder"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other proposals.")] = 0,
    device: Device = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Look for the values with which a merge scores best.

    The recipe itself is scored first. The same command goes on where an earlier one stopped.
    """
    from merge_engine.searches.loop import check

    values, directions = space_of(space), directions_of(direction)
    if (evaluate is None) == (lm_eval is None):
        raise OptionError(
            "give either --evaluate, a function of yours, or --lm-eval, tasks of lm-evaluation-harness"
        )
    for_harness: dict[str, Any] = {"limit": limit, "include-path": include_path, "batch-size": batch_size}
    given = {name: value for name, value in for_harness.items() if value is not None}
    if evaluate is not None and given:
        raise OptionError([f"--{name}: needs --lm-eval" for name in given])
    scorer: Callable[[Any], Any] | None = None if evaluate is None else function_named(evaluate)
    checked = merge_engine.load_recipe(recipe)
    check(checked, values, directions or "maximize", trials, timeout, sampler, seed)  # before models are read
    with merge_engine.load(checked, device=device, backend=backend, threads=threads) as session:
        if lm_eval is not None:
            from merge_engine.searches.lm_eval import LmEval

            harness = LmEval(
                lm_eval.split(","),
                checked.references[0].path,
                device=_place(device),
                **{name.replace("-", "_"): value for name, value in given.items()},
            )
            scorer, directions = harness, directions or harness.directions
        assert scorer is not None
        shows = not quiet and lm_eval is None  # the harness shows bars of its own
        with _Table(trials, shows) as table:
            try:
                found = merge_engine.search(
                    session,
                    scorer,
                    values,
                    trials=trials,
                    timeout=timeout,
                    directions=directions or "maximize",
                    sampler=sampler,
                    storage=storage,
                    seed=seed,
                    output=output,
                    on_trial=table.update,
                )
            except KeyboardInterrupt:
                say(
                    "error",
                    [f"interrupted; {output} has what was found, and the same command goes on from there"],
                )
                raise typer.Exit(INTERRUPTED) from None
    terminal.result_is_on_disk()
    show.warnings(found.notes)
    if not quiet:
        console.print(trial_table(found.history, found.front))
        show.lines(console, [*found.summary, f"wrote {output}"])


def _place(device: str) -> str | None:
    return None if device == "auto" else device


class _Table:
    """The last trials in a table that grows on a terminal; nothing elsewhere."""

    def __init__(self, trials: int, shown: bool):
        self._trials = trials
        self._live = (
            Live(console=console, transient=True, auto_refresh=False)
            if shown and console.is_terminal
            else None
        )

    def update(self, history: SearchHistory) -> None:
        """Show the history after one more trial."""
        if self._live is not None:
            done = len(history.trials) - 1
            table = trial_table(history, [*history.front[:1], *history.trials[-_SHOWN:]])
            table.caption = f"{done:,} of {self._trials:,} trials"
            self._live.update(table, refresh=True)

    def __enter__(self) -> _Table:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def trial_table(history: SearchHistory, trials: Sequence[Trial]) -> Table:
    """A row for each trial: its values, its scores and its seconds."""
    from merge_engine.report.values import score_text  # slow to load, and other commands do not need it

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("trial", justify="right")
    for name in history.parameters:
        table.add_column(cell(name), justify="right", overflow="fold")
    for objective in history.objectives:
        table.add_column(cell(objective.name), justify="right", overflow="fold")
    table.add_column("", justify="right")
    for trial in {trial.number: trial for trial in trials}.values():
        values = (trial.values.get(name, "") for name in history.parameters)
        scores = (
            map(score_text, trial.scores, trial.errors)
            if trial.scores
            else ("refused" for _ in history.objectives)
        )
        table.add_row(
            "recipe" if trial.number == history.baseline else str(trial.number),
            *(cell(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in values),
            *map(cell, scores),
            "" if trial.seconds is None else f"{trial.seconds:.1f} s",
        )
    return table
