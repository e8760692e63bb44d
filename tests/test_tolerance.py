"""What mergekit ignores: accepted, with a warning that says so. What nobody knows: an error, unless lenient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.methods import METHODS, parameter_names
from merge_engine.recipe import Recipe, load_recipe


@pytest.fixture
def models(save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        save_checkpoint(name, {"model.layers.0.w": torch.randn(8, 4), "norm": torch.randn(8)})


def ties(**keys: object) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 0.5, "density": 0.5},
    } | keys


def merged(recipe: object, lenient: bool = False) -> tuple[dict[str, torch.Tensor], list[str]]:
    result = me.run(recipe, lenient=lenient, backend="reference")  # type: ignore[arg-type]
    assert result.tensors is not None
    return dict(result.tensors), result.warnings


IGNORED = "ignored, as mergekit does; "
LOOSE: dict[str, tuple[object, list[str]]] = {
    "int8_mask at the top": (ties(int8_mask=True), [f"int8_mask: {IGNORED}no result depends on it"]),
    "normalize at the top": (
        ties(normalize=False),
        [f'normalize: {IGNORED}move it into "parameters" to set the parameter'],
    ),
    "padding at the top": (
        ties(pad_to_multiple_of=64),
        [f'pad_to_multiple_of: {IGNORED}move it into "tokenizer" to pad the vocabulary'],
    ),
    "architecture": (
        ties(architecture="Llama"),
        [f"architecture: {IGNORED}tensors are found by their names, whatever the architecture"],
    ),
    "another architecture of a model": (
        ties(models=[{"model": {"model": "a", "override_architecture": "X"}}, {"model": "b"}]),
        [
            f"models[0].model.override_architecture: {IGNORED}tensors are found by their names, whatever the "
            "architecture"
        ],
    ),
    "revision beside model": (
        ties(models=[{"model": "a", "revision": "main"}, {"model": "b", "revision": "v1"}]),
        [
            f'models[0].revision, models[1].revision: {IGNORED}write "model: path@revision" to merge that revision'
        ],
    ),
    "int8_mask of models": (
        ties(models=[{"model": "a", "int8_mask": 1}, {"model": "b"}]),
        [f"models[0].int8_mask: {IGNORED}no result depends on it"],
    ),
    "parameters of other methods": (
        ties(parameters={"weight": 0.5, "density": 0.5, "t": 0.5, "filter_wise": True, "select_topk": 0.1}),
        [
            f"parameters.{key}: {IGNORED}ties has no such parameter"
            for key in ("t", "filter_wise", "select_topk")
        ],
    ),
    "a parameter of other methods for each model": (
        ties(models=[{"model": name, "parameters": {"smooth": 1}} for name in ("a", "b")]),
        [f"models[0].parameters.smooth, models[1].parameters.smooth: {IGNORED}ties has no such parameter"],
    ),
    "lambda of a model": (
        ties(models=[{"model": "a", "parameters": {"lambda": 9}}, {"model": "b"}]),
        [
            f"models[0].parameters.lambda: {IGNORED}it holds for all models at once; move it to the top-level "
            "parameters to use it"
        ],
    ),
    "dtype inside parameters": (
        ties(parameters={"weight": 0.5, "density": 0.5, "dtype": "float16"}),
        [f"parameters.dtype: {IGNORED}ties has no such parameter"],
    ),
    "merge_method twice": (
        yaml.safe_dump(ties()) + "merge_method: ties\n",
        ['line 9: key "merge_method" given twice, with the same value'],
    ),
    "switches as numbers": (ties(parameters={"weight": 0.5, "density": 0.5, "normalize": 1.0}), []),
    "empty parameters": (ties(models=[{"model": "a", "parameters": None}, {"model": "b"}]), []),
    "int8_mask as a parameter": (
        ties(parameters={"weight": 0.5, "density": 0.5, "int8_mask": True}),
        [],
    ),
    "a name": (ties(name="mine"), []),
}


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("what", LOOSE)
def test_what_published_recipes_hold(what: str) -> None:
    recipe, warnings = LOOSE[what]
    expected, none = merged(ties())
    found, said = merged(recipe)
    assert none == []
    assert said == warnings
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("models")
def test_the_output_holds_the_warnings_and_a_recipe_without_what_was_ignored(tmp_path: Path) -> None:
    me.run(ties(int8_mask=True, parameters={"weight": 0.5, "density": 0.5, "t": 1}), "out")
    card = Path("out/README.md").read_text()
    assert "int8_mask: ignored" in card and "parameters.t: ignored" in card
    recipe = load_recipe(Path("out/mergekit_config.yml"))
    assert recipe == load_recipe(ties()) and recipe.remarks == ()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("recipe", "error", "warnings"),
    [
        (
            ties(parameters={"weight": 0.5, "density": 0.5, "lamda": 2}),
            'parameters.lamda: unknown parameter for ties; did you mean "lambda"?',
            [f'parameters.lamda: {IGNORED}no method has such a parameter; did you mean "lambda"?'],
        ),
        (
            ties(base_modl="x"),
            'unknown key "base_modl"; did you mean "base_model"?',
            ['base_modl: no such key, ignored as mergekit does; did you mean "base_model"?'],
        ),
        (
            ties(models=[{"model": "a", "wait": 1}, {"model": "b", "wait": 2}]),
            'unknown key "models[0].wait"; known here: model, parameters, tensors',
            [
                "models[0].wait, models[1].wait: no such key, ignored as mergekit does; known here: model, "
                "parameters, tensors"
            ],
        ),
        (
            yaml.safe_dump(ties(seed=1)) + "seed: 2\n",
            'line 10, column 1: key "seed" given twice, with two values; remove one',
            ['line 10: key "seed" given twice; the last value counts'],
        ),
    ],
)
def test_what_nobody_knows_is_an_error_unless_lenient(
    recipe: object, error: str, warnings: list[str]
) -> None:
    with pytest.raises(me.RecipeError) as caught:
        me.run(recipe)  # type: ignore[arg-type]
    assert caught.value.problems[0] == error
    found, said = merged(recipe, lenient=True)
    expected, _ = merged(ties(seed=2))
    assert said == warnings
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lenient_means_lenient_with_keys_only() -> None:
    with pytest.raises(me.RecipeError) as caught:
        load_recipe(ties(typo=1, seed=-1, models=[]), lenient=True)
    assert len(caught.value.problems) == 2
    with pytest.raises(me.OptionError, match="lenient: must be True or False"):
        me.plan(ties(), lenient=1)  # type: ignore[arg-type]


def test_the_method_is_reported_with_the_keys() -> None:
    with pytest.raises(me.RecipeError) as caught:
        me.plan(ties(merge_method="tise", base_modl="x", parameters={"weight": None}))
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "parameters.weight",
        'unknown key "base_modl"; did you mean "base_model"?',
        "merge_method",
    ]


def test_names_of_parameters_come_from_the_methods() -> None:
    ours = {parameter.name for method in METHODS.values() for parameter in method.parameters}
    assert ours < parameter_names()


KEYS = st.dictionaries(
    st.sampled_from(["int8_mask", "normalize", "architecture", "revision", "pad_to_multiple_of"]),
    st.integers() | st.booleans() | st.none() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
)


@given(KEYS, st.lists(KEYS, min_size=2, max_size=2))
@settings(max_examples=50)
def test_ignored_keys_in_any_places_change_nothing(top: dict[str, Any], own: list[dict[str, Any]]) -> None:
    models = [{"model": name} | keys for name, keys in zip("ab", own, strict=True)]
    found = load_recipe(ties(models=models) | top)
    assert found.to_yaml() == load_recipe(ties()).to_yaml()
    names = [line.split(": ")[0].split(", ")[0].rpartition(".")[2] for line in found.remarks]
    assert set(names) == {key for keys in (top, *own) for key in keys}


def test_a_recipe_without_some_settings() -> None:
    slices = [{"sources": [{"model": "a", "parameters": {"t": 1, "weight": 2}}], "parameters": {"t": 3}}]
    raw = {"merge_method": "x", "slices": slices, "parameters": {"t": 4, "u": 5}}
    recipe = load_recipe(raw)
    less = recipe.without(
        {"slices[0].sources[0].parameters": {"t"}, "slices[0].parameters": {"t"}, "parameters": {"u"}}
    )
    assert isinstance(less, Recipe) and less.slices is not None and recipe.slices is not None
    assert less.slices[0].sources[0].parameters == {"weight": 2}
    assert (less.slices[0].parameters, less.parameters) == ({}, {"t": 4})
    assert recipe.slices[0].parameters == {"t": 3}
