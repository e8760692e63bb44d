"""Changes of a recipe, as sweeps, searches and sessions name them: a parameter, one model's parameter, or a key.

- ``density`` is a parameter of the method. It holds for all models and tensors, in place of what the recipe, its models
  and its slices say. A list gives one value a model if each model has its own; for other parameters it is a gradient,
  as in a recipe.
- ``density[1]`` is the parameter of one model. Models are counted from 0 in the recipe's order, without the base.
- ``dtype`` is a key of the recipe.

The value None takes a parameter or a key out of the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from merge_engine.errors import RecipeError
from merge_engine.recipe.loading import read_yaml, validated
from merge_engine.recipe.parameters import Parameter
from merge_engine.recipe.problems import InvalidValue, suggestion
from merge_engine.recipe.resolver import typed_rules
from merge_engine.recipe.schema import Recipe
from merge_engine.recipe.settings import ParameterSetting, read_setting
from merge_engine.text import counted, shown

KEYS = tuple(key for key in Recipe.model_fields if key not in ("models", "slices", "modules", "parameters"))
"""The keys of a recipe that a change may name."""

_OF_ONE_MODEL = re.compile(r"(.+)\[([0-9]{1,9})\]")


class Declaring(Protocol):
    """A method, as far as changes know it."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters that a recipe may set."""


def changed(recipe: Recipe, changes: Mapping[str, object], find_method: Callable[[str], Declaring]) -> Recipe:
    """The recipe with other values; see the module's text for the names.

    ``find_method`` gives the method of a name, or raises ``RecipeError``. Values of parameters may have each form that
    a recipe knows. Raises ``RecipeError`` with one line for each name that does not exist and each value that is not
    allowed.
    """
    problems: list[str] = []
    method_name: Any = changes.get("merge_method", recipe.merge_method)
    declared = {each.name: each for each in find_method(method_name).parameters}
    settings = {name: value for name, value in changes.items() if parameter_of(name) in declared}
    keys = {name: value for name, value in changes.items() if name not in settings and name in KEYS}
    problems += [
        f"{name}: {no_change(name, method_name, [*declared, *KEYS])}"
        for name in changes
        if name not in settings and name not in keys
    ]
    result = recipe
    if keys:
        plain = recipe.to_plain() | keys
        try:
            result = validated(
                {key: value for key, value in plain.items() if value is not None}, "", False, recipe.remarks
            )
        except RecipeError as error:
            problems += error.problems
    changer = _Changer(result, declared, problems)
    for name in sorted(settings, key=lambda name: name not in declared):  # those of single models come last
        changer.change(name, settings[name])
    if problems:
        raise RecipeError(problems)
    return changer.recipe


def parse_change(text: str) -> tuple[str, list[object]]:
    """The name and the values of ``density=0.2,0.5``.

    Values are separated by commas and written as in YAML; one of them may be a list or a map, in brackets. Raises
    ``RecipeError``.
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise RecipeError(f"{shown(text)}: must be NAME=VALUE, or NAME=VALUE,VALUE, such as density=0.2,0.5")
    if not values.strip():
        raise RecipeError(f"{name}: has no value; write {name}=VALUE, or {name}=VALUE,VALUE")
    documents = read_yaml(f"[{values}\n]", f"{name}: ", False)
    parsed = documents[0][0]
    if len(documents) > 1 or not isinstance(parsed, list):
        raise RecipeError(f"{name}: must be values as in YAML, separated by commas, not {shown(values)}")
    return name, parsed


class _Changer:
    """A recipe whose parameters are changed, one after the other."""

    def __init__(self, recipe: Recipe, declared: Mapping[str, Parameter], problems: list[str]):
        self.recipe = recipe
        self._declared = declared
        self._problems = problems
        stacks = recipe.stacks
        self._places = [scope.place for scope in stacks.scopes]
        merged: dict[int, list[str]] = {}
        for each in stacks.slices:
            for source in each.sources:
                if source.model != each.base:
                    merged.setdefault(source.position, []).append(source.settings.place)
        self._of_models = [merged[position] for position in sorted(merged)]

    def change(self, name: str, value: object) -> None:
        parameter = self._declared[parameter_of(name)]
        if name in self._declared:
            self._change_all(name, parameter, value)
        elif parameter.scope == "tensor":
            self._problems.append(f"{name}: holds for all models at once; write {parameter.name}")
        elif (model := int(name[len(parameter.name) + 1 : -1])) >= len(self._of_models):
            models = counted(len(self._of_models), "model")
            self._problems.append(f"{name}: the recipe merges {models}, which are counted from 0")
        else:
            self._set(self._of_models[model], name, parameter, value)

    def _change_all(self, name: str, parameter: Parameter, value: object) -> None:
        self.recipe = self.recipe.without(dict.fromkeys(self._places, (name,)))
        if parameter.scope == "tensor" or not _is_list(value):
            self._set(["parameters"], name, parameter, value)
        elif len(value) != len(self._of_models):
            self._problems.append(
                f"{name}: {counted(len(value), 'value')} for {counted(len(self._of_models), 'model')}; "
                "give one for each, or one for all"
            )
        else:
            for i, (places, each) in enumerate(zip(self._of_models, value, strict=True)):
                self._set(places, f"{name}[{i}]", parameter, each)

    def _set(self, places: Sequence[str], path: str, parameter: Parameter, value: object) -> None:
        """Give a parameter a value at some places. ``path`` names it in messages."""
        if value is None:
            self.recipe = self.recipe.without(dict.fromkeys(places, (parameter.name,)))
            return
        try:
            setting: ParameterSetting = read_setting(value)
        except InvalidValue as error:
            self._problems += [f"{path}{below}: {message}" for below, message in error.problems]
            return
        typed_rules(setting, path, parameter, self._problems)
        self.recipe = self.recipe.setting({place: {parameter.name: setting} for place in places})


def no_change(name: str, methods: str, known: Collection[str]) -> str:
    """Why a name is none of the ``known`` ones, the parameters of the methods and the keys that a change may name."""
    if name in Recipe.model_fields:
        return "cannot be changed; write another recipe"
    return f"is no parameter of {methods} and no key of a recipe{suggestion(parameter_of(name), known)}"


def parameter_of(name: str) -> str:
    """The name of the parameter in ``density`` and in ``density[1]``."""
    found = _OF_ONE_MODEL.fullmatch(name)
    return found[1] if found else name


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list of values. One of maps is a setting: each holds for some tensors."""
    return isinstance(value, list | tuple) and not (
        value and all(isinstance(each, Mapping) for each in value)
    )
