"""Slices and modules: layers of the output, made of those of several models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LLAMA, changed, save_model, state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from written import assert_same, load_folder

import merge_engine as me

LAYERS = 4
STACK = "model.layers"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four models of four layers."""
    folder = tmp_path_factory.mktemp("models")
    config = changed(LLAMA, num_hidden_layers=LAYERS)
    return {
        name: save_model(folder / name, seed, config, tensors=state_dict(seed, LAYERS))
        for seed, name in enumerate(("base", "a", "b", "c"))
    }


def source(model: Path, start: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": str(model), "layer_range": [start, end], "parameters": parameters}


def stacked(*sources: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A recipe that copies one source in each slice."""
    return {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources], **keys}


def layer(tensors: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer, by the rest of their names."""
    start = f"{STACK}.{number}."
    return {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}


def merged(recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = me.run(recipe).tensors
    assert tensors is not None
    return dict(tensors)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


CUTS = st.lists(st.integers(1, LAYERS - 1), unique=True, max_size=LAYERS - 1).map(
    lambda inner: [0, *sorted(inner), LAYERS]
)


@settings(max_examples=12)
@given(
    cut=CUTS,
    method=st.sampled_from(("linear", "ties", "dare_ties", "breadcrumbs")),
    lists_base=st.booleans(),
    whole_trim=st.booleans(),
)
def test_any_cut_gives_the_bytes_of_the_whole_merge(
    models: dict[str, Path], cut: list[int], method: str, lists_base: bool, whole_trim: bool
) -> None:
    named = [models[name] for name in (("a", "base", "b") if lists_base else ("a", "b"))]
    parameters: dict[str, Any] = {"weight": [{"filter": "mlp", "value": 0.7}, {"value": 0.4}]}
    if method != "linear":
        parameters |= {"density": 0.3}
    if method == "ties" and whole_trim:
        parameters |= {"trim_scope": "model"}
    common = {"merge_method": method, "base_model": str(models["base"]), "parameters": parameters}
    whole = merged({**common, "models": [{"model": str(model)} for model in named]})
    slices = [{"sources": [source(model, start, end) for model in named]} for start, end in pairwise(cut)]
    assert_same(merged({**common, "slices": slices}), whole)


@settings(max_examples=8)
@given(
    pieces=st.lists(
        st.tuples(
            st.sampled_from(("a", "b", "c")), st.integers(0, LAYERS - 1), st.integers(1, LAYERS)
        ).filter(lambda piece: piece[1] < piece[2]),
        min_size=1,
        max_size=4,
    )
)
def test_stacking_and_cutting_again_gives_back_the_layers(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("stacked") / "out"
    me.run(stacked(*(source(models[name], start, end) for name, start, end in pieces)), folder)
    whole = load_folder(folder)
    given = {name: load_file(models[name] / "model.safetensors") for name in "abc"}
    taken = [(name, i) for name, start, end in pieces for i in range(start, end)]
    assert config_of(folder)["num_hidden_layers"] == len(taken)
    assert len(whole) == 3 + len(taken) * len(layer(given["a"], 0))
    for number, (name, i) in enumerate(taken):
        assert_same(layer(whole, number), layer(given[name], i))
    first, last = given[pieces[0][0]], given[pieces[-1][0]]
    outside = ("model.embed_tokens.weight", first), ("model.norm.weight", last), ("lm_head.weight", last)
    for name, model in outside:
        assert torch.equal(whole[name], model[name])
    start = 0
    for name, low, high in pieces:
        again = merged(stacked(source(folder, start, start + high - low)))
        for number in range(high - low):
            assert_same(layer(again, number), layer(given[name], low + number))
        start += high - low


def test_full_slices_are_whole_models(models: dict[str, Path]) -> None:
    common = {
        "merge_method": "ties",
        "base_model": str(models["base"]),
        "parameters": {"density": [0.2, 0.9]},
    }
    entries = [("a", {"weight": [0.1, 1]}), ("base", {}), ("b", {"weight": 0.5})]
    whole = merged(
        {**common, "models": [{"model": str(models[name]), "parameters": own} for name, own in entries]}
    )
    sources = [source(models[name], 0, LAYERS, **own) for name, own in entries]
    assert_same(merged({**common, "slices": [{"sources": sources}]}), whole)
    assert_same(merged({**common, "modules": {"default": {"slices": [{"sources": sources}]}}}), whole)
    bare = [{"model": one["model"], "parameters": one["parameters"]} for one in sources]
    assert_same(merged({**common, "slices": [{"sources": bare}]}), whole)


def test_gradients_restart_and_filters_see_the_names_of_their_model(models: dict[str, Path]) -> None:
    plan = me.plan(
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        source(models["a"], 0, 3, weight=[0, 2]),
                        source(models["b"], 1, 4, weight=[{"filter": "layers.1.", "value": 7}, {"value": 1}]),
                    ]
                },
                {"sources": [source(models["b"], 3, 4, weight=[4, 5]), source(models["a"], 0, 1, weight=6)]},
            ],
        }
    )
    weights = {task.name: [each.weight for each in task.settings] for task in plan.tasks}
    assert [weights[f"{STACK}.{i}.mlp.up_proj.weight"] for i in range(4)] == [[0, 7], [1, 1], [2, 1], [5, 6]]
    assert weights["model.embed_tokens.weight"] == [0, 1]
    assert weights["lm_head.weight"] == weights["model.norm.weight"] == [4, 6]
    positions = {task.name: task.models for task in plan.tasks}
    assert positions[f"{STACK}.0.mlp.up_proj.weight"] == (0, 1)
    assert positions[f"{STACK}.3.mlp.up_proj.weight"] == positions["lm_head.weight"] == (1, 0)


