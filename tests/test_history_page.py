"""The page of a search: the front is the front, every trial is in the table, no text becomes markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import EVIL, Reader, read

import merge_engine as me
from merge_engine.report import write_history
from merge_engine.report.history_data import Objective, SearchHistory, Trial

ACCURACY = Objective("accuracy", "maximize")
PERPLEXITY = Objective("perplexity", "minimize")


def history(*trials: Trial, objectives: tuple[Objective, ...] = (ACCURACY,), **given: Any) -> SearchHistory:
    return SearchHistory(("density", "method"), objectives, trials, **given)


def page_of(shown: SearchHistory, folder: Path) -> tuple[str, Reader]:
    text = write_history(shown, folder / "history.html").read_text(encoding="utf-8")
    return text, read(text)


TRIALS = (
    Trial(0, {}, (0.5,), (0.03,), seconds=1234.5),
    Trial(1, {"density": 0.123456, "method": "ties"}, (0.62,), (0.04,), seconds=2),
    Trial(2, {"density": 0.9, "method": "linear"}, state="refused", reason=f"linear has no density {EVIL}"),
    Trial(3, {"density": 0.5}, (0.4,), (None,)),
)


@given(
    st.lists(st.sampled_from(["maximize", "minimize"]), min_size=1, max_size=3).flatmap(
        lambda directions: st.tuples(
            st.just(directions),
            st.lists(
                st.tuples(*[st.sampled_from([-1.0, 0.0, 1.0, 2.0, float("nan")])] * len(directions)),
                max_size=12,
            ),
        )
    )
)
def test_the_front_is_what_no_trial_beats(drawn: tuple[list[Any], list[tuple[float, ...]]]) -> None:
    directions, scores = drawn
    objectives = tuple(Objective(str(i), direction) for i, direction in enumerate(directions))
    shown = history(*(Trial(i, {}, each) for i, each in enumerate(scores)), objectives=objectives)
    gains = {
        i: [s if d == "maximize" else -s for s, d in zip(each, directions, strict=True)]
        for i, each in enumerate(scores)
        if all(s == s for s in each)
    }
    beaten = {
        i
        for i, mine in gains.items()
        for other in gains.values()
        if other != mine and all(o >= m for o, m in zip(other, mine, strict=True))
    }
    assert {trial.number for trial in shown.front} == set(gains) - beaten


def test_every_trial_has_its_row_and_the_best_is_compared_with_the_recipe_without_changes(
    tmp_path: Path,
) -> None:
    importance = {"accuracy": {"method": 0.25, "density": 0.75}}
    text, reader = page_of(history(*TRIALS, baseline=0, importance=importance), tmp_path)
    assert reader.rows == [
        ["trial", "density", "method", "accuracy", "seconds"],
        ["0 (without changes)", "", "", "0.500 ± 0.030", "1,234.5"],
        ["1 (best)", "0.1235", "ties", "0.620 ± 0.040", "2.0"],
        [f"2 (refused)linear has no density {EVIL}", "0.9", "linear", "–", "–"],
        ["3", "0.5", "", "0.4", "–"],
    ]
    # 0.62 - 0.5, and the root of 0.04² + 0.03²
    assert "better by 0.120 ± 0.050, 2.4 standard errors" in text
    assert "Bars: density 75.0%, method 25.0%" in reader.alternatives
    assert reader.headings == [
        "Best score so far",
        "Parameters and scores",
        "Importance of the parameters",
        "All trials",
    ]


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    third = Objective("speed", "maximize")
    trials = [Trial(i, {"density": i / 8, "method": "ties"}, (i % 3, i % 4, i % 5)) for i in range(8)]
    for count, pairs in ((2, 1), (3, 3)):
        cut = [Trial(t.number, t.values, t.scores[:count]) for t in trials]
        shown = history(*cut, objectives=(ACCURACY, PERPLEXITY, third)[:count], baseline=1)
        _, reader = page_of(shown, tmp_path)
        assert sum(text.startswith("Points: ") for text in reader.alternatives) == pairs
        assert {row[0].split()[0] for row in reader.rows if "(front)" in row[0]} == {
            str(t.number) for t in shown.front
        }


@pytest.mark.parametrize("trials", [(), TRIALS[2:3], TRIALS[:1], (Trial(0, {}, (float("nan"),)),)])
def test_a_search_that_has_hardly_begun(trials: tuple[Trial, ...], tmp_path: Path) -> None:
    text, reader = page_of(history(*trials, baseline=0), tmp_path)
    assert ("No trial has a score" in text) == (not any(trial.is_scored for trial in trials))
    assert len(reader.rows) == 1 + len(trials)


def test_names_stay_text_and_the_same_history_gives_the_same_bytes(tmp_path: Path) -> None:
    evil = SearchHistory(
        (EVIL, "b"),
        (Objective(EVIL, "minimize"), Objective(f"{EVIL} 2", "maximize")),
        tuple(Trial(i, {EVIL: f"{EVIL}{i}", "b": True}, (i, i * i), (0.1, None)) for i in range(4)),
        importance={EVIL: {EVIL: 1.0}},
    )
    first, _ = page_of(evil, tmp_path)
    assert "&lt;script&gt;" in first and page_of(evil, tmp_path)[0] == first


def test_a_scale_is_logarithmic_only_if_the_space_is(tmp_path: Path) -> None:
    trials = [Trial(i, {"density": 0.0009 * 10**i}, (1.0 + i,)) for i in range(3)]
    for shown in (history(*trials), history(*trials, logarithmic=("density",))):
        text, _ = page_of(shown, tmp_path)
        assert (">logarithmic<" in text) == bool(shown.logarithmic)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(me.OutputError, match=r"nowhere/history\.html: cannot be written"):
        write_history(history(*TRIALS), tmp_path / "nowhere" / "history.html")


def test_the_page_follows_the_reader_into_the_dark_and_onto_paper(tmp_path: Path) -> None:
    text, _ = page_of(history(*TRIALS), tmp_path)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    style = text[text.index("<style>") : text.index("</style>")]
    replaced = set(re.findall(r'\[style\*="(?:fill|stroke): (#\w{6})"\]', style))
    drawn = set(re.findall(r"(?:fill|stroke): (#\w{6})", text[text.index("</style>") :]))
    assert replaced <= drawn  # the colours that the style replaces are those of the plots
