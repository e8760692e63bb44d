"""Genomes of mergekit-evolve: their recipes mean what the numbers say, and are those that mergekit makes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
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
from merge_engine.integrations.evolve import PARAMETERS, Genome, Strategy, strategy_class
from merge_engine.methods import find_method
from merge_engine.planning.tolerance import without_ignored_settings
from merge_engine.recipe import Recipe, load_recipe, resolvers

LAYERS = 6
MODELS = ("first", "second", "third")


@st.composite
def genomes(draw: st.DrawFn, folder: str = "") -> dict[str, Any]:
    """The keys of a genome. The models are in a folder."""
    method = draw(st.sampled_from(sorted(PARAMETERS)))
    models = [folder + name for name in draw(st.permutations(MODELS))[: draw(st.integers(2, 3))]]
    based = method not in ("linear", "slerp")
    base = st.sampled_from([*models, folder + "base"] if based else [None, *models])
    optional: dict[str, st.SearchStrategy[Any]] = {
        "layer_granularity": st.sampled_from([-1, 0, 1, 2, 3, 6]),
        "normalize": st.none() | st.booleans(),
        "allow_negative_weights": st.booleans(),
        "tokenizer_source": st.sampled_from([None, "union", "base", models[0]]),
    }
    if method != "slerp":
        optional |= {
            "smooth": st.booleans(),
            "filters": st.none() | st.lists(st.sampled_from(["mlp", "norm", "2"]), max_size=2),
        }
    keys = {"models": models, "merge_method": method, "base_model": draw(base)}
    return keys | draw(st.fixed_dictionaries({}, optional=optional))


def genotypes(genome: Genome, dtype: str = "float64") -> st.SearchStrategy[Any]:
    """Of the shape, as an optimizer without bounds proposes them. No two are equal, so that an order is one."""
    near = st.floats(-1.5, 1.5, width=16).map(lambda number: number + 2.0**-20)
    return arrays(dtype, genome.shape, elements=near, unique=True)


@given(genomes(), st.data())
@settings(max_examples=100)
def test_a_tensor_has_the_values_of_its_group_model_and_set(
    keys: dict[str, Any], data: st.DataObject
) -> None:
    genome = Genome.of(keys, layers=LAYERS)
    genotype = data.draw(genotypes(genome))
    recipe = genome.recipe(genotype.reshape(-1) if data.draw(st.booleans()) else torch.tensor(genotype))
    assert recipe == load_recipe(recipe.to_yaml()) and recipe.dtype == "bfloat16"
    if keys["merge_method"] == "slerp":
        return
    groups = genome.shape[0]
    of_slices = resolvers(recipe, find_method(recipe.merge_method).parameters)
    smooth = keys.get("smooth", False)
    assert len(of_slices) == (1 if smooth else groups)
    layer = data.draw(st.integers(0, LAYERS - 1))
    tensor = f"model.layers.{layer}.{data.draw(st.sampled_from(['mlp', 'norm', 'attention']))}.weight"
    filters = keys.get("filters") or []
    of_set = next((i for i, part in enumerate(filters) if part in tensor), len(filters))
    model = data.draw(st.integers(0, len(genome.models) - 1))
    t = layer / (LAYERS - 1)
    place = 0 if smooth else layer * groups // LAYERS
    position = recipe.stacks.models.index(genome.models[model])
    found = of_slices[place].for_model(position, tensor, t if smooth else 0.0)
    for number, name in enumerate(genome.parameters):
        line = genotype[:, model, of_set, number]
        if name == "density":
            line = np.minimum(abs(line), 1)
        elif not keys.get("allow_negative_weights"):
            line = abs(line)
        expected = np.interp(t * (groups - 1), np.arange(groups), line) if smooth else line[place]
        assert found[name] == (pytest.approx(expected, rel=1e-12) if smooth else expected)
    normalize = keys.get("normalize")
    default = keys["merge_method"] in ("linear", "ties", "dare_ties")
    assert of_slices[0].for_tensor(tensor, 0)["normalize"] is (default if normalize is None else normalize)


@given(genomes(), st.data())
@settings(max_examples=30)
def test_numbers_within_the_bounds_are_used_as_they_are(keys: dict[str, Any], data: st.DataObject) -> None:
    genome = Genome.of(keys, layers=LAYERS)
    least, most = genome.bounds
    assert least.shape == most.shape == genome.initial_genotype(random=True).shape == genome.shape
    start = genome.initial_genotype().double()
    assert bool(((least <= start) & (start <= most)).all())
    genotype = torch.tensor(data.draw(genotypes(genome)))
    used = torch.where(least == 0, genotype.abs(), genotype).clamp(least, most)
    assert genome.recipe(genotype) == genome.recipe(used)


def test_slerp_merges_the_two_that_are_wanted_most() -> None:
    keys = {"models": list(MODELS), "merge_method": "slerp", "layer_granularity": 3}
    genome = Genome.of(keys, layers=LAYERS)
    assert genome.shape == (2, 3, 1, 1)
    recipe = genome.recipe([0.0, 2.0, 1.0, 0.5, -1.0, 0.25])
    shares = [1 / (1 + np.e), 1 / (1 + np.exp(0.25))]
    found = [
        ([str(source.model) for source in each.sources], str(each.base), each.scopes[0].settings["t"])
        for each in recipe.stacks.slices
    ]
    assert found == [
        (["second", "third"], "second", pytest.approx(shares[0])),
        (["first", "third"], "first", pytest.approx(shares[1])),
    ]


def test_the_number_of_layers_is_that_of_the_config(save_checkpoint: SaveCheckpoint) -> None:
    tensors = {"w": torch.ones(1)}
    plain = save_checkpoint("plain", tensors, {"n_layer": 12})
    nested = save_checkpoint("nested", tensors, {"text_config": {"num_hidden_layers": 8}})
    silent = save_checkpoint("silent", tensors)
    keys = {"merge_method": "linear", "layer_granularity": 4}
    counts = [Genome.of({**keys, "models": [str(folder), "b"]}).layers for folder in (plain, nested)]
    assert counts == [12, 8]
    with pytest.raises(
        me.RecipeError, match=r"genome: models\[0\]: .*silent/config.json does not say how many"
    ):
        Genome.of({**keys, "models": [str(silent)]})
    with pytest.raises(me.CheckpointError, match="nowhere: there is no such folder or file"):
        Genome.of({**keys, "models": ["./nowhere"]})


TIES = {"models": ["a", "b"], "merge_method": "ties", "base_model": "base"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": []}, ["genome: models: must name at least one model"]),
        (
            {"base_model": None},
            ["genome: base_model: missing, but ties needs the model that the others were tuned from"],
        ),
        ({"layer_granularity": 4}, ["genome: layer_granularity: must divide 6, the number of layers, not 4"]),
        ({"filter": ["mlp"]}, ['genome: unknown key "filter"; did you mean "filters"?']),
        (
            {"merge_method": "linear"},
            ["genome: base_model: linear merges no base; leave it out, or list it in models"],
        ),
        (
            {"merge_method": "slerp", "models": ["base"], "filters": ["mlp"], "smooth": True},
            [
                "genome: models: slerp needs two or more",
                "genome: filters: slerp has no such key; leave it out",
                "genome: smooth: slerp has no such key; leave it out",
            ],
        ),
        (
            {"merge_method": "della", "models": ["a", 7]},
            [
                "genome: models[1]: must be a folder or a hub id, not 7",
                'genome: merge_method: must be "linear", "task_arithmetic", "ties", "dare_ties" or "slerp", not '
                '"della"',
            ],
        ),
    ],
)
def test_a_wrong_genome_says_what_is_wrong(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(me.RecipeError) as caught:
        Genome.of({"genome": TIES | changes, "tasks": []}, layers=LAYERS)
    assert caught.value.problems == said


def test_a_genome_is_a_map() -> None:
    with pytest.raises(me.RecipeError, match=r'^genome: must be a map of keys to values, not "evolve.yml"$'):
        Genome.of("evolve.yml")


@pytest.mark.parametrize(
    ("genotype", "said"),
    [
        ([0.5] * 5, "must have 4 numbers, 1 x 2 x 1 x 2 (groups of layers, models, sets, parameters), not 5"),
        (
            np.ones((2, 2)),
            "must have 4 numbers, 1 x 2 x 1 x 2 (groups of layers, models, sets, parameters), not 2 x 2",
        ),
        (
            0.5,
            "must have 4 numbers, 1 x 2 x 1 x 2 (groups of layers, models, sets, parameters), not a single number",
        ),
        (["a"] * 4, 'must be an array of numbers, not ["a", "a", "a", "a"]'),
        (np.ones(4, dtype=complex), "must be an array of real numbers, not of complex ones"),
    ],
)
def test_a_wrong_genotype_says_what_is_wrong(genotype: object, said: str) -> None:
    with pytest.raises(me.RecipeError) as caught:
        Genome.of(TIES, layers=LAYERS).recipe(genotype)
    assert caught.value.problems == [f"genotype: {said}"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_genotype_is_finite(value: float) -> None:
    with pytest.raises(me.RecipeError) as caught:
        Genome.of(TIES, layers=LAYERS).recipe(torch.tensor([0.5, 0.5, value, 0.5]))
    assert caught.value.problems == [f"genotype[2]: must be a finite number, not {value}"]


def test_numbers_keep_their_precision() -> None:
    genome = Genome.of({**TIES, "models": ["a"]}, layers=LAYERS)
    for genotype in ([0.1, 0.3], np.array([0.1, 0.3]), torch.tensor([0.1, 0.3], dtype=torch.float32)):
        [source, _] = next(genome.recipe(genotype).stacks.slices).sources
        assert list(source.settings.settings.values()) == list(map(float, genotype))


@pytest.fixture
def folders(save_checkpoint: SaveCheckpoint) -> dict[str, str]:
    """Small checkpoints by name: the base and the models."""
    names = [
        "model.embed.weight",
        *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("mlp", "norm")),
    ]
    made = {}
    for seed, name in enumerate(("base", *MODELS)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {each: torch.randn(5, 7, generator=generator).bfloat16() for each in names}
        made[name] = str(save_checkpoint(name, tensors, {"num_hidden_layers": LAYERS}))
    return made


def same_bytes(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].view(torch.int16), tensor.view(torch.int16))
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("method", sorted(PARAMETERS))
def test_a_candidate_is_merged_as_a_plain_run_merges_it(method: str, folders: dict[str, str]) -> None:
    base, *models = folders.values()
    keys: dict[str, Any] = {"models": models, "merge_method": method, "layer_granularity": 2}
    if method not in ("linear", "slerp"):
        keys |= {"base_model": base, "filters": ["mlp"]}
    genome = Genome.of(keys)
    candidates = list(torch.rand(3, *genome.shape, generator=torch.Generator().manual_seed(5)))
    scores: list[float] = []

    def score(merge: me.Merge) -> float:
        assert merge.recipe == genome.recipe(candidates[len(scores)]).model_copy(update={"seed": 9})
        found = merge.tensors()
        assert same_bytes(found, me.run(merge.recipe).tensors)
        scores.append(sum(float(tensor.float().sum()) for tensor in found.values()))
        return scores[-1]

    with me.load(genome.base_model, genome.models, device="cpu") as session:
        results = Strategy(genome, session, score, seed=9).evaluate_genotypes(candidates)
    assert results == [{"score": number, "results": {}} for number in scores] and len(set(scores)) == 3


def test_mergekits_command_makes_a_strategy(folders: dict[str, str]) -> None:
    base, *models = folders.values()
    theirs = SimpleNamespace(
        definition={"models": models, "base_model": base, "merge_method": "dare_ties"}, num_layers=LAYERS
    )
    by_task = {"task": {"acc,none": 0.25}}
    made = strategy_class(lambda merge: {"score": merge.recipe.seed, "results": by_task}, threads=1)
    options = SimpleNamespace(cuda=False, random_seed=4)
    strategy = made("configuration", theirs, options, num_gpus=None, batch_size=3)
    with strategy.session:
        assert strategy.session.memory.keys() == {"cpu", "answers"}
        start = strategy.genome.initial_genotype().flatten().numpy()
        assert strategy.evaluate_genotype(start) == {"score": 4.0, "results": by_task}


@pytest.mark.parametrize("found", [float("nan"), None, "good", {"results": {}}, {"score": [1.0]}])
def test_a_score_is_a_number(found: Any, folders: dict[str, str]) -> None:
    genome = Genome.of({"models": list(folders.values()), "merge_method": "linear"})
    with me.load(None, genome.models, device="cpu") as session:
        strategy = Strategy(genome, session, lambda merge: found)
        with pytest.raises(
            me.OptionError, match=r'^score: must return a number, or a map with a number as "score", not '
        ):
            strategy.evaluate_genotype(genome.initial_genotype())


def test_a_model_that_the_session_lacks_is_named(folders: dict[str, str]) -> None:
    genome = Genome.of({"models": list(folders.values()), "merge_method": "linear"})
    with me.load(None, genome.models[1:], device="cpu") as session:
        strategy = Strategy(genome, session, lambda merge: 0.0)
        with pytest.raises(me.MergeError, match=f"names {folders['base']}"):
            strategy.evaluate_genotype(genome.initial_genotype())


def normal_form(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what the planner leaves out."""
    plain = without_ignored_settings(recipe, find_method(recipe.merge_method), False)[0].to_plain()
    plain.get("parameters", {}).pop("int8_mask", None)
    return {key: value for key, value in plain.items() if value}


@pytest.mark.oracle
def test_recipes_are_those_of_mergekit(tmp_path: Path) -> None:
    for name in MODELS:
        (tmp_path / name).mkdir()
        config = {"model_type": "llama", "num_hidden_layers": LAYERS}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with answering("genome_oracle.py") as ask:

        @given(genomes(f"{tmp_path}/"), st.sampled_from(["float64", "float32"]), st.booleans(), st.data())
        @settings(max_examples=150)
        def same(keys: dict[str, Any], dtype: str, flat: bool, data: st.DataObject) -> None:
            genome = Genome.of(keys)
            start = genome.initial_genotype().numpy().astype(dtype)
            genotype = data.draw(genotypes(genome, dtype) | st.just(start))
            given = genotype.reshape(-1) if flat else genotype
            theirs = ask({"genome": keys, "genotype": given.tolist(), "dtype": dtype})
            assert normal_form(genome.recipe(given)) == normal_form(load_recipe(theirs["recipe"]))
            assert genome.initial_genotype().flatten().tolist() == theirs["initial"]

        same()
