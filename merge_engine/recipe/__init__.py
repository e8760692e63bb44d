"""What to merge: the validated model of a recipe, which is mergekit's YAML plus our own keys.

``load_recipe`` reads a recipe and reports everything wrong with it at once; ``ParameterResolver`` then
says which value each parameter takes for each model and tensor.
"""

from merge_engine.recipe.gradients import layer_of, layer_positions
from merge_engine.recipe.loading import load_recipe
from merge_engine.recipe.parameters import Parameter, declared, parameter
from merge_engine.recipe.reference import ModelReference
from merge_engine.recipe.resolver import ParameterResolver
from merge_engine.recipe.schema import ModelEntry, Recipe
from merge_engine.recipe.settings import ParameterSetting, Scalar

__all__ = [
    "ModelEntry",
    "ModelReference",
    "Parameter",
    "ParameterResolver",
    "ParameterSetting",
    "Recipe",
    "Scalar",
    "declared",
    "layer_of",
    "layer_positions",
    "load_recipe",
    "parameter",
]
