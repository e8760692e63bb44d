"""Changes of a recipe by name: what they mean, and the words for names and values that do not exist."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.errors import RecipeError
from merge_engine.methods import find_method
from merge_engine.recipe import Recipe, load_recipe
from merge_engine.recipe.changes import changed, parse_change

TIES = """\
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/a
    parameters: {density: 0.5, weight: 1}
  - model: org/b
    parameters: {density: {filter: mlp, value: 0.3}}
parameters: {weight: 0.5}
dtype: bfloat16
"""
SLICES = """\
merge_method: ties
base_model: org/base
slices:
  - sources: [{model: org/a, layer_range: [0, 2]}, {model: org/b, layer_range: [0, 2]}]
    parameters: {density: 0.5}
  - sources: [{model: org/b, layer_range: [2, 4], parameters: {density: 0.1}}, {model: org/a, layer_range: [2, 4]}]
"""


def change(recipe: Recipe | str, **changes: object) -> dict[str, Any]:
    return changed(load_recipe(recipe), changes, find_method).to_plain()


def problems(recipe: Recipe | str, **changes: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        change(recipe, **changes)
    return caught.value.problems


def test_a_parameter_replaces_what_models_and_slices_say() -> None:
    plain = change(TIES, density=0.2)
    assert plain["parameters"] == {"weight": 0.5, "density": 0.2}
    assert plain["models"][1:] == [{"model": "org/a", "parameters": {"weight": 1}}, {"model": "org/b"}]
    plain = change(SLICES, density=0.2)
    assert plain["parameters"] == {"density": 0.2}
    assert "parameters" not in plain["slices"][0] and "parameters" not in plain["slices"][1]["sources"][0]


def test_a_list_gives_one_value_a_model_and_the_base_does_not_count() -> None:
    plain = change(TIES, density=[0.1, [0.2, 0.4]])
    assert plain["models"][0] == {"model": "org/base"}
    assert plain["models"][1]["parameters"] == {"weight": 1, "density": 0.1}
    assert plain["models"][2]["parameters"] == {"density": [0.2, 0.4]}
    plain = change(SLICES, density=[0.1, 0.2])
    first, second = (each["sources"] for each in plain["slices"])
    assert [each["parameters"]["density"] for each in (*first, *second)] == [0.1, 0.2, 0.2, 0.1]


def test_a_list_for_a_parameter_of_all_models_is_a_gradient() -> None:
    slerp = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0}}
    assert change(load_recipe(slerp), t=[0, 1])["parameters"] == {"t": [0, 1]}


def test_a_position_is_one_model_whatever_the_order_of_the_changes() -> None:
    for order in (["density", "density[1]"], ["density[1]", "density"]):
        plain = change(TIES, **{name: 0.9 if name == "density" else 0.2 for name in order})
        assert plain["parameters"]["density"] == 0.9
        assert plain["models"][2]["parameters"] == {"density": 0.2}


def test_keys_and_none() -> None:
    recipe = load_recipe(
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\nint8_mask: true\n"
    )
    new = changed(recipe, {"merge_method": "linear", "seed": 7, "dtype": "float32"}, find_method)
    assert (new.seed, new.dtype, new.remarks) == (7, "float32", recipe.remarks)
    assert "dtype" not in change(TIES, dtype=None)
    assert change(TIES, weight=None)["models"][1]["parameters"] == {"density": 0.5}


def test_no_change_is_the_same_recipe() -> None:
    recipe = load_recipe(TIES)
    assert changed(recipe, {}, find_method) == recipe


def test_parameters_are_those_of_the_new_method() -> None:
    assert (
        change(TIES, merge_method="task_arithmetic", density=None, **{"lambda": 2})["parameters"]["lambda"]
        == 2
    )
    assert problems(TIES, merge_method="linear", density=0.5)[0].startswith(
        "density: is no parameter of linear"
    )


def test_every_problem_has_one_line() -> None:
    assert problems(
        TIES,
        densty=0.2,
        density=2,
        **{"weight[2]": 1, "normalize[0]": True},
        seed=-1,
        lambd=1,
        sign_slack=[1],
    ) == [
        'densty: is no parameter of ties and no key of a recipe; did you mean "density"?',
        'lambd: is no parameter of ties and no key of a recipe; did you mean "lambda"?',
        "seed: must be greater than or equal to 0, not -1",
        "density: must be a number with 0 <= density <= 1, not 2",
        "sign_slack: 1 value for 2 models; give one for each, or one for all",
        "weight[2]: the recipe merges 2 models, which are counted from 0",
        "normalize[0]: holds for all models at once; write normalize",
    ]
    assert problems(TIES, density={"value": []}) == [
        "density.value: is an empty list; give one value or leave the key out"
    ]
    assert problems(TIES, models=[]) == ["models: cannot be changed; write another recipe"]
    assert problems(TIES, merge_method="tis")[0].startswith('merge_method: there is no method "tis"')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("density=0.2,0.5", ("density", [0.2, 0.5])),
        ("weight[1]=1", ("weight[1]", [1])),
        ("weight=[0.5, 0.5],[1,0]", ("weight", [[0.5, 0.5], [1, 0]])),
        ("normalize=true,false", ("normalize", [True, False])),
        ("dtype=bfloat16,null", ("dtype", ["bfloat16", None])),
        ("density={filter: mlp, value: 0.5}", ("density", [{"filter": "mlp", "value": 0.5}])),
    ],
)
def test_changes_of_the_command_line(text: str, expected: tuple[str, list[object]]) -> None:
    assert parse_change(text) == expected


@pytest.mark.parametrize(
    "text", ["density", "=1", "density=", "density=[", "a=1]\n---\n[2", "a=" + "[" * 10_000, "a=]: ["]
)
def test_texts_that_are_no_changes(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_change(text)
    assert len(caught.value.problems) == 1


@given(st.text())
def test_any_text_is_a_change_or_one_line(text: str) -> None:
    try:
        name, values = parse_change(text)
    except RecipeError as error:
        assert len(error.problems) == 1
    else:
        assert name and isinstance(values, list)
