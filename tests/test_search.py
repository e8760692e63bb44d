"""A search over a session: what is proposed, kept, refused, gone on with and found."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.methods import METHODS
from merge_engine.recipe import Recipe
from merge_engine.searches.space import read_space

TIES = """\
merge_method: ties
base_model: the base model
models: [{model: model 0}, {model: model 1, parameters: {weight: 0.7}}]
parameters: {weight: 0.5, density: 0.2}
"""
BASE, *MODELS = ({"w": torch.randn(4, 8)} for _ in range(3))
SESSION = me.load(BASE, MODELS)


def search(evaluate: Callable[[me.Merge], Any], space: Any, **options: Any) -> me.SearchResult:
    return me.search(SESSION, evaluate, space, **{"trials": 3, "start": TIES, **options})


def parameters(merge: me.Merge) -> dict[str, Any]:
    found: dict[str, Any] = merge.recipe.to_plain()["parameters"]
    return found


def near(merge: me.Merge) -> float:
    """Best at density 0.4 and sign_slack 1."""
    values = parameters(merge)
    return -((values["density"] - 0.4) ** 2) - 0.1 * abs(values.get("sign_slack", 0) - 1)


NEAR = {"density": (0.1, 0.9), "sign_slack": (0, 4), "elect": ["sum", "count"]}

numbers = st.floats(0, 1, allow_subnormal=False).map(lambda x: round(x, 6))
ranges = st.tuples(numbers, numbers).filter(lambda ends: ends[0] < ends[1])
domains = {
    "density": ranges | st.lists(numbers, min_size=2, max_size=4, unique=True) | numbers,
    "weight[1]": ranges,
    "lambda": st.just({"low": 0.01, "high": 10, "log": True}) | st.just({"low": 0, "high": 1, "step": 0.1}),
    "sign_slack": st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True),
    "normalize": st.just([True, False]),
    "merge_method": st.lists(st.sampled_from(["ties", "dare_ties", "linear"]), min_size=2, unique=True),
    "seed": st.just((0, 9)) | st.just({"low": 3, "high": 9, "step": 3}),
    "dtype": st.just(["float32", "bfloat16"]),
}


@given(
    chosen=st.fixed_dictionaries({}, optional=domains).filter(lambda space: bool(space)),
    sampler=st.sampled_from(["tpe", "nsga2"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_every_proposal_lies_in_the_space_and_is_a_valid_recipe(
    chosen: dict[str, object], sampler: str, seed: int
) -> None:
    problems: list[str] = []
    space = read_space(chosen, problems)
    if problems:
        assert problems == ["space: varies nothing; give a name a range (low, high) or a list of choices"]
        return
    merged: list[Recipe] = []

    def evaluate(merge: me.Merge) -> float:
        merged.append(merge.recipe)
        return float(len(merged))

    found = search(evaluate, chosen, sampler=sampler, seed=seed, trials=4)
    assert len(found.trials) == 5 and merged[0] == SESSION.merge(TIES).recipe
    assert len({str(recipe) for recipe in merged[1:]}) == len(merged) - 1  # no recipe is scored twice
    for trial in found.trials[1:]:
        recipe = found.recipe_of(trial)
        declared = {p.name for p in METHODS[recipe.merge_method].parameters}
        for name, value in trial.values.items():
            assert value in space.varied[name]
        for name in space.varied.keys() - trial.values.keys():  # only what the trial's method does not have
            assert name.partition("[")[0] not in declared
        assert recipe == merged[int(trial.scores[0]) - 1] or trial.scores == found.trials[0].scores
        for name, value in {**space.fixed, **trial.values}.items():
            if name in ("merge_method", "seed", "dtype"):
                assert getattr(recipe, name) == value
            elif name == "weight[1]":
                assert recipe.models is not None and recipe.models[1].parameters["weight"] == value
            elif name in declared:
                assert recipe.parameters[name] == value


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
def test_a_search_that_stops_and_goes_on_has_the_same_trials(sampler: str, tmp_path: Path) -> None:
    space = NEAR if sampler != "cmaes" else {name: NEAR[name] for name in ("density", "sign_slack")}
    fails: list[int] = []
    calls = 0

    def evaluate(merge: me.Merge) -> float:
        nonlocal calls
        calls += 1
        if calls in fails:
            raise KeyboardInterrupt if calls == 14 else RuntimeError("no memory")
        return near(merge)

    whole = search(evaluate, space, trials=20, sampler=sampler, seed=5)
    without_failures, calls = calls, 0
    if sampler != "cmaes":  # it draws by Optuna's numbers, which count failures
        fails = [1, 14, 18]
    for trials in (4, 4, 11, 20, 20, 20):
        try:
            parts = search(
                evaluate, space, trials=trials, sampler=sampler, seed=5, storage=tmp_path / "study.db"
            )
        except (KeyboardInterrupt, me.SearchError):
            continue
    assert [t.values for t in parts.trials] == [t.values for t in whole.trials]
    assert [t.scores for t in parts.trials] == [t.scores for t in whole.trials]
    assert calls == without_failures + len(fails)  # nothing is scored twice
    assert parts.best.values == whole.best.values and parts.recipes == whole.recipes


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_samplers_come_near_the_best(sampler: str) -> None:
    found = search(near, {"density": (0.1, 0.9), "sign_slack": (0, 4)}, trials=40, sampler=sampler)
    assert near(SESSION.merge(found.recipes[0])) == found.best.scores[0] > -0.05
    assert found.history.importance["score"]["density"] > 0


def test_two_objectives_have_a_front() -> None:
    def evaluate(merge: me.Merge) -> dict[str, float]:
        density = parameters(merge)["density"]
        return {"tamil": density, "english": 1 - density**2}

    directions = {"english": "maximize", "tamil": "maximize"}
    found = search(evaluate, {"density": (0.0, 1.0)}, trials=20, directions=directions)
    assert len(found.front) == 21  # every density is on it
    assert [objective.name for objective in found.history.objectives] == ["english", "tamil"]
    with pytest.raises(me.OptionError, match="no trial is best in all of english, tamil"):
        _ = found.best


def test_the_recipe_itself_comes_first_also_outside_of_the_space() -> None:
    inside = search(near, {"density": (0.1, 0.9), "sign_slack": [0, 2]}, trials=2)
    assert inside.trials[0].values == {"density": 0.2, "sign_slack": 0}
    outside = search(near, {"density": (0.3, 0.9), "weight": (0.1, 0.9)}, trials=12, sampler="cmaes")
    assert outside.trials[0].values == {"density": 0.2}  # its models have different weights
    assert outside.trials[0].scores == inside.trials[0].scores
    assert outside.best.number > 0 and len({t.values["weight"] for t in outside.trials[1:]}) == 12


def test_a_method_is_tried_without_the_parameters_of_others() -> None:
    space = {"merge_method": ["ties", "linear", "della"], "sign_slack": (0, 4), "epsilon": (0.0, 0.5)}
    found = search(lambda merge: 0.0, space, trials=20)
    states = {trial.state for trial in found.trials if trial.values["merge_method"] == "della"}
    assert states == {"complete", "refused"}  # density - epsilon may be negative
    refused = {trial.reason for trial in found.trials if not trial.scores}
    assert refused and all("gives keep probabilities from -" in reason for reason in refused)
    linear = [trial for trial in found.trials if trial.values["merge_method"] == "linear"]
    assert linear and all(trial.values.keys() == {"merge_method"} for trial in linear)
    assert found.recipe_of(linear[0]).parameters == {"weight": 0.5}
    with pytest.raises(me.PlanError, match=r"space: slerp: .*t: required"):
        search(near, {"merge_method": ["ties", "slerp"]})


NOISE = {"better": (0.9, True), "worse": (0.1, False), "noisy": (0.55, False)}


@pytest.mark.parametrize("name", NOISE)
def test_it_says_whether_the_best_is_better_than_the_recipe(name: str) -> None:
    score, beyond = NOISE[name]
    base = SESSION.merge(TIES).recipe
    found = search(
        lambda merge: (0.5 if merge.recipe == base else score, 0.03), {"density": (0.1, 0.9)}, trials=5
    )
    assert found.comparisons[0].beyond_noise is beyond
    says = {
        "better": "0.900 ± 0.030, the recipe without changes has 0.500 ± 0.030: 9.4 standard errors better, more than",
        "worse": "the recipe without changes has 0.500 ± 0.030, and none of 5 trials is better",
        "noisy": "1.2 standard errors better, no more than noise, because chance gives the best of 5 trials up to 2.3",
    }
    assert says[name] in found.summary[0]


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_merged() -> None:
    def problems(space: object, **options: Any) -> list[str]:
        with pytest.raises(me.OptionError) as caught:
            search(lambda merge: pytest.fail("merged"), space, **options)
        return caught.value.problems

    space = {
        "t": (3, 1),
        "density": (0.1, 1.4),
        "densty": (0, 1),
        "weight[5]": (0, 1),
        "ties": (0, 1),
        "seed": (0.5, 2),
    }
    assert problems(space, trials=0, directions="max", sampler="tp", seed=-1, timeout=0) == [
        "trials: must be a whole number from 1 on, not 0",
        "timeout: must be a number of seconds above 0, not 0",
        'directions: must be maximize or minimize, not "max"',
        "space: t: the range is empty: 3 is larger than 1; swap them",
        "space: density: must be a number with 0 <= density <= 1, not 1.4",
        'space: densty: is no parameter of ties and no key of a recipe; did you mean "density"?',
        "space: weight[5]: the recipe merges 2 models, which are counted from 0",
        "space: ties: is no number; give a list of choices",
        "space: seed: must be a whole number; give a range and a step of whole numbers",
        "seed: must be a whole number from 0 on, not -1",
    ]
    forms = {
        "a": (3, 1),
        "b": (1, 2, 3),
        "c": [],
        "d": [1, 1],
        "e": {"low": 0, "hihg": 1},
        "f": {"low": 0, "high": 1, "log": True},
        "g": {"low": 0, "high": 1, "step": 0.3},
        "h": (0, float("inf")),
        "i": None,
    }
    assert problems(forms) == [
        "space: a: the range is empty: 3 is larger than 1; swap them",
        "space: b: a range is a pair (low, high), not (1, 2, 3); choices are a list",
        "space: c: has no choices; give some, or leave the name out",
        "space: d: the choice 1 is there twice; remove one",
        'space: e: unknown key "hihg"; did you mean "high"?',
        "space: f: a range with log must begin above 0, not at 0",
        "space: g: steps of 0.3 do not lead from 0 to 1",
        "space: h: high must be finite, not inf",
        "space: i: must be a range, a list of choices, or a number, text or switch, not null",
    ]
    assert problems({"merge_method": ["ties", "tise"]}) == [
        'space: merge_method: there is no method "tise"; did you mean "ties"?'
    ]
    assert "cmaes has one objective" in problems(NEAR, sampler="cmaes", directions=["minimize"] * 2)[0]
    assert "the space has choices only" in problems({"elect": ["sum", "count"]}, sampler="cmaes")[0]
    assert problems(NEAR, sampler="tp") == ['sampler: there is no sampler "tp"; did you mean "tpe"?']


SCORES: Mapping[str, tuple[object, str]] = {
    "NaN": (float("nan"), "nan as score; a score must be finite"),
    "text": ("0.5", '"0.5" as score, which is no number'),
    "nothing": (None, "null as score, which is no number"),
    "three": ([1, 2, 3], "3 scores for 1 objective"),
    "another name": ({"scroe": 1}, 'a score "scroe", which is no objective; did you mean "score"?'),
    "a negative error": ((0.5, -1), "-1.0 as the standard error of score, which is never negative"),
}


@pytest.mark.parametrize("name", SCORES)
def test_what_is_no_score_is_an_error_with_the_values_of_the_trial(name: str) -> None:
    returned, said = SCORES[name]
    scores = iter([0.1, returned])
    with pytest.raises(me.SearchError) as caught:
        search(lambda merge: next(scores), {"elect": ["count", "sum"], "density": 0.3})
    (problem,) = caught.value.problems
    assert problem.startswith('trial 1 (density=0.3, elect="') and f"evaluate returned {said}" in problem
    assert problem.endswith("the trials before it are kept, and the same call goes on")


def test_what_a_scorer_raises_is_named_and_chained() -> None:
    def evaluate(merge: me.Merge) -> float:
        raise KeyError("mmlu")

    with pytest.raises(
        me.SearchError, match=r"trial 0 .*: evaluate raised KeyError: 'mmlu' \(test_search.py, line"
    ) as e:
        search(evaluate, NEAR)
    assert isinstance(e.value.__cause__, KeyError)


def test_a_storage_goes_on_with_the_same_search_only(tmp_path: Path) -> None:
    file = tmp_path / "study {1}.db"
    search(near, NEAR, storage=file)
    assert len(search(near, NEAR, storage=str(file), trials=2).trials) == 4  # it has more already

    def refused(space: object = NEAR, **options: Any) -> str:
        with pytest.raises(me.SearchError) as caught:
            search(near, space, **{"storage": file, **options})
        return caught.value.problems[0]

    assert "holds a search with another space (density)" in refused({**NEAR, "density": (0.1, 0.8)})
    assert "holds a search with other directions (score)" in refused(directions="minimize")
    assert "holds a search with another recipe (seed)" in refused(start=TIES + "seed: 7")
    with file.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert "another search is going on in it" in refused()
    (tmp_path / "text.db").write_text("no database" * 999)
    assert "text.db: cannot be used as the storage of a search: " in refused(storage=tmp_path / "text.db")
    assert "no/study.db: cannot be opened: No such file or directory" in refused(
        storage=tmp_path / "no/study.db"
    )
    assert "cannot be used as the storage" in refused(storage="postgresql://nobody@localhost:1/nothing")
