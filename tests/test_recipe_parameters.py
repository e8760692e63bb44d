"""The value of a parameter: precedence, filters, gradients, kinds, ranges and layer positions."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.errors import RecipeError
from merge_engine.recipe import Parameter, ParameterResolver, layer_positions, load_recipe, resolvers

DECLARED = (
    Parameter("weight", float, "model", required=True),
    Parameter("density", float, "model", default=1.0, minimum=0, maximum=1),
    Parameter("slack", float, "model", default=0.0, minimum=0, maximum=1, exclusive_maximum=True),
    Parameter("eps", float, "tensor", default=1e-8, minimum=0, exclusive_minimum=True),
    Parameter("scale", float, "model"),
    Parameter("max_iter", int, "tensor", default=10, minimum=1),
    Parameter("normalize", bool, "tensor", default=True),
    Parameter("ties", str, "tensor", default="spread", choices=("spread", "index", "all")),
    Parameter("rescale", str, "tensor", default="false", choices=("true", "false", "density")),
    Parameter("scope", str, "tensor", default="tensor", choices=("tensor", "model"), constant=True),
    Parameter("label", str, "tensor"),
    Parameter("lambda", float, "tensor", default=1.0),
)
ATTENTION = "model.layers.1.self_attn.q_proj.weight"
MLP = "model.layers.1.mlp.up_proj.weight"


def resolver(own: str = "{}", top: str = "{}", method: str = "ties") -> ParameterResolver:
    """For a recipe of one model; settings as YAML, for the model and for all."""
    recipe = load_recipe(
        f"merge_method: {method}\nmodels:\n- model: a\n  parameters: {own}\nparameters: {top}\n"
    )
    return resolvers(recipe, DECLARED)[0]


def refused(own: str = "{}", top: str = "{}") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolver(own, top)
    return str(caught.value).split("\n")


# Observed with mergekit 0.1.5: MergeConfiguration and ConfigReader (one slice, position t) handed to
# resolve_parameters with the specification of `ties`, `karcher` or `passthrough`, and the result printed.
# Model settings, top-level settings, tensor, t, parameter, value.
OBSERVED_FOR_MODELS = [
    ("{weight: 0.3}", "{}", ATTENTION, 0.0, "weight", 0.3),
    ("{weight: 1}", "{}", ATTENTION, 0.0, "weight", 1.0),
    ("{weight: 1e-3}", "{}", ATTENTION, 0.0, "weight", 0.001),
    ("{weight: '1e-3'}", "{}", ATTENTION, 0.0, "weight", 0.001),
    ("{weight: -1.5}", "{}", ATTENTION, 0.5, "weight", -1.5),
    ("{weight: [0, 1]}", "{}", ATTENTION, 1 / 3, "weight", 0.3333333333333333),
    ("{weight: [0, 0.5, 1]}", "{}", ATTENTION, 1 / 3, "weight", 0.3333333333333333),
    ("{weight: [1, 0.2, 0.7, 0.1]}", "{}", ATTENTION, 5 / 31, "weight", 0.6129032258064516),
    ("{weight: [1, 0.2, 0.7, 0.1]}", "{}", ATTENTION, 1.0, "weight", 0.1),
    ("{weight: [0.4]}", "{}", ATTENTION, 0.5, "weight", 0.4),
    ("{weight: ['1e-1', 1e-3]}", "{}", ATTENTION, 0.25, "weight", 0.07525000000000001),
    ("{weight: {filter: mlp, value: 0.7}}", "{weight: 0.2}", MLP, 0.5, "weight", 0.7),
    ("{weight: {filter: mlp, value: 0.7}}", "{weight: 0.2}", ATTENTION, 0.5, "weight", 0.2),
    ("{weight: {value: 0.7}}", "{weight: 0.2}", ATTENTION, 0.5, "weight", 0.7),
    ("{weight: {filter: mlp, value: [0, 1]}}", "{}", MLP, 0.25, "weight", 0.25),
    (
        "{weight: [{filter: q_proj, value: 0.1}, {filter: self_attn, value: 0.9}, {value: 0.5}]}",
        "{}",
        ATTENTION,
        0.5,
        "weight",
        0.1,
    ),
    (
        "{weight: [{filter: self_attn, value: 0.9}, {filter: q_proj, value: 0.1}]}",
        "{}",
        ATTENTION,
        0.5,
        "weight",
        0.9,
    ),
    (
        "{weight: [{filter: '*', value: 0.4}, {filter: q_proj, value: 0.1}]}",
        "{}",
        ATTENTION,
        0.5,
        "weight",
        0.4,
    ),
    ("{weight: [{filter: 'q_*', value: 0.4}, {value: 0.1}]}", "{}", ATTENTION, 0.5, "weight", 0.1),
    ("{weight: [{filter: '', value: 0.4}, {value: 0.1}]}", "{}", ATTENTION, 0.5, "weight", 0.4),
    ("{weight: 1}", "{density: [0.2, 0.8]}", ATTENTION, 0.5, "density", 0.5),
    (
        "{weight: 1, density: {filter: mlp, value: 0.3}}",
        "{density: {filter: lm_head, value: 0.1}}",
        ATTENTION,
        0.5,
        "density",
        1.0,
    ),
    ("{weight: 1, scale: [1, 2]}", "{}", ATTENTION, 0.3, "scale", 1.2999999999999998),
]
OBSERVED_FOR_TENSORS = [
    ("{normalize: [true, false, true]}", ATTENTION, 0.5, "normalize", False),
    ("{normalize: [true, false, true]}", ATTENTION, 0.75, "normalize", False),
    ("{normalize: [{filter: q_proj, value: false}]}", ATTENTION, 0.75, "normalize", False),
    ("{normalize: 1}", ATTENTION, 0.75, "normalize", True),
    ("{normalize: 0}", ATTENTION, 0.75, "normalize", False),
    ("{normalize: 'false'}", ATTENTION, 0.75, "normalize", False),
    ("{normalize: 'no'}", ATTENTION, 0.75, "normalize", False),
    ("{max_iter: [5, 10]}", ATTENTION, 1.0, "max_iter", 10),
    ("{max_iter: 10.0}", ATTENTION, 1.0, "max_iter", 10),
]


@pytest.mark.parametrize(("own", "top", "tensor", "t", "name", "value"), OBSERVED_FOR_MODELS)
def test_values_for_models_are_those_of_mergekit(
    own: str, top: str, tensor: str, t: float, name: str, value: float
) -> None:
    found = resolver(own, top).for_model(0, tensor, t)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("top", "tensor", "t", "name", "value"), OBSERVED_FOR_TENSORS)
def test_values_for_tensors_are_those_of_mergekit(
    top: str, tensor: str, t: float, name: str, value: bool | int
) -> None:
    found = resolver(top=top).for_tensor(tensor, t)[name]
    assert found == value and type(found) is type(value)


def test_defaults() -> None:
    resolve = resolver("{weight: 1}")
    assert resolve.for_model(0, MLP, 0.0) == {"weight": 1.0, "density": 1.0, "slack": 0.0, "scale": None}
    assert resolve.for_tensor(MLP, 0.0) == {
        "eps": 1e-8,
        "max_iter": 10,
        "normalize": True,
        "ties": "spread",
        "rescale": "false",
        "scope": "tensor",
        "label": None,
        "lambda": 1.0,
    }


def test_each_model_has_its_own_values_even_if_named_twice() -> None:
    recipe = load_recipe(
        {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": {"weight": w}} for w in (0.1, 0.9)],
        }
    )
    resolve = resolvers(recipe, DECLARED)[0]
    assert [resolve.for_model(i, MLP, 0.0)["weight"] for i in range(2)] == [0.1, 0.9]


def test_values_given_out_are_not_the_resolvers_own() -> None:
    resolve = resolver("{weight: 1}")
    with pytest.raises(TypeError):
        resolve.for_model(0, MLP, 0.0)["weight"] = 7.0
    assert resolve.for_model(0, MLP, 0.0)["weight"] == 1.0


def test_lists_of_text_pick_one() -> None:
    resolve = resolver(top="{ties: [spread, index, all]}")
    assert [resolve.for_tensor(MLP, t)["ties"] for t in (0.0, 0.49, 0.5, 0.99, 1.0)] == [
        "spread",
        "spread",
        "index",
        "index",
        "all",
    ]


@pytest.mark.parametrize("given", ["true", "1", "1.0", "'1.0'", "on"])
@pytest.mark.parametrize("negated", [False, True])
def test_a_switch_may_be_a_number(given: str, negated: bool) -> None:
    """As tools write it that search for the best recipe."""
    if negated:
        given = {"true": "false", "on": "off"}.get(given, given.replace("1", "0"))
    assert resolver(top=f"{{normalize: {given}}}").for_tensor(MLP, 0.0)["normalize"] is not negated


@pytest.mark.parametrize(
    ("given", "value"),
    [("true", "true"), ("no", "false"), ("density", "density"), ("1.0", "true"), ("0", "false")],
)
def test_a_choice_may_be_spelt_as_a_yaml_switch(given: str, value: str) -> None:
    assert resolver(top=f"{{rescale: {given}}}").for_tensor(MLP, 0.0)["rescale"] == value


def test_any_text_goes_without_choices() -> None:
    assert resolver(top="{label: anything}").for_tensor(MLP, 0.0)["label"] == "anything"


def test_int8_mask_is_accepted_for_every_method_and_ignored() -> None:
    resolve = resolver("{weight: 1, int8_mask: 1.0}", "{int8_mask: true}", method="linear")
    assert "int8_mask" not in resolve.for_tensor(MLP, 0.0)
    assert "int8_mask" not in resolve.for_model(0, MLP, 0.0)


# --- refused settings


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("{densty: 1}", 'models[0].parameters.densty: unknown parameter for ties; did you mean "density"?'),
        ("{q: 1}", "models[0].parameters.q: unknown parameter for ties; known here: density, eps,"),
        (
            "{normalize: true}",
            "models[0].parameters.normalize: holds for all models at once; move it to the top",
        ),
        ("{weight: true}", "models[0].parameters.weight: must be a number, not true"),
        ("{weight: heavy}", 'models[0].parameters.weight: must be a number, not "heavy"'),
        ("{weight: .nan}", "models[0].parameters.weight: must be a number, not nan"),
        ("{weight: 'inf'}", 'models[0].parameters.weight: must be a number, not "inf"'),
        (f"{{weight: 1{'0' * 400}}}", "models[0].parameters.weight: must be a number, not 1000"),
        ("{weight: [0, true]}", "models[0].parameters.weight[1]: must be a number, not true"),
        ("{density: 1.5}", "models[0].parameters.density: must be a number with 0 <= density <= 1, not 1.5"),
        (
            "{density: -0.1}",
            "models[0].parameters.density: must be a number with 0 <= density <= 1, not -0.1",
        ),
        (
            "{density: [0.5, 2]}",
            "models[0].parameters.density[1]: must be a number with 0 <= density <= 1, not 2",
        ),
        (
            "{density: [{value: 0.5}, {filter: x, value: [0, '9']}]}",
            'models[0].parameters.density[1].value[1]: must be a number with 0 <= density <= 1, not "9"',
        ),
        ("{slack: 1}", "models[0].parameters.slack: must be a number with 0 <= slack < 1, not 1"),
    ],
)
def test_refused_settings_of_a_model(own: str, line: str) -> None:
    [found] = refused(own)
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("top", "line"),
    [
        ("{lamda: 1}", 'parameters.lamda: unknown parameter for ties; did you mean "lambda"?'),
        ("{eps: 0}", "parameters.eps: must be a number with 0 < eps, not 0"),
        ("{max_iter: 2.5}", "parameters.max_iter: must be a whole number with 1 <= max_iter, not 2.5"),
        ("{max_iter: '1e2'}", 'parameters.max_iter: must be a whole number with 1 <= max_iter, not "1e2"'),
        ("{max_iter: .inf}", "parameters.max_iter: must be a whole number with 1 <= max_iter, not inf"),
        ("{max_iter: true}", "parameters.max_iter: must be a whole number with 1 <= max_iter, not true"),
        ("{normalize: 2}", "parameters.normalize: must be true or false, not 2"),
        ("{normalize: maybe}", 'parameters.normalize: must be true or false, not "maybe"'),
        ("{ties: random}", 'parameters.ties: must be one of spread, index, all, not "random"'),
        ("{ties: true}", "parameters.ties: must be one of spread, index, all, not true"),
        ("{ties: 3}", "parameters.ties: must be one of spread, index, all, not 3"),
        ("{label: 3}", "parameters.label: must be text, not 3"),
        (
            "{scope: [tensor, model]}",
            "parameters.scope: must be a single value, one of tensor, model; no gradient",
        ),
        (
            "{scope: {value: model}}",
            "parameters.scope: must be a single value, one of tensor, model; no gradient",
        ),
        ("{int8_mask: 7}", "parameters.int8_mask: must be true or false, not 7"),
    ],
)
def test_refused_settings_for_all(top: str, line: str) -> None:
    [found] = refused(top=top)
    assert found.startswith(line)


def test_all_problems_are_reported_at_once() -> None:
    assert refused("{densty: 1, weight: x}", "{lamda: 1, density: 3}") == [
        'parameters.lamda: unknown parameter for ties; did you mean "lambda"?',
        "parameters.density: must be a number with 0 <= density <= 1, not 3",
        'models[0].parameters.densty: unknown parameter for ties; did you mean "density"?',
        'models[0].parameters.weight: must be a number, not "x"',
    ]


@pytest.mark.parametrize("own", ["{}", "{weight: {filter: mlp, value: 1}}"])
def test_a_required_value_that_is_missing(own: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolver(own).for_model(0, ATTENTION, 0.0)
    assert str(caught.value) == (
        f'models[0].parameters.weight: required, but model a has no value for tensor "{ATTENTION}"; '
        "add the key, or an entry without a filter"
    )


def test_a_required_value_of_the_tensor_that_is_missing() -> None:
    recipe = load_recipe({"merge_method": "slerp", "models": [{"model": "a"}]})
    resolve = resolvers(recipe, [Parameter("t", float, "tensor", required=True)])[0]
    with pytest.raises(
        RecipeError, match=r'^parameters\.t: required, but the recipe has no value for tensor "x"'
    ):
        resolve.for_tensor("x", 0.0)


def test_a_gradient_of_whole_numbers_must_not_fall_between_two() -> None:
    resolve = resolver(top="{max_iter: [5, 10]}")
    assert resolve.for_tensor(MLP, 0.2)["max_iter"] == 6
    with pytest.raises(
        RecipeError, match=r"^parameters\.max_iter: must be a whole number, but its gradient gives 7"
    ):
        resolve.for_tensor(MLP, 0.5)


# --- properties


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(0, 1))
def test_gradients_interpolate_as_numpy_does(points: list[float], t: float) -> None:
    recipe = load_recipe({"merge_method": "x", "models": [{"model": "a", "parameters": {"weight": points}}]})
    found = resolvers(recipe, DECLARED)[0].for_model(0, MLP, t)["weight"]
    expected = np.interp(t * (len(points) - 1), np.arange(len(points)), points)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)
    assert min(points) - 1e-9 <= float(found or 0) <= max(points) + 1e-9


filtered = st.lists(
    st.fixed_dictionaries(
        {"value": st.floats(-9, 9)}, optional={"filter": st.sampled_from(["*", "mlp", "x", ""])}
    ),
    min_size=1,
    max_size=3,
)


@given(
    own=filtered | st.none(),
    top=filtered | st.none(),
    tensor=st.sampled_from(["a.mlp", "a.x", "a.x.mlp", "b"]),
)
def test_a_models_own_settings_come_first_then_the_top_level_then_the_default(
    own: list[dict[str, object]] | None, top: list[dict[str, object]] | None, tensor: str
) -> None:
    as_parameters = [{} if setting is None else {"lambda": setting} for setting in (own, top)]
    recipe = load_recipe(
        {
            "merge_method": "x",
            "models": [{"model": "a", "parameters": as_parameters[0]}],
            "parameters": as_parameters[1],
        }
    )
    resolve = resolvers(recipe, [Parameter("lambda", float, "model", default=77.0)])[0]
    matching = [
        entry["value"]
        for entry in [*(own or []), *(top or [])]
        if entry.get("filter", "*") == "*" or str(entry["filter"]) in tensor
    ]
    assert resolve.for_model(0, tensor, 0.5)["lambda"] == [*matching, 77.0][0]


# --- layer positions


def test_layers_run_from_0_to_1_and_all_else_is_at_0() -> None:
    names = [f"model.layers.{i}.mlp.weight" for i in range(5)]
    rest = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert layer_positions([*names, *rest]) == dict(
        zip(names, (0, 0.25, 0.5, 0.75, 1.0), strict=True)
    ) | dict.fromkeys(rest, 0.0)


def test_the_only_layer_is_at_1() -> None:
    assert layer_positions(["layers.0.a", "layers.0.b"]) == {"layers.0.a": 1.0, "layers.0.b": 1.0}


def test_each_stack_is_counted_apart() -> None:
    names = [
        "visual.blocks.0.w",
        "visual.blocks.1.w",
        "visual.blocks.2.w",
        "model.layers.1.w",
        "model.layers.4.w",
    ]
    assert list(layer_positions(names).values()) == [0.0, 0.5, 1.0, 0.25, 1.0]


def test_the_first_number_is_the_layer() -> None:
    names = ["model.layers.0.experts.7.w", "model.layers.2.experts.0.w", "0.weight", "4.weight", "model.w.3"]
    assert list(layer_positions(names).values()) == [0.0, 1.0, 0.0, 1.0, 0.0]


@given(st.integers(1, 200))
def test_positions_follow_the_order_of_layers(count: int) -> None:
    positions = list(layer_positions(f"h.{i}.w" for i in range(count)).values())
    assert positions == sorted(set(positions)) and positions[-1] == 1.0
    assert count == 1 or positions[0] == 0.0


def test_lookups_are_cheap() -> None:
    declared = [Parameter(f"p{i}", float, "model", default=1.0) for i in range(8)]
    setting = [
        {"filter": "lm_head", "value": 0.1},
        {"filter": "mlp", "value": [0, 1]},
        {"value": [1, 0.5, 0]},
    ]
    models = [{"model": "a", "parameters": {p.name: setting for p in declared[:4]}}] * 4
    resolve = resolvers(load_recipe({"merge_method": "x", "models": models}), declared)[0]
    names = [f"model.layers.{i // 10}.part{i % 10}.weight" for i in range(10_000)]
    start = time.process_time()
    for name, t in layer_positions(names).items():
        for index in range(4):
            resolve.for_model(index, name, t)
    assert time.process_time() - start < 2  # about 0.3 s; the margin is for slow machines