def test_blocks_of_zeros(models: dict[str, Path]) -> None:
    """LLaMA-Pro: a copied layer that adds nothing, because what it gives back is zero."""
    zeros = [{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0}, {"value": 1}]
    a = models["a"]
    found = merged(stacked(source(a, 0, 2), source(a, 1, 2, scale=zeros), source(a, 2, 4)))
    for name, tensor in layer(found, 2).items():
        expected = layer(found, 1)[name]
        assert torch.equal(tensor, expected * 0 if "o_proj" in name or "down_proj" in name else expected)


def test_each_slice_may_have_a_base_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models["base"]),
        "parameters": {"weight": 0.5},
        "slices": [
            {"sources": [source(models["a"], 0, 2)]},
            {
                "sources": [source(models["b"], 1, 3), source(models["a"], 0, 2)],
                "base_model": str(models["a"]),
            },
        ],
    }
    result = me.run(recipe, tmp_path / "out")
    given = {name: load_file(path / "model.safetensors") for name, path in models.items()}
    found = load_folder(tmp_path / "out")

    def expected(base: str, at: int, model: str, of: int) -> dict[str, torch.Tensor]:
        origin, tuned = layer(given[base], at), layer(given[model], of)
        return {
            name: (each.float() + 0.5 * (tuned[name].float() - each.float())).bfloat16()
            for name, each in origin.items()
        }

    for number, layers in enumerate(
        (("base", 0, "a", 0), ("base", 1, "a", 1), ("a", 0, "b", 1), ("a", 1, "b", 2))
    ):
        assert_same(layer(found, number), expected(*layers))
    inputs = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["inputs"]
    assert {Path(path).name: each["roles"] for path, each in inputs.items()} == {
        "base": ["base"],
        "a": ["base 1", "0"],
        "b": ["1"],
    }
    assert not result.warnings


