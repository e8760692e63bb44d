"""The search for the best merges in Tamil and English at once: five methods with the same number of trials each.

    python -m examples.low_resource.search

One session holds the shipped base, CT and SFT. For each method Optuna proposes values, the session merges them into a
model, and half of the held-out text scores it. The other half judges, once, the recipes of each front. What a search
tried is in ``out/search``: the same command goes on where it stopped. The numbers go to ``search.json``, the tables
and the figure to ``docs/low_resource.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

import merge_engine as me
from examples.low_resource import search_plot, search_tables
from examples.low_resource.comparing import Judged, best_within, compared, rounded
from examples.low_resource.errors import ExampleError, told
from examples.low_resource.fronts import Measured
from examples.low_resource.halves import BITS, ENGLISH, TAMIL, Half, choosing, judging
from examples.low_resource.merging import Variant, recipe_for
from examples.low_resource.settings import (
    HERE,
    MODELS,
    SEARCH_BUDGETS,
    SEARCH_JUDGING_TEXTS,
    SEARCH_REFERENCE,
    SEARCH_SENTENCES,
    SEARCH_SPACES,
    SEARCH_TEXTS,
    SEARCH_TRIALS,
    SHIPPED_CT,
)
from examples.low_resource.training import load_model
from merge_engine.bench.machine import describe

CT = SHIPPED_CT[-1]
TRIO = {"base": MODELS / "base", "CT": MODELS / f"ct-{CT}", "SFT": MODELS / "sft"}
OUT = HERE / "out" / "search"
MARKER = "half.json"


def searched(
    session: me.Session, method: str, half: Half, *, trials: int, seed: int, output: Path | None
) -> me.SearchResult:
    """The search of one method. Each trial writes the merge into the same model."""
    model = load_model(TRIO["base"])

    def evaluate(merge: me.Merge) -> dict[str, tuple[float, float]]:
        merge.into(model)
        return {name: (found.value, found.error) for name, found in half.measured(model).items()}

    return me.search(
        session,
        evaluate,
        SEARCH_SPACES[method],
        directions={BITS: "minimize", ENGLISH: "maximize"},
        start=recipe_for(Variant(method), MODELS, CT),
        sampler="tpe",
        trials=trials,
        seed=seed,
        output=output,
    )


def judged(session: me.Session, result: me.SearchResult, half: Half, model: LlamaForCausalLM) -> list[Judged]:
    """The front of a search on the half that judges, from the best in Tamil to the best in English.

    Tamil accuracy, which was no objective, is measured for the recipes that some budget chooses.
    """
    front = sorted(zip(result.front, result.recipes, strict=True), key=lambda pair: pair[0].scores)
    chosen = [dict(zip((BITS, ENGLISH), trial.scores, strict=True)) for trial, _ in front]
    best = {best_within(budget, chosen) for budget in SEARCH_BUDGETS}
    found = []
    for number, (trial, recipe) in enumerate(front):
        session.merge(recipe).into(model)
        measured = half.measured(model, leave_out=() if number in best else (TAMIL,))
        found.append(Judged(trial.number, trial.values, chosen[number], measured))
    return found


def run(trials: int, seeds: list[int]) -> dict[str, Any]:
    """Search, judge and compare; the content of ``search.json``."""
    start, used = time.perf_counter(), time.process_time()
    chooses, judges = choosing(SEARCH_SENTENCES, SEARCH_TEXTS), judging(SEARCH_JUDGING_TEXTS)
    _check_out(chooses)
    fronts: dict[str, list[list[Judged]]] = {method: [] for method in SEARCH_SPACES}
    with me.load(TRIO["base"], [TRIO["CT"], TRIO["SFT"]]) as session:
        model = load_model(TRIO["base"])
        baselines = _baselines(session, judges, model)
        for seed in seeds:
            for method in SEARCH_SPACES:
                folder = OUT / f"{method}-{seed}"
                result = searched(session, method, chooses, trials=trials, seed=seed, output=folder)
                fronts[method].append(judged(session, result, judges, model))
                print(
                    f"{method}, seed {seed}: {len(fronts[method][-1])} recipes in the front, "
                    f"{time.perf_counter() - start:.0f} s so far; see {folder.relative_to(HERE)}/history.html",
                    flush=True,
                )
    about = describe({"disk": HERE}, None)
    about["versions"]["optuna"] = version("optuna")
    return {
        "settings": {
            "trials": trials,
            "seeds": seeds,
            "spaces": SEARCH_SPACES,
            "reference": SEARCH_REFERENCE,
            "choosing": _size(chooses),
            "judging": _size(judges),
        },
        **about,
        "seconds": {"elapsed": round(time.perf_counter() - start), "cpu": round(time.process_time() - used)},
        "baselines": baselines,
        **compared(fronts),
        "fronts": {
            method: [[_front_row(each) for each in front] for front in each_seed]
            for method, each_seed in fronts.items()
        },
    }


def _baselines(session: me.Session, half: Half, model: LlamaForCausalLM) -> dict[str, dict[str, list[float]]]:
    """What the models of the session and the recipes without changes have on the half that judges."""
    found = {name: _numbers(half.measured(load_model(folder))) for name, folder in TRIO.items()}
    for method in SEARCH_SPACES:
        session.merge(recipe_for(Variant(method), MODELS, CT)).into(model)
        found[method] = _numbers(half.measured(model))
    return found


def _check_out(half: Half) -> None:
    """Raises ``ExampleError`` if the trials there were scored by other texts."""
    marker = OUT / MARKER
    if marker.exists() and json.loads(marker.read_text())["identity"] != half.identity:
        raise ExampleError(f"{OUT}: holds trials that other texts scored; remove it to search anew")
    OUT.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"identity": half.identity}) + "\n")


def _size(half: Half) -> dict[str, int]:
    return {BITS: len(half.texts)} | {name: len(items) for name, items in half.items.items()}


def _numbers(found: dict[str, Measured]) -> dict[str, list[float]]:
    return {name: rounded([each.value, each.error]) for name, each in found.items()}


def _front_row(each: Judged) -> dict[str, Any]:
    values = {name: round(v, 4) if isinstance(v, float) else v for name, v in each.values.items()}
    chosen = {name: round(score, 5) for name, score in each.chosen.items()}
    return {"trial": each.trial, "values": values, "choosing": chosen, "judging": _numbers(dict(each.judged))}


def _text(content: dict[str, Any]) -> str:
    """JSON with what holds no lists or maps in one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda inner: " ".join(inner[0].split()), text) + "\n"


def main() -> None:
    """Search with what the command line says, then write numbers, tables and figure."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.low_resource.search", description="The best merges in Tamil and English."
    )
    parser.add_argument("--trials", type=int, default=SEARCH_TRIALS, help="proposals for each method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="searches of each method")
    options = parser.parse_args()
    content = run(options.trials, options.seeds)
    search_tables.RESULTS.write_text(_text(content))
    print(
        f"numbers in {search_tables.RESULTS}, tables in {search_tables.write()}, figure in {search_plot.draw()}"
    )


if __name__ == "__main__":
    told(main)
