"""Recipes that attack the reader: each is refused in a few short lines, in little time, and nothing else is raised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.errors import RecipeError
from merge_engine.methods import find_method
from merge_engine.recipe import load_recipe, resolvers

RECIPE = "merge_method: ties\nmodels: [{model: a}]\n"


def lines_of(source: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    lines = str(caught.value).split("\n")
    assert len(lines) <= 21 and max(map(len, lines)) < 500
    return lines


TAGS = [
    "bool",
    "int",
    "float",
    "timestamp",
    "binary",
    "omap",
    "pairs",
    "set",
    "map",
    "seq",
    "null",
    "merge",
    "str",
    "x",
]
PLACES = [
    "{}",
    "{}: 1",
    "merge_method: {}",
    "models: [{}]",
    "models: [{{model: {}}}]",
    "parameters: {{weight: [1, {}]}}",
]


@given(
    st.sampled_from(TAGS),
    st.sampled_from(["''", "maybe", "x", "[1]", "{a: 1}", "é", "0x", "1:a", "_", ".", "2024-99-99", "~"]),
    st.sampled_from(PLACES),
)
def test_values_that_a_tag_does_not_fit(tag: str, value: str, place: str) -> None:
    try:
        load_recipe(f"seed: 1\n{place.format(f'!!{tag} {value}')}\n")
    except RecipeError as error:
        assert "\n" in str(error) or str(error)
    else:
        raise AssertionError("no recipe has neither a method nor models")


@pytest.mark.parametrize(
    ("tag", "value"), [("bool", "maybe"), ("int", "''"), ("float", "''"), ("timestamp", "x")]
)
def test_their_place_is_named(tag: str, value: str) -> None:
    shown = '""' if value == "''" else f'"{value}"'
    [line] = lines_of(f"{RECIPE}seed: !!{tag} {value}\n")
    assert line == f"line 3, column 7: {shown} is no {tag}; write it as text, in quotes, or leave the tag out"


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = [
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "seed",
    "arithmetic",
    "allow",
    "name",
]


@given(st.dictionaries(st.sampled_from(KEYS), anything) | anything)
def test_mappings_of_anything(raw: Any) -> None:
    try:
        recipe = load_recipe(raw)
    except RecipeError:
        return
    assert load_recipe(recipe.to_yaml().encode().decode()).to_yaml() == recipe.to_yaml()


@given(
    st.text(
        st.sampled_from("merge_method: ties\nmodels[]{}&*!|>-'\"%@`#,?<\t\0\x85\ufeff\ud800é")
        | st.characters()
    )
)
def test_texts_of_anything(text: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(text + "\n")


@pytest.mark.parametrize("raw", [None, 3, 1.5, True, b"merge_method: x", ["a"], ("a", 1), {"a"}, object()])
def test_what_is_no_recipe(raw: object) -> None:
    [line] = lines_of(raw)
    assert line.startswith("a recipe is a file, YAML text or a map of keys to values, not ")


def bomb(levels: int = 20) -> str:
    """Nine times nine times nine: a list of lists, each of which is an alias."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def merge_bomb(levels: int = 20) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