def test_a_report_knows_models_of_different_slices(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = (("a", "b"), ("b", "a"), ("c", "a"))
    slices = [
        {"sources": [source(models[one], i, i + 1), source(models[two], i, i + 1)]}
        for i, (one, two) in enumerate(names)
    ]
    parameters = {"weight": 1, "density": 0.5}
    recipe = {"merge_method": "ties", "base_model": str(models["base"]), "parameters": parameters}
    me.run({**recipe, "slices": slices}, tmp_path / "out")
    _, numbers = me.write_report(tmp_path / "out")
    vectors = json.loads(numbers.read_text())["task_vectors"]
    known = [each["cosine"] is not None for each in vectors["total"]["cosines"]]
    assert known == [True, True, False]  # b and c stand in no slice together
    base, a, b = (load_file(models[name] / "model.safetensors") for name in ("base", "a", "b"))
    for at in (0, 1):
        one, two = (
            torch.cat(
                [(tuned[name] - base[name]).double().flatten() for name in base if f"{STACK}.{at}." in name]
            )
            for tuned in (a, b)
        )
        [found] = [each for each in vectors["layers"] if each["layer"] == at]
        assert found["cosines"][0]["cosine"] == pytest.approx(
            float(one @ two / one.norm() / two.norm()), abs=1e-3
        )


def test_the_head_is_that_of_the_last_slice_also_if_it_is_tied(tmp_path: Path) -> None:
    own = state_dict(0, 2)
    tied = {name: each for name, each in state_dict(1, 2).items() if name != "lm_head.weight"}
    config = changed(LLAMA, tie_word_embeddings=True)
    a = save_model(tmp_path / "a", 0, LLAMA, tensors=own)
    b = save_model(tmp_path / "b", 0, config, tensors=tied)
    me.run(stacked(source(a, 0, 1), source(b, 1, 2)), tmp_path / "ab")
    me.run(stacked(source(b, 0, 1), source(a, 1, 2)), tmp_path / "ba")
    result = me.run(stacked(source(b, 0, 1), source(b, 1, 2)), tmp_path / "bb")
    for name, embedding, head in (
        ("ab", own["model.embed_tokens.weight"], tied["model.embed_tokens.weight"]),
        ("ba", tied["model.embed_tokens.weight"], own["lm_head.weight"]),
    ):
        found = load_folder(tmp_path / name)
        assert torch.equal(found["model.embed_tokens.weight"], embedding)
        assert torch.equal(found["lm_head.weight"], head)
        assert config_of(tmp_path / name)["tie_word_embeddings"] is False
    assert config_of(tmp_path / "bb")["tie_word_embeddings"] is True
    assert not result.notes and not result.warnings


def test_tied_models_of_which_the_first_gives_the_head(tmp_path: Path) -> None:
    config = changed(LLAMA, tie_word_embeddings=True)
    tensors = [{n: t for n, t in state_dict(seed, 2).items() if n != "lm_head.weight"} for seed in (0, 1)]
    a, b = (
        save_model(tmp_path / name, 0, config, tensors=each) for name, each in zip("ab", tensors, strict=True)
    )
    plan = me.plan(stacked(source(a, 0, 1), source(b, 1, 2)))
    [note] = plan.notes
    assert "the output's head is the embedding of the first slice" in note


def test_embedding_and_head_of_vocabularies_of_other_sizes_are_not_stacked(tmp_path: Path) -> None:
    longer = state_dict(0, 2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name] = torch.cat([longer[name], longer[name][:2]])
    rows = len(longer["lm_head.weight"])
    a = save_model(tmp_path / "a", 0, changed(LLAMA, vocab_size=rows), tensors=longer)
    b = save_model(tmp_path / "b", 1, changed(LLAMA, vocab_size=rows - 2), tensors=state_dict(1, 2))
    tied = {name: each for name, each in state_dict(2, 2).items() if name != "lm_head.weight"}
    config = changed(LLAMA, vocab_size=rows - 2, tie_word_embeddings=True)
    c = save_model(tmp_path / "c", 2, config, tensors=tied)
    for first, last in ((a, b), (b, a), (a, c), (c, a)):
        [problem] = refused(stacked(source(first, 0, 1), source(last, 1, 2)))
        sizes = [f"{rows if each is a else rows - 2} in {each}" for each in (first, last)]
        assert "embed_tokens.weight, lm_head.weight: the vocabularies have different sizes" in problem
        assert ", ".join(sizes) in problem and "tokenizer_source: union" in problem
    me.plan(stacked(source(a, 0, 1), source(b, 0, 2), source(a, 1, 2)))  # b gives layers only


def test_stacked_layers_of_several_types_are_a_warning(models: dict[str, Path], tmp_path: Path) -> None:
    wider = {name: each.double() for name, each in state_dict(1, LAYERS).items()}
    b = save_model(tmp_path / "b", 1, changed(LLAMA, num_hidden_layers=LAYERS), tensors=wider)
    recipe = stacked(source(models["a"], 0, 2), source(b, 2, 4))
    [warning] = me.plan(recipe).warnings
    assert "bfloat16 in" in warning and "float64 in" in warning and "set dtype to one of them" in warning
    assert not me.plan(recipe | {"dtype": "float32"}).warnings


def refused(recipe: dict[str, Any]) -> Sequence[str]:
    with pytest.raises(me.PlanError) as error:
        me.plan(recipe)
    return error.value.problems


def test_ranges_that_cannot_be_are_named_at_once(models: dict[str, Path]) -> None:
    a, b = models["a"], models["b"]
    problems = refused(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [source(a, 0, 5)]},
                {"sources": [source(b, 3, 1)]},
                {"sources": [source(b, 2, 2)]},
                {"sources": [source(a, 0, 1), source(b, 0, 1)]},
                {"sources": [source(b, 4, 4)]},
            ],
        }
    )
    assert problems == [
        "slices[3]: passthrough: takes exactly 1 model(s), not 2",
        f"slices[0].sources[0].layer_range: [0, 5]: {a} has 4 layers, 0 to 3",
        "slices[1].sources[0].layer_range: [3, 1]: ends before it starts; the first layer comes first",
        "slices[2].sources[0].layer_range: [2, 2]: holds no layer; the second number is one more than that of the last "
        "layer",
    ]


