"""Vectors of mergenetic: their recipes mean what the numbers say, and are those of its mergers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import answering
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import merge_engine as me
from merge_engine.integrations.mergenetic import Form, SessionMerger
from merge_engine.methods import find_method
from merge_engine.recipe import load_recipe, resolvers

METHODS = {
    "LinearMerger": "linear",
    "TaskArithmeticMerger": "task_arithmetic",
    "DareTaskArithmeticMerger": "dare_linear",
    "TiesMerger": "ties",
    "TiesDareMerger": "dare_ties",
}


@st.composite
def forms(draw: st.DrawFn) -> Form:
    merger = draw(st.sampled_from([*METHODS, "SlerpMerger"]))
    models = [f"model{i}" for i in range(1 if merger == "SlerpMerger" else draw(st.integers(1, 4)))]
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    ranges = draw(st.sampled_from([None, ([0, 6], [2, 8])])) if merger == "SlerpMerger" else None
    return Form(merger, models, None if merger == "LinearMerger" else "base", dtype, ranges)


def vectors(form: Form) -> st.SearchStrategy[Any]:
    return arrays("float64", form.variables, elements=st.floats(0, 1), unique=True)


@given(forms(), st.data())
@settings(max_examples=60)
def test_a_model_has_its_numbers(form: Form, data: st.DataObject) -> None:
    vector = data.draw(vectors(form))
    recipe = form.recipe(vector)
    assert recipe == form.recipe(vector.tolist()) == form.recipe(torch.tensor(vector))
    assert recipe.dtype == form.dtype and (recipe.base_model is None) == (form.base_model is None)
    [values] = resolvers(recipe, find_method(recipe.merge_method).parameters)
    if form.merger == "SlerpMerger":
        for part, gradient in (("self_attn", vector[:5]), ("mlp", vector[5:10]), ("norm", vector[10:])):
            t = data.draw(st.floats(0, 1))
            expected = np.interp(t * (len(gradient) - 1), np.arange(len(gradient)), gradient)
            found = values.for_tensor(f"layers.3.{part}.weight", t)["t"]
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-300)
        return
    assert recipe.merge_method == METHODS[form.merger]
    for i, model in enumerate(form.models):
        position = [str(each) for each in recipe.stacks.models].index(str(model))
        found = values.for_model(position, "w", 0.0)
        assert found["weight"] == vector[i]
        if "Ties" in form.merger:
            assert found["density"] == vector[len(form.models) + i]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("TiesMergr", ["a"], "b"), ['merger: mergenetic has no "TiesMergr"; did you mean "TiesMerger"?']),
        (("TiesMerger", [], None), [
            "models: must be a list of models, not []",
            "base_model: missing, but TiesMerger needs one",
        ]),
        (("LinearMerger", "a", "b"), [
            'models: must be a list of models, not "a"',
            "base_model: LinearMerger merges no base; leave it out, or list it in models",
        ]),
        (("SlerpMerger", ["a", "b"], "c"), ["models: SlerpMerger merges one model with its base, not 2"]),
        (("TiesMerger", ["a"], "b", None, ([0, 1], [0, 1])), [
            "layer_ranges: only SlerpMerger has them; leave them out"
        ]),
    ],
)  # fmt: skip
def test_a_wrong_form_says_what_is_wrong(given: tuple[Any, ...], said: list[str]) -> None:
    with pytest.raises(me.OptionError) as caught:
        Form(*given)
    assert caught.value.problems == said


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        ([0.5] * 3, "vector: must have 4 numbers for TiesMerger, not 3"),
        (np.ones((2, 2)), "vector: must have 4 numbers for TiesMerger, not 2 x 2"),
        ([0.5, float("nan"), 1, 1], "vector[1]: must be a finite number, not nan"),
        ("0.5", 'vector: must be an array of numbers, not "0.5"'),
    ],
)
def test_a_wrong_vector_says_what_is_wrong(vector: object, said: str) -> None:
    with pytest.raises(me.RecipeError) as caught:
        Form("TiesMerger", ["a", "b"], "base").recipe(vector)
    assert caught.value.problems == [said]


class Merger:
    """What the problems of mergenetic need of a merger, as its own mergers have it."""

    def __init__(self, form: Form, folder: Path):
        self.form = form
        self.path_to_store_yaml = folder / "config.yaml"
        self.path_to_store_merged_model = folder / "merged"

    def create_individual_configuration(self, x: Any) -> Path:
        self.path_to_store_yaml.write_text(self.form.recipe(x).to_yaml())
        return self.path_to_store_yaml


def test_a_problem_loads_what_a_plain_run_writes(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(6, 9, generator=generator) for name in ("a.weight", "b.weight")}
        folders.append(save_checkpoint(f"model{seed}", tensors))
    form = Form("TiesMerger", folders[1:], folders[0], "bfloat16")
    with me.load(folders[0], folders[1:], device="cpu") as session:
        merger = SessionMerger(Merger(form, tmp_path), session)
        for vector in ([0.4, 0.6, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4]):  # each replaces the one before
            made = merger.merge_model_from_configuration(merger.create_individual_configuration(vector))
            assert made == tmp_path / "merged"
            plain = tmp_path / f"plain{vector[0]}"
            me.run(form.recipe(vector), plain)
            name = "model.safetensors"
            assert (made / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.oracle
def test_recipes_are_those_of_mergenetic() -> None:
    with answering("mergenetic_oracle.py") as ask:

        @given(forms(), st.data())
        @settings(max_examples=60)
        def same(form: Form, data: st.DataObject) -> None:
            vector = data.draw(vectors(form))
            their: dict[str, Any] = {"path_to_base_model": form.base_model or "base", "dtype": form.dtype}
            if form.merger == "SlerpMerger":
                base, model = form.layer_ranges or ([0, 8], [0, 8])
                their |= {"path_to_model_1": form.models[0]}
                their |= {"layer_range_base_model": base, "layer_range_model_1": model}
            else:
                their |= {"model_paths": form.models}
            answer = ask({"merger": form.merger, "given": their, "vector": vector.tolist()})
            plain = load_recipe(answer["recipe"]).to_plain()
            if (
                form.merger == "SlerpMerger" and form.layer_ranges is None
            ):  # all layers: the same as whole models
                [each] = plain.pop("slices")
                plain["models"] = [{"model": source["model"]} for source in each["sources"]]
            plain.get("parameters", {}).pop("int8_mask", None)
            ours = form.recipe(vector).to_plain()
            assert ours == {key: value for key, value in plain.items() if value}

        same()
