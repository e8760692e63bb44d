"""Recipes: mergekit's YAML with some keys of our own, checked.

``load_recipe`` reads a recipe and reports all its problems at once. ``Recipe.stacks`` is the one form of
all recipes, and ``resolvers`` give the value of each parameter for each model and tensor.
"""

from merge_engine.recipe.documents import parts_of
from merge_engine.recipe.gradients import layer_of, layer_positions
from merge_engine.recipe.loading import RecipeSource, load_recipe, load_recipes
from merge_engine.recipe.parameters import Parameter, declared, parameter
from merge_engine.recipe.reference import ModelReference
from merge_engine.recipe.resolver import ParameterResolver, resolvers
from merge_engine.recipe.schema import Misfit, ModelEntry, Recipe
from merge_engine.recipe.settings import ParameterSetting, Rule, Scalar, rules
from merge_engine.recipe.stacks import Module, Scope, Slice, Source, Stacks
from merge_engine.recipe.tensor_names import TensorNames, exclude_key, rename_key
from merge_engine.recipe.tokenizer import TokenizerSettings

__all__ = [
    "Misfit",
    "ModelEntry",
    "ModelReference",
    "Module",
    "Parameter",
    "ParameterResolver",
    "ParameterSetting",
    "Recipe",
    "RecipeSource",
    "Rule",
    "Scalar",
    "Scope",
    "Slice",
    "Source",
    "Stacks",
    "TensorNames",
    "TokenizerSettings",
    "declared",
    "exclude_key",
    "layer_of",
    "layer_positions",
    "load_recipe",
    "load_recipes",
    "parameter",
    "parts_of",
    "rename_key",
    "resolvers",
    "rules",
]