@pytest.mark.parametrize(
    ("slices", "problem"),
    [
        ([[("a", 0, 2), ("b", 0, 3)]], "slices[0]: its sources have 2 and 3 layers; all must have as many"),
        (
            [[("a", 0, 2), ("b", 1, 3)]],
            "slices[0]: the base model {base} is not among its sources, so it is not known",
        ),
        ([[("a", 2, 2)], [("a", 4, 4)]], "slices[0]: the output would have no layers; give it some"),
    ],
)
def test_slices_that_cannot_be(
    models: dict[str, Path], slices: list[list[tuple[str, int, int]]], problem: str
) -> None:
    listed = [{"sources": [source(models[n], start, end) for n, start, end in each]} for each in slices]
    recipe = {"merge_method": "ties", "base_model": str(models["base"]), "parameters": {"weight": 1}}
    [found] = refused({**recipe, "slices": listed})
    assert found.startswith(problem.format(**models))


def test_ranges_are_named_beside_other_misfits(models: dict[str, Path], tmp_path: Path) -> None:
    config = changed(LLAMA, hidden_size=32, num_hidden_layers=2)
    other = save_model(tmp_path / "other", 0, config, tensors=state_dict(8, 2))
    first, second = refused(stacked(source(models["a"], 0, 2), source(other, 1, 3)))
    assert first.startswith("config.json: the architectures differ: hidden_size is 16 in")
    assert second == f"slices[1].sources[0].layer_range: [1, 3]: {other} has 2 layers, 0 to 1"


