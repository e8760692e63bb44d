"""The search of the low-resource example: its halves, its errors, its fronts, and that a seed gives the same trials."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import merge_engine as me
from examples.low_resource import search, search_tables, settings, tables
from examples.low_resource.comparing import Judged, best_within, compared
from examples.low_resource.errors import ExampleError
from examples.low_resource.evaluate import answered, bits, by_length, in_batches
from examples.low_resource.fronts import Measured, hypervolume, resampled, weights_of_texts
from examples.low_resource.halves import BITS, ENGLISH, TAMIL, Half, choosing, half_of, judging
from examples.low_resource.merging import Variant, recipe_for
from examples.low_resource.split import same
from examples.low_resource.tasks import every_held_out_item
from examples.low_resource.training import load_model

REFERENCE = (4.0, 0.0)
points = st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 5)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def session() -> me.Session:
    trio = search.TRIO
    return me.load(trio["base"], [trio["CT"], trio["SFT"]])


@given(points)
def test_the_hypervolume_is_the_number_of_unit_squares_that_a_point_dominates(
    points: list[tuple[int, int]],
) -> None:
    squares = {
        (x, y) for tamil, english in points for x in range(tamil, int(REFERENCE[0])) for y in range(english)
    }
    tamil, english = np.array(points, float).T
    assert hypervolume(tamil, english, REFERENCE) == len(squares)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=40))
def test_the_error_of_a_plain_mean_is_the_usual_one(values: list[int]) -> None:
    found = Measured(np.array(values, float), np.ones(len(values)))
    assert found.value == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)


def test_resampled_texts_vary_by_the_standard_error() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 60, 200).astype(float)
    measured = [Measured(sizes * rate + rng.normal(0, 5, 200), sizes) for rate in (0.5, 0.9)]
    found = resampled(measured, weights_of_texts(200, 4000, rng))
    assert found[0] == pytest.approx([each.value for each in measured])
    assert found[1:].std(0) == pytest.approx([each.error for each in measured], rel=0.1)


def test_no_sentence_both_chooses_and_judges() -> None:
    chooses, judges = choosing(10_000, 10_000), judging(10_000)
    sentences = [
        {same(item.sentence) for items in half.items.values() for item in items} for half in (chooses, judges)
    ]
    texts = [{same(text) for text in half.texts} for half in (chooses, judges)]
    assert not sentences[0] & sentences[1] and not texts[0] & texts[1]
    every = [len(items) for key, items in every_held_out_item().items() if key[0] == "english"]
    halves = [len(half.items[ENGLISH]) for half in (chooses, judges)]
    assert sum(halves) == sum(every) and max(halves) < 0.6 * sum(every)
    assert all(half_of(text) == "judging" for text in judging(7).texts)


def test_a_half_measures_what_the_models_scores_are() -> None:
    half = Half(choosing(9, 5).texts, {ENGLISH: choosing(9, 5).items[ENGLISH]})
    model = load_model(search.TRIO["SFT"])
    found = half.measured(model)
    with torch.inference_mode():
        right = answered(model, in_batches(by_length(half.items[ENGLISH])))
        alone = [float(bits(model, [text])) for text in half.texts]
    assert found[ENGLISH].value == pytest.approx(float(right.float().mean()))
    assert len(found[ENGLISH].of) == 9 and found[ENGLISH].of.sum() == len(right)
    assert found[BITS].found == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("method", settings.SEARCH_SPACES)
@pytest.mark.parametrize("alone", ["CT", "SFT"])
def test_every_space_holds_both_models_alone(session: me.Session, method: str, alone: str) -> None:
    space = settings.SEARCH_SPACES[method]
    whole = {"weight[0]": float(alone == "CT"), "weight[1]": float(alone == "SFT")}
    whole |= {"density": 1.0, "normalize": True} if "density" in space else {}
    whole |= {name: 0.0 for name in space if "slack" in name}
    merge = session.merge(recipe_for(Variant(method), settings.MODELS, search.CT), **whole)
    expected = me.load(search.TRIO[alone], [search.TRIO[alone]]).merge("linear").tensors()
    assert whole.keys() == space.keys()
    for name, tensor in merge.tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.01, atol=2e-3)


def test_a_seed_gives_the_same_trials_and_a_page(session: me.Session, tmp_path: Path) -> None:
    half = choosing(6, 3)
    one, again, other = (
        search.searched(session, "ties_elect", half, trials=4, seed=seed, output=output)
        for seed, output in ((3, tmp_path), (3, None), (4, None))
    )
    assert [(t.values, t.scores, t.errors) for t in one.trials] == [
        (t.values, t.scores, t.errors) for t in again.trials
    ]
    assert one.trials[1].values != other.trials[1].values
    assert len(one.trials) == 5 and one.trials[0].values["sign_slack[1]"] == 4
    assert (tmp_path / "history.html").is_file() and len(list(tmp_path.glob("front-*.yaml"))) == len(
        one.front
    )
    judges = Half(
        half.texts, {**half.items, TAMIL: half.items[ENGLISH][:4]}
    )  # the half that chose: the same scores
    judged = search.judged(session, one, judges, load_model(search.TRIO["base"]))
    for each in judged:
        assert {name: each.judged[name].value for name in each.chosen} == pytest.approx(each.chosen)
    assert [each.chosen[BITS] for each in judged] == sorted(each.chosen[BITS] for each in judged)


def planted(accuracies: list[float], rng: np.random.Generator) -> list[Judged]:
    """A front over 300 texts: each recipe takes 0.1 bits more than the one before it."""
    front = []
    for number, accuracy in enumerate(accuracies):
        chosen = {BITS: 0.65 + 0.1 * number, ENGLISH: accuracy}
        right = (np.arange(300) < 300 * accuracy).astype(float)
        judged = {
            BITS: Measured(np.full(300, chosen[BITS]), np.ones(300)),
            ENGLISH: Measured(rng.permutation(right), np.ones(300)),
            TAMIL: Measured(right, np.ones(300)),
        }
        front.append(Judged(number, {}, chosen, judged))
    return front


def test_fronts_are_compared_on_the_same_samples() -> None:
    rng = np.random.default_rng(0)
    plain, better = planted([0.3, 0.4, 0.5], rng), planted([0.4, 0.5, 0.6], rng)
    found = compared({"task_arithmetic": [plain], "ties": [plain], "ties_elect": [better]})
    areas = found["hypervolume"]
    assert areas["ties"]["minus task_arithmetic"] == [0, 0]
    value, error = areas["ties_elect"]["minus task_arithmetic"]
    assert value == pytest.approx(0.1 * 0.45) and 0 < error < 0.02
    by_budget = {each.pop("bits per byte"): each for each in found["budgets"]}
    assert by_budget[0.7]["ties_elect"][ENGLISH]["value"][0] == pytest.approx(0.4)
    assert by_budget[1.0]["ties"][ENGLISH]["value"][0] == pytest.approx(0.5)
    lucky = compared({"task_arithmetic": [plain, plain], "ties": [plain, better]})["hypervolume"]["ties"]
    assert lucky["minus task_arithmetic"][1] > 0.02  # seeds that differ show in the error


def test_nothing_is_chosen_beyond_its_budget() -> None:
    front = [{BITS: 0.7, ENGLISH: 0.3}, {BITS: 0.8, ENGLISH: 0.4}, {BITS: 0.9, ENGLISH: 0.9}]
    assert best_within(0.8, front) == 1
    assert best_within(0.6, front) is None


def test_trials_of_other_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / search.MARKER).write_text(json.dumps({"identity": "of other texts"}))
    monkeypatch.setattr(search, "OUT", tmp_path)
    with pytest.raises(ExampleError, match="remove it to search anew"):
        search.run(1, [0])


def test_the_tables_of_the_page_are_those_of_the_search() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    found = {name: make(search_tables.load_search()) for name, make in search_tables.TABLES.items()}
    assert all(f"<!-- table {name} -->" in page for name in found)
    assert tables.filled(page, found) == page
