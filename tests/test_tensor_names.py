"""Models whose tensors have other names: what is mapped, what is merged all the same, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from conftest import SaveCheckpoint
from hypothesis import given
from hypothesis import strategies as st

import merge_engine as me

State = dict[str, torch.Tensor]
PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
METHODS = ("linear", "dare_ties")


def llama(seed: int, layers: int = 4, prefix: str = "model.", head: bool = True) -> State:
    generator = torch.Generator().manual_seed(seed)
    names = [f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"]
    names += [f"{prefix}layers.{i}.{part}" for i in range(layers) for part in PARTS]
    return {name: torch.randn(6, 4, generator=generator) for name in names + ["lm_head.weight"] * head}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def inputs(method: str, *states: State) -> dict[str, Any]:
    """The arguments of a merge in memory. The first state is the base, or a model for ``linear``."""
    if method == "linear":
        return {"base": None, "models": list(states), "method": method}
    return {"base": states[0], "models": list(states[1:]), "method": method, "density": 0.5}


def merged(method: str, *states: State, **options: Any) -> State:
    return me.merge_state_dicts(**inputs(method, *states), **options)


def problems(method: str, *states: State, **options: Any) -> list[str]:
    with pytest.raises(me.PlanError) as caught:
        merged(method, *states, **options)
    return caught.value.problems


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "prefix", ("_orig_mod.", "module.", "module._orig_mod.", "language_model.", "base_model.model.")
)
def test_a_prefix_of_all_names_is_removed_or_added(method: str, prefix: str) -> None:
    states = [llama(i) for i in range(3)]
    expected = merged(method, *states)
    assert same(merged(method, *states[:2], prefixed(prefix, states[2])), expected)
    others = [prefixed(prefix, state) for state in states]
    assert same(merged(method, *others[:2], states[2]), merged(method, *others))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prefix", ("model.", "transformer.", "bert.", "roberta.encoder."))
def test_a_bare_model_is_mapped_to_one_with_a_head(method: str, prefix: str) -> None:
    """As AutoModel saves it: the head keeps its name, or is not there."""
    states = [llama(i, prefix=prefix) for i in range(3)]
    bare = {name.removeprefix(prefix): tensor for name, tensor in states[2].items()}
    assert same(merged(method, *states[:2], bare), merged(method, *states))
    del bare["lm_head.weight"], states[2]["lm_head.weight"]
    assert same(merged(method, *states[:2], bare), merged(method, *states))


def test_a_mapping_is_noted(save_checkpoint: SaveCheckpoint) -> None:
    paths = [save_checkpoint("a", llama(0)), save_checkpoint("b", prefixed("_orig_mod.", llama(1)))]
    recipe = {"merge_method": "linear", "models": [{"model": str(p)} for p in paths]}
    result = me.run(recipe | {"parameters": {"weight": 1}})
    assert result.notes == [
        f'{paths[1]}: tensors get the names that they have in {paths[0]}: "_orig_mod." at the start is removed'
    ]
    assert result.tensors is not None and result.tensors.keys() == llama(0).keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("here", "there"),
    [
        (".mlp.", "._orig_mod.mlp."),
        ("model.layers.", "model._fsdp_wrapped_module.layers._checkpoint_wrapped_module."),
        ("input_layernorm.weight", "_orig_mod.input_layernorm.weight"),
        ("q_proj.weight", "q_proj.base_layer.weight"),
        ("LayerNorm.weight", "LayerNorm.gamma"),
        ("LayerNorm.bias", "LayerNorm.beta"),
        (".parametrizations.weight.original0", ".weight_g"),
        (".parametrizations.weight.original1", ".weight_v"),
    ],
)
def test_names_that_are_spelled_otherwise_are_one(method: str, here: str, there: str) -> None:
    more = (
        *("embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"),
        *("conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"),
    )
    states = [llama(i) | {name: torch.full((2,), i + 1.0) for name in more} for i in range(3)]
    other = {name.replace(here, there): tensor for name, tensor in states[2].items()}
    expected = merged(method, *states)
    assert other.keys() != states[2].keys()
    assert same(merged(method, *states[:2], other), expected)
    old = [{name.replace(here, there): tensor for name, tensor in state.items()} for state in states]
    assert same(merged(method, *old[:2], states[2]), merged(method, *old))


def test_two_spellings_in_one_model_are_two_tensors() -> None:
    odd = llama(1) | {"model.LayerNorm.gamma": torch.ones(2), "model.LayerNorm.weight": torch.ones(2)}
    (line,) = problems("dare_ties", llama(0) | {"model.LayerNorm.weight": torch.ones(2)}, odd)
    assert line.startswith("model.LayerNorm.gamma: in model 0, but not in the base model")


def test_layers_with_tensors_of_their_own_in_both_models_are_refused() -> None:
    """As fused and separate projections: each model would lack a part of the union."""
    other = {name.replace("q_proj", "qkv_proj"): tensor for name, tensor in llama(1).items()}
    (line,) = problems("linear", llama(0), other)
    assert "self_attn.qkv_proj.weight" in line and "allow: [names]" in line
    assert merged("linear", llama(0), other, allow=["names"]).keys() == llama(0).keys() | other.keys()
    (line,) = problems("dare_ties", llama(0), other)
    assert "self_attn.qkv_proj.weight" in line


@pytest.mark.parametrize("method", ["dare_ties"])
def test_the_pattern_that_a_message_proposes_leaves_out_all_that_the_base_lacks(method: str) -> None:
    """In each layer, so that no start of the names is theirs alone."""
    biases = {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(2) for i in range(4)}
    (line,) = problems(method, llama(0), llama(1) | biases)
    assert 'exclude: ["model.layers.*.self_attn.q_proj.bias"]' in line
    keys = {"exclude": ["model.layers.*.self_attn.q_proj.bias"]}
    assert merged(method, llama(0), llama(1) | biases, tensors=keys).keys() == llama(0).keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_tensors_is_named(method: str) -> None:
    assert problems(method, llama(0), llama(1), {}) == [
        f"model {1 + (method == 'linear')}: holds no tensors to merge; name another model"
    ]
    assert "holds no tensors to merge" in problems(method, {}, llama(1))[0]


def vision_and_text(seed: int) -> State:
    text = {name.replace("model.", "model.language_model."): t for name, t in llama(seed).items()}
    return text | {f"model.visual.blocks.{i}.up.weight": torch.ones(2) for i in range(40)}


@pytest.mark.parametrize("method", METHODS)
def test_a_prefix_of_a_part_is_named_with_the_key_that_maps_it(method: str) -> None:
    states = [llama(0), llama(1), vision_and_text(2)]
    (line,) = problems(method, *states)
    assert '"model.language_model."' in line and "model.visual.blocks.0.up.weight" in line
    assert 'tensors: {rename: {"model.language_model.": "model."}}' in line
    keys = {"rename": {"model.language_model.": "model."}, "exclude": ["model.visual.*"]}
    expected = merged(method, *states[:2], llama(2))
    assert same(merged(method, *states, tensors=keys), expected)


def test_the_key_that_a_message_proposes_maps_all_names(save_checkpoint: SaveCheckpoint) -> None:
    """transformers 4.52 moved both towers of such models."""
    states = [vision_and_text(i) for i in range(2)]
    earlier = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in states[1].items()
    }
    a, b = save_checkpoint("a", states[0]), save_checkpoint("b", earlier)
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(a)}, {"model": str(b)}],
        "parameters": {"weight": 1},
    }
    with pytest.raises(me.PlanError) as caught:
        me.plan(recipe)
    (line,) = caught.value.problems
    recipe["models"][1]["tensors"] = yaml.safe_load(line[line.index("{rename") : line.index("}}") + 2])
    found = me.run(recipe).tensors
    assert found is not None and same(found, merged("linear", *states))


@pytest.mark.parametrize("method", METHODS)
def test_models_that_share_no_names_are_refused_in_one_line(method: str) -> None:
    other = {f"h.{i}.c_attn.{j}": torch.ones(2) for i in range(10) for j in range(100)}
    (line,) = problems(method, llama(0), llama(1), other)
    assert "shares no names of tensors" in line and line.startswith("model ")
    assert "h.0.c_attn.0, h.0.c_attn.1, h.0.c_attn.10 and 997 more" in line
    assert len(line) < 600


def test_what_the_recipe_allows_is_merged_with_a_warning(save_checkpoint: SaveCheckpoint) -> None:
    states = {"a": llama(0), "b": {"x.weight": torch.ones(2)}, "c": llama(2, layers=6)}
    a, b, c = (save_checkpoint(name, state) for name, state in states.items())
    for other, kind in ((b, "names"), (c, "layers")):
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(a)}, {"model": str(other)}],
            "parameters": {"weight": 1},
        }
        with pytest.raises(
            me.PlanError, match=rf'; if this is meant, add "allow: \[{kind}\]" to the recipe$'
        ):
            me.plan(recipe)
        result = me.run(recipe | {"allow": [kind]})
        (warning,) = result.warnings
        assert str(other) in warning and "; " not in warning
        assert result.tensors is not None
        assert result.tensors.keys() == states["a"].keys() | states[other.name].keys()


def test_layers_are_counted() -> None:
    (line,) = problems("linear", llama(0, layers=2), llama(1, layers=4))
    assert "model.layers: the models have different numbers of layers: 2 in model 0, 4 in model 1" in line
    (line,) = problems("dare_ties", llama(0, layers=4), llama(1, layers=2))
    assert "4 in the base model, 2 in model 0" in line and "allow: [layers]" in line
    fewer = merged("dare_ties", llama(0, layers=4), llama(1, layers=2), allow=["layers"])
    assert fewer.keys() == llama(0, layers=4).keys()
    (line,) = problems("dare_ties", llama(0, layers=2), llama(1, layers=4), llama(2, layers=2))
    assert "2 in the base model, 4 in model 0" in line
    assert 'tensors: {exclude: ["model.layers.2.*"]}' in line and "allow" not in line
    exclude = {"exclude": ["model.layers.[23].*"]}
    found = merged("dare_ties", llama(0, layers=2), llama(1, layers=4), llama(2, layers=2), tensors=exclude)
    assert found.keys() == llama(0, layers=2).keys()


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_named(method: str) -> None:
    adapter = {
        f"base_model.model.model.layers.{i}.mlp.up_proj.lora_{side}.weight": torch.ones(2)
        for i in range(4)
        for side in "AB"
    }
    (line,) = problems(method, llama(0), llama(1), adapter)
    assert "8 tensors of an adapter" in line and "merge the adapter into its model" in line


@pytest.mark.parametrize("head", ("score.weight", "v_head.summary.weight", "classifier.out_proj.weight"))
def test_heads_of_another_task_stay_allowed(head: str) -> None:
    one = llama(0, head=False)
    other = llama(1, head=False) | {head: torch.ones(2)}
    found = merged("linear", one, other)
    assert torch.equal(found[head], other[head])
    (line,) = problems("dare_ties", one, other)
    assert head in line and "not in the base model" in line and f'exclude: ["{head}"]' in line


def test_what_the_base_lacks_is_one_line() -> None:
    extra = {f"extra.{i}.weight": torch.ones(2) for i in range(9)}
    (line,) = problems("dare_ties", llama(0), llama(1) | extra, llama(2) | extra)
    assert "in model 0, model 1, but not in the base model" in line and 'exclude: ["extra.*"]' in line
    assert merged("dare_ties", llama(0), llama(1) | extra, tensors={"exclude": ["extra.*"]})


names = st.sets(st.sampled_from([f"{a}.{b}" for a in "abc" for b in ("x", "y", "weight")]), min_size=1)


@given(one=names, other=names)
def test_without_a_base_the_union_is_merged_if_at_least_half_is_shared(
    one: set[str], other: set[str]
) -> None:
    states = [{name: torch.full((2,), value) for name in held} for held, value in ((one, 1.0), (other, 3.0))]
    found = merged("linear", *states, allow=["names"])
    if found.keys() <= one and found.keys() != one | other:
        return  # a prefix was mapped
    assert found.keys() == one | other
    for name, tensor in found.items():
        assert tensor[0] == (2 if name in one & other else 1 if name in one else 3)
    if 2 * len(one & other) < max(len(one), len(other)):
        problems("linear", *states)


@given(part=st.sets(st.sampled_from(sorted(llama(0))), min_size=1))
def test_a_base_decides_what_there_is(part: set[str]) -> None:
    model = {name: tensor for name, tensor in llama(1).items() if name in part}
    found = merged("dare_ties", llama(0), model, allow=["names", "layers"])
    assert found.keys() == llama(0).keys()
    for name in found.keys() - part:
        assert torch.equal(found[name], llama(0)[name])


prefixes = st.sampled_from(("", "a.", "model.", "model.layers."))


@given(old=prefixes, new=prefixes, method=st.sampled_from(METHODS))
def test_renaming_is_as_if_the_models_had_these_names(old: str, new: str, method: str) -> None:
    states = [llama(i) for i in range(3)]
    mapped = [
        {new + n[len(old) :] if n.startswith(old) else n: t for n, t in state.items()} for state in states
    ]
    if len(mapped[0]) < len(states[0]):
        (line,) = problems(method, *states, tensors={"rename": {old: new}})
        assert "for two tensors" in line
        return
    assert same(merged(method, *states, tensors={"rename": {old: new}}), merged(method, *mapped))


@given(kept=st.sets(st.sampled_from(sorted(llama(0))), min_size=1), method=st.sampled_from(METHODS))
def test_leaving_out_is_as_if_the_models_lacked_these_tensors(kept: set[str], method: str) -> None:
    states = [llama(i) for i in range(3)]
    exclude = [name for name in states[0] if name not in kept]
    less = [{name: tensor for name, tensor in state.items() if name in kept} for state in states]
    assert same(merged(method, *states, tensors={"exclude": exclude}), merged(method, *less))


def test_a_model_has_names_of_its_own(save_checkpoint: SaveCheckpoint) -> None:
    a = save_checkpoint("a", llama(0))
    b = save_checkpoint("b", vision_and_text(1))
    keys = {"rename": {"model.language_model.": "model."}, "exclude": ["model.visual.*"]}
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(a)}, {"model": str(b), "tensors": keys}],
        "parameters": {"weight": 1},
    }
    found = me.run(recipe).tensors
    assert found is not None and same(found, merged("linear", llama(0), llama(1)))
    loaded = me.load_recipe(recipe)
    assert me.load_recipe(loaded.to_yaml()) == loaded


def test_entries_that_fit_nothing_are_warned_of(save_checkpoint: SaveCheckpoint) -> None:
    a, b = (save_checkpoint(name, llama(i)) for i, name in enumerate("ab"))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(a), "tensors": {"rename": {"nodel.": ""}}}, {"model": str(b)}],
        "parameters": {"weight": 1},
        "tensors": {"exclude": ["lm_head.weight", "visual.*"]},
    }
    result = me.run(recipe)
    assert result.warnings == [
        'tensors.exclude[1]: "visual.*": no tensor\'s name matches it',
        'models[0].tensors.rename: "nodel.": no tensor\'s name begins with it',
    ]
    assert result.tensors is not None and "lm_head.weight" not in result.tensors


def test_leaving_everything_out_is_a_problem() -> None:
    assert problems("linear", llama(0), tensors={"exclude": ["*"]}) == [
        "tensors.exclude: no tensor is left to merge; leave out fewer"
    ]


@pytest.mark.parametrize(
    ("tensors", "said"),
    (
        ({"exclud": []}, 'unknown key "tensors.exclud"; did you mean "exclude"?'),
        ({"exclude": "a"}, 'tensors.exclude: must be a list, not "a"'),
        ({"exclude": [1]}, "tensors.exclude[0]: must be text, not 1"),
        ({"rename": {"a": 1}}, "tensors.rename.a: must be text, not 1"),
        (5, "tensors: must be a map of keys to values, not 5"),
    ),
)
def test_wrong_keys(tensors: object, said: str) -> None:
    with pytest.raises(me.RecipeError) as caught:
        me.load_recipe({"merge_method": "linear", "models": [{"model": "a"}], "tensors": tensors})
    assert str(caught.value) == said
    with pytest.raises(me.RecipeError) as caught:
        me.load_recipe({"merge_method": "linear", "models": [{"model": "a", "tensors": tensors}]})
    assert str(caught.value) == said.replace("tensors", "models[0].tensors", 1)


def change_all(change: Callable[[str, torch.Tensor], torch.Tensor]) -> State:
    return {name: change(name, tensor) for name, tensor in llama(1).items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "said"),
    (
        (
            lambda name, t: torch.ones(7, 4) if "embed" in name or "head" in name else t,
            "model.embed_tokens.weight, lm_head.weight: the vocabularies have different sizes: 6 in ",
        ),
        (lambda name, t: t.T.contiguous() if "proj" in name else t, "one is the other transposed"),
        (lambda name, t: torch.ones(6, 5), "most often 4 against 5; merge models of one size"),
        (lambda name, t: t.to(torch.uint8), "these types cannot be merged with each other: float32 in"),
    ),
)
def test_tensors_that_do_not_fit_are_one_line(
    method: str, change: Callable[[str, torch.Tensor], torch.Tensor], said: str
) -> None:
    (line,) = problems(method, llama(0), llama(2), change_all(change))
    assert said in line and len(line) < 500