def test_models_with_holes_or_other_layers(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = {name: each for name, each in state_dict(5, LAYERS).items() if f"{STACK}.2." not in name}
    hole = save_model(tmp_path / "hole", 0, changed(LLAMA, num_hidden_layers=LAYERS), tensors=tensors)
    other = {name.replace(STACK, "transformer.h"): each for name, each in state_dict(6, LAYERS).items()}
    strange = save_model(tmp_path / "strange", 0, changed(LLAMA, num_hidden_layers=LAYERS), tensors=other)
    recipe = stacked(source(models["a"], 0, 2), source(hole, 1, 4), source(strange, 2, 4))
    assert refused(recipe) == [
        f"slices[1].sources[0].layer_range: [1, 4]: {hole} lacks the layers 2",
        f"slices[2].sources[0]: {strange} has no layers {STACK}.0 and so on; stack models of one architecture",
    ]


def test_layers_of_other_architectures_are_not_stacked(models: dict[str, Path], tmp_path: Path) -> None:
    """Also where no config says so."""
    plain = state_dict(7, LAYERS)
    biased = plain | {f"{STACK}.{i}.self_attn.q_proj.bias": torch.zeros(16).bfloat16() for i in range(LAYERS)}
    wide = {name: torch.cat([each, each]) if "up_proj" in name else each for name, each in plain.items()}
    paths = [save_model(tmp_path / n, 0, None, tensors=t) for n, t in (("biased", biased), ("wide", wide))]
    recipe = stacked(*(source(path, 0, 2) for path in (models["a"], *paths)))
    assert refused(recipe) == [
        f"the layers of {paths[0]} have self_attn.q_proj.bias, unlike those of {models['a']}; stack models of one "
        'architecture; if this is meant, add "allow: [names]" to the recipe',
        f"the layers that are stacked have other shapes: mlp.up_proj.weight ([32, 16] in {models['a']}, [64, 16] in "
        f"{paths[1]}); stack models of one size",
    ]


def test_gradients_over_too_few_layers(models: dict[str, Path]) -> None:
    plan = me.plan(
        stacked(source(models["a"], 0, 2, scale=[1, 2, 3]), source(models["a"], 2, 4, scale=[1, 2]))
    )
    assert plan.warnings == (
        "slices[0].sources[0].parameters.scale: a gradient of 3 values over 2 layers; some of them are never used",
    )


def test_one_trim_for_a_model_needs_one_scope(models: dict[str, Path]) -> None:
    slices = [
        {"sources": [source(models["a"], 0, 2)], "parameters": {"trim_scope": "model"}},
        {"sources": [source(models["a"], 2, 4)]},
    ]
    recipe = {"merge_method": "ties", "base_model": str(models["base"]), "slices": slices}
    assert refused({**recipe, "parameters": {"weight": 1, "density": 0.5}}) == [
        "trim_scope: must be the same in all slices, model or tensor"
    ]


def vision(seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """A language model with a tower of three layers and a projector."""
    text = {
        name.replace("model.", "model.language_model.", 1): each
        for name, each in state_dict(seed, layers).items()
    }
    random = torch.Generator().manual_seed(seed + 100)
    shapes = {
        "model.vision_tower.patch_embed.weight": (4, 4),
        "model.multi_modal_projector.0.weight": (16, 4),
    }
    shapes |= {f"model.vision_tower.blocks.{i}.attn.weight": (4, 4) for i in range(3)}
    shapes |= {"model.vision_tower.norm.weight": (4,)}
    return text | {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def towers(tmp_path: Path) -> list[Path]:
    config = {
        **changed(LLAMA, "num_hidden_layers"),
        "text_config": {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
        "vision_config": {"depth": 3, "fullatt_block_indexes": [0, 2]},
    }
    return [save_model(tmp_path / f"vl{seed}", 0, config, tensors=vision(seed)) for seed in (0, 1)]


def test_modules_are_sliced_apart(towers: list[Path], tmp_path: Path) -> None:
    a, b = towers
    recipe = {
        "merge_method": "passthrough",
        "modules": {
            "text_decoder": {"slices": [{"sources": [source(a, 0, 2)]}, {"sources": [source(b, 1, 2)]}]},
            "model.vision_tower": {"slices": [{"sources": [source(b, 1, 3)]}]},
            "multi_modal_projector": {"models": [{"model": str(b)}]},
        },
    }
    me.run(recipe, tmp_path / "out")
    found, first, second = load_folder(tmp_path / "out"), vision(0), vision(1)
    own = {
        name: each
        for name, each in second.items()
        if name.endswith(("patch_embed.weight", "projector.0.weight"))
    }
    blocks = "model.vision_tower.blocks"
    own |= {f"{blocks}.{i}.attn.weight": second[f"{blocks}.{i + 1}.attn.weight"] for i in (0, 1)}
    own |= {name: second[name] for name in ("model.vision_tower.norm.weight", "lm_head.weight")}
    own |= {"model.language_model.norm.weight": second["model.language_model.norm.weight"]}
    own |= {"model.language_model.embed_tokens.weight": first["model.language_model.embed_tokens.weight"]}
    text = "model.language_model.layers"
    for new, model, old in ((0, first, 0), (1, first, 1), (2, second, 1)):
        start = f"{text}.{old}."
        own |= {
            name.replace(start, f"{text}.{new}."): each
            for name, each in model.items()
            if name.startswith(start)
        }
    assert_same(found, own)
    config = config_of(tmp_path / "out")
    assert config["text_config"]["num_hidden_layers"] == 3
    assert config["text_config"]["layer_types"] == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ]
    assert config["vision_config"] == {"depth": 2, "fullatt_block_indexes": [1]}


def test_modules_that_cannot_be(towers: list[Path], models: dict[str, Path]) -> None:
    a = towers[0]
    whole = {"models": [{"model": str(a)}]}
    copy = {"merge_method": "passthrough"}
    assert refused({**copy, "slices": [{"sources": [source(a, 0, 1)]}]}) == [
        f"slices: {a} has several stacks of layers; slice each of them under the key modules, as text_decoder, "
        "vision_tower"
    ]
    assert refused({**copy, "modules": {"vision_towr": whole, "text_decoder": whole}}) == [
        f"modules.vision_towr: {a} has no such module; it has text_decoder, vision_tower, multi_modal_projector; "
        'did you mean "vision_tower"?'
    ]
    assert refused({**copy, "modules": {"text_decoder": whole}}) == [
        f"modules: {a} also has vision_tower, without which the output cannot be loaded; add each, with the key models"
    ]
    twice = {"vision_tower": whole, "text_decoder": whole, "model.vision_tower": whole}
    assert refused({**copy, "modules": twice}) == [
        "modules.vision_tower and modules.model.vision_tower: name the same module, vision_tower; leave one of them out"
    ]
    no_layers = {"slices": [{"sources": [source(a, 0, 1)]}]}
    parts = {"vision_tower": whole, "text_decoder": whole, "multi_modal_projector": no_layers}
    assert refused({**copy, "modules": parts}) == [
        "modules.multi_modal_projector: has no layers to slice; name whole models with the key models"
    ]
