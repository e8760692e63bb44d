"""Texts for messages: a few of many names, and the nearest known name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.recipe.problems import suggestion
from merge_engine.text import did_you_mean, some

NAMES = st.lists(st.text("abc", min_size=1, max_size=8), unique=True)


@given(NAMES)
def test_some_names_five_and_counts_the_rest(names: list[str]) -> None:
    text = some(names)
    shown, _, rest = text.partition(" and ")
    assert shown == ", ".join(names[:5])
    assert rest == (f"{len(names) - 5} more" if len(names) > 5 else "")


@given(st.text("abcd", max_size=8), NAMES)
def test_only_a_known_name_is_meant(name: str, known: list[str]) -> None:
    assert did_you_mean(name, known) in {"", *(f'; did you mean "{other}"?' for other in known)}
    if name in known:
        assert did_you_mean(name, known) == f'; did you mean "{name}"?'


def test_the_nearest_is_meant_if_it_is_near() -> None:
    assert did_you_mean("wieght", ["height", "weight"]) == '; did you mean "weight"?'
    assert did_you_mean("seed", ["weight"]) == ""
    assert did_you_mean("weigh", ["weight"], cutoff=0.99) == ""
    assert did_you_mean("weigh", ["weight"], quoted=str.upper) == "; did you mean WEIGHT?"


def test_where_none_is_near_all_are_named() -> None:
    assert suggestion("seed", ["weight", "lambda"]) == "; known here: lambda, weight"
    assert suggestion("seed", []) == ""
    with pytest.raises(me.RecipeError, match='there is no method "average"; known here: breadcrumbs, '):
        me.run({"merge_method": "average", "models": [{"model": "a"}]})
