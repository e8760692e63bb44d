"""The one form of all recipes."""

from __future__ import annotations

from merge_engine.recipe import ModelReference, load_recipe, resolvers
from merge_engine.recipe.parameters import Parameter

SLICES = """\
merge_method: x
base_model: base
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {w: 1}}
      - {model: b, layer_range: [0, 4]}
    parameters: {w: {filter: mlp, value: 2}}
  - sources:
      - {model: b, layer_range: [2, 6]}
      - {model: a, layer_range: [2, 6]}
      - {model: a, layer_range: [0, 4], parameters: {w: 5}}
    base_model: other
parameters: {w: 3, t: [0, 1]}
"""


def test_models_are_one_slice_with_all_layers() -> None:
    recipe = load_recipe({"merge_method": "x", "models": [{"model": "a"}, {"model": "b"}, {"model": "a"}]})
    (module,) = recipe.stacks.modules
    (whole,) = module.slices
    assert module.name is None
    assert [(source.position, str(source.model), source.layers) for source in whole.sources] == [
        (0, "a", None),
        (1, "b", None),
        (2, "a", None),
    ]
    assert list(map(str, recipe.stacks.models)) == ["a", "b", "a"]


def test_a_position_stands_for_one_model_in_all_slices() -> None:
    stacks = load_recipe(SLICES).stacks
    places = [[(s.position, str(s.model), s.layers) for s in each.sources] for each in stacks.slices]
    assert places == [
        [(0, "a", range(4)), (1, "b", range(4))],
        [(1, "b", range(2, 6)), (0, "a", range(2, 6)), (2, "a", range(4))],
    ]
    assert [str(each.base) for each in stacks.slices] == ["base", "other"]
    assert list(map(str, load_recipe(SLICES).references)) == ["base", "other", "a", "b"]


def test_settings_of_source_slice_and_recipe() -> None:
    declared = [Parameter("w", float, "model"), Parameter("t", float, "tensor")]
    first, second = resolvers(load_recipe(SLICES), declared)
    assert first.for_model(0, "mlp", 0.0)["w"] == 1
    assert first.for_model(1, "mlp", 0.0)["w"] == 2
    assert first.for_model(1, "attn", 0.0)["w"] == 3
    assert second.for_model(1, "mlp", 0.0)["w"] == 3
    assert second.for_model(2, "mlp", 0.0)["w"] == 5
    assert second.for_tensor("mlp", 0.5)["t"] == 0.5


def test_modules_have_settings_of_their_own() -> None:
    models = [{"model": "a"}, {"model": "b", "parameters": {"w": 1}}]
    recipe = load_recipe(
        {
            "merge_method": "x",
            "modules": {"text": {"models": models, "parameters": {"w": 2}}, "vision": {"models": models}},
            "parameters": {"w": 3},
        }
    )
    text, vision = resolvers(recipe, [Parameter("w", float, "model")])
    assert [text.for_model(i, "x", 0.0)["w"] for i in (0, 1)] == [2, 1]
    assert [vision.for_model(i, "x", 0.0)["w"] for i in (0, 1)] == [3, 1]
    assert load_recipe(recipe.to_yaml()).stacks == recipe.stacks


def test_models_can_be_replaced() -> None:
    recipe = load_recipe(SLICES)
    moved = recipe.replacing({one: ModelReference(path=f"/there/{one}") for one in recipe.references})
    assert list(map(str, moved.references)) == ["/there/base", "/there/other", "/there/a", "/there/b"]
    assert moved.to_yaml() == recipe.to_yaml().replace("model: ", "model: /there/")