MANY = 20_000
HUGE: dict[str, str] = {
    "aliases as models": bomb() + "merge_method: x\nmodels: *a19\n",
    "aliases as a model": bomb() + "merge_method: x\nmodels: [{model: *a19}, *a19]\n",
    "aliases as a setting": bomb() + RECIPE + "parameters: {weight: *a19}\n",
    "aliases as a method": bomb() + "merge_method: *a19\nmodels: [{model: a}]\n",
    "merged maps": merge_bomb() + RECIPE,
    "itself": "&a {merge_method: ties, models: *a}\n",
    "itself merged": "&a {<<: *a}\n",
    "deep list": "a: " + "[" * 2_000_000,
    "deep map": "{a: " * 500_000,
    "deep block": "- " * 500_000,
    "long key": f"? {'x' * 9_000_000}\n: 1\n{RECIPE}",
    "long value": f"{RECIPE}dtype: {'x' * 9_000_000}\n",
    "long number": f"{RECIPE}seed: {'9' * 9_000_000}\n",
    "long hexadecimal number": f"{RECIPE}seed: 0x{'f' * 9_000_000}\n",
    "long weight": f"{RECIPE}parameters: {{weight: 0x{'f' * 9_000_000}}}\n",
    "unknown keys": RECIPE + "".join(f"k{i}: 1\n" for i in range(MANY)),
    "bad gradient": f"{RECIPE}parameters: {{weight: [{', '.join(['~'] * MANY)}]}}\n",
    "parameters": f"{RECIPE}parameters: {{{', '.join(f'k{i}: 1' for i in range(MANY))}}}\n",
    "models": f"merge_method: x\nmodels: [{', '.join(['3'] * MANY)}]\n",
    "path": f"merge_method: x\nmodels: [{{model: {'x' * 5000}@}}]\n",
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_recipes(case: str) -> None:
    start = time.process_time()
    lines_of(HUGE[case])
    assert time.process_time() - start < 10  # at most 3 s on a quiet machine


def test_many_problems_are_counted() -> None:
    assert lines_of(HUGE["unknown keys"])[-1] == "19,980 more problems"
    assert lines_of(HUGE["bad gradient"])[-1] == "19,980 more problems"
    assert lines_of(HUGE["parameters"]) == ["parameters: must have at most 100 entries, not 20,000"]


def test_many_wrong_values_are_counted() -> None:
    recipe = load_recipe(
        {"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"weight": ["x"] * 1000}}
    )
    with pytest.raises(RecipeError) as caught:
        resolvers(recipe, find_method("ties").parameters)
    assert str(caught.value).endswith("\n980 more problems")


def test_a_long_gradient_is_read() -> None:
    recipe = load_recipe(f"{RECIPE}parameters: {{weight: [{', '.join(['0.5'] * MANY)}]}}\n")
    assert recipe.parameters["weight"] == [0.5] * MANY


def test_half_a_character() -> None:
    for raw in (
        f'{RECIPE}dtype: "\\uD800"\n',
        f"{RECIPE}\ud800: 1\n",
        {"merge_method": "\ud800", "models": [{"model": "a"}]},
        {"merge_method": "x", "models": [{"model": "a\udcff"}]},
        {
            "merge_method": "x",
            "models": [{"model": "a", "parameters": {"w": {"filter": "\ud800", "value": 1}}}],
        },
    ):
        [line] = lines_of(raw)
        assert "character" in line or "\\ud800" in line  # YAML's reader in Python takes the first one


def test_paths_that_no_file_has(tmp_path: Path) -> None:
    assert lines_of(Path("a\0b.yaml"))[0].endswith("cannot read the recipe: no file has such a name")
    assert lines_of(Path("\ud800.yaml"))[0].endswith("cannot read the recipe: no file has such a name")
    [line] = lines_of(tmp_path / ("x" * 5000))
    assert line.endswith("...: cannot read the recipe: File name too long")


def test_libyaml_is_used_where_it_is_there() -> None:
    """With it a recipe of 10 MB takes a second; without it, a minute."""
    from merge_engine.recipe.loading import Parser

    assert issubclass(Parser, yaml.CSafeLoader) == yaml.__with_libyaml__


# --- what published recipes hold


def test_keys_that_no_result_depends_on_are_ignored() -> None:
    recipe = load_recipe(f"{RECIPE}int8_mask: true\n")
    assert recipe.remarks == ("int8_mask: ignored, as mergekit does; no result depends on it",)
    assert recipe.to_yaml() == load_recipe(RECIPE).to_yaml()


@pytest.mark.parametrize(("typed", "meant"), [("TIES", "ties"), ("Dare_Ties", "dare_ties"), ("SLERP", None)])
def test_a_method_in_capitals(typed: str, meant: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        find_method(typed)
    assert str(caught.value).startswith(f'merge_method: there is no method "{typed}"; ')
    assert str(caught.value).endswith(f'did you mean "{meant}"?') == (meant is not None)


def test_keys_in_capitals() -> None:
    assert lines_of(f"{RECIPE}BASE_MODEL: x\n") == ['unknown key "BASE_MODEL"; did you mean "base_model"?']
