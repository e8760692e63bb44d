"""The value of each parameter for each model and tensor.

The settings of a source come before those of its slice, its module and the recipe, and these before the parameter's
default. In a setting, the first filter that matches wins; if none does, the next setting is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

from merge_engine.errors import RecipeError
from merge_engine.recipe.gradients import value_at
from merge_engine.recipe.parameters import Parameter
from merge_engine.recipe.problems import first, suggestion
from merge_engine.recipe.schema import Recipe
from merge_engine.recipe.settings import ParameterSetting, Rule, Scalar, rules
from merge_engine.recipe.stacks import Scope, Slice

Values: TypeAlias = Mapping[str, Scalar | None]
_Rules: TypeAlias = dict[str, list[Rule]]

_INT8_MASK = Parameter("int8_mask", bool, "tensor")
"""In mergekit it saves memory and changes no result: it is accepted for every method, and ignored."""


class ParameterResolver:
    """Looks up the values of a method's parameters in one slice of a recipe. ``resolvers`` makes them."""

    def __init__(self, tensor: _Lookup, models: Mapping[int, _Lookup]) -> None:
        self._tensor = tensor
        self._models = models

    def for_model(self, position: int, tensor: str, t: float) -> Values:
        """Values of the model-scope parameters for the model at a position and an input tensor at layer position t.

        Raises ``RecipeError`` if a required one is not set or a gradient of whole numbers falls between two.
        """
        return self._models[position].at(tensor, t)

    def for_tensor(self, tensor: str, t: float) -> Values:
        """Values of the tensor-scope parameters for an output tensor at layer position t.

        Raises ``RecipeError`` as ``for_model`` does.
        """
        return self._tensor.at(tensor, t)


def resolvers(recipe: Recipe, declared: Sequence[Parameter]) -> list[ParameterResolver]:
    """One for each slice of a recipe, in order, for the parameters that its method declares.

    Settings are checked once, so that look-ups are cheap. Raises ``RecipeError`` with one line for each setting that
    is misspelt, of the wrong kind, out of range or in the wrong place.
    """
    stacks = recipe.stacks
    compiled: dict[str, _Rules] = {}
    problems: list[str] = []
    of_sources = {source.settings.place for each in stacks.slices for source in each.sources}
    for scope in stacks.scopes:
        rules, found = _compile(scope, scope.place in of_sources, recipe.merge_method, declared)
        compiled[scope.place] = rules
        problems += found
    if problems:
        raise RecipeError(first(problems))
    return [_resolver(each, compiled, declared) for each in stacks.slices]


def _resolver(
    each: Slice, compiled: Mapping[str, _Rules], declared: Sequence[Parameter]
) -> ParameterResolver:
    common = [compiled[scope.place] for scope in each.scopes]
    nearest = each.scopes[0].place
    of_tensor = [p for p in declared if p.scope == "tensor"]
    of_model = [p for p in declared if p.scope == "model"]
    return ParameterResolver(
        _Lookup(_joined(common, of_tensor), of_tensor, "the recipe", nearest),
        {
            source.position: _Lookup(
                _joined([compiled[source.settings.place], *common], of_model),
                of_model,
                f"model {source.model}",
                source.settings.place,
            )
            for source in each.sources
        },
    )


def _joined(scopes: Sequence[_Rules], parameters: Iterable[Parameter]) -> _Rules:
    """The rules of each parameter, those of the nearest scope first."""
    return {p.name: [rule for rules in scopes for rule in rules.get(p.name, [])] for p in parameters}


class _Lookup:
    """The values of some parameters by tensor. Parameters with one value for all tensors are kept apart."""

    def __init__(self, given: _Rules, parameters: Iterable[Parameter], owner: str, place: str) -> None:
        self._owner = owner
        self._place = place
        self._fixed: dict[str, Scalar | None] = {}
        self._shown: Values = MappingProxyType(self._fixed)
        self._varying: list[tuple[Parameter, list[Rule]]] = []
        for parameter in parameters:
            in_order = given.get(parameter.name, [])
            if not in_order and not parameter.required:
                self._fixed[parameter.name] = parameter.default
            elif in_order and in_order[0].filter is None and len(in_order[0].values) == 1:
                self._fixed[parameter.name] = in_order[0].values[0]
            else:
                self._varying.append((parameter, in_order))

    def at(self, tensor: str, t: float) -> Values:
        if not self._varying:
            return self._shown  # one object for all tensors, so that a caller converts it once
        values = self._fixed.copy()
        for parameter, in_order in self._varying:
            values[parameter.name] = self._value(parameter, in_order, tensor, t)
        return values

    def _value(self, parameter: Parameter, in_order: list[Rule], tensor: str, t: float) -> Scalar | None:
        for rule in in_order:
            if rule.filter is None or rule.filter in tensor:
                value = value_at(rule.values, t)
                return _whole(value, rule.path, tensor) if parameter.kind is int else value
        if parameter.required:
            raise RecipeError(
                f"{self._place}.{parameter.name}: required, but {self._owner} has no value for tensor "
                f'"{tensor}"; add the key, or an entry without a filter'
            )
        return parameter.default


def _whole(value: Scalar, path: str, tensor: str) -> int:
    number = float(value)
    if not number.is_integer():
        raise RecipeError(
            f'{path}: must be a whole number, but its gradient gives {number:g} for tensor "{tensor}"'
        )
    return int(number)


def _compile(
    scope: Scope, of_model: bool, method: str, declared: Iterable[Parameter]
) -> tuple[_Rules, list[str]]:
    """The rules of each setting with values of the right kind, and a line for each problem.

    ``of_model``: the settings are those of one model.
    """
    known = {_INT8_MASK.name: _INT8_MASK} | {parameter.name: parameter for parameter in declared}
    compiled: _Rules = {}
    problems: list[str] = []
    for name, setting in scope.settings.items():
        path = f"{scope.place}.{name}"
        parameter = known.get(name)
        if parameter is None:
            problems.append(f"{path}: unknown parameter for {method}{suggestion(name, known)}")
        elif parameter is not _INT8_MASK and parameter.scope == "tensor" and of_model:
            problems.append(f"{path}: holds for all models at once; move it to the top-level parameters")
        else:
            compiled[name] = typed_rules(setting, path, parameter, problems)
    return compiled, problems


def typed_rules(
    setting: ParameterSetting, path: str, parameter: Parameter, problems: list[str]
) -> list[Rule]:
    """The rules of a setting with values of the parameter's kind. Adds a line for each problem to ``problems``.

    ``path``: the place of the setting in the recipe.
    """
    if parameter.constant and isinstance(setting, list | dict):
        problems.append(f"{path}: must be a single value, {parameter.allowed}; no gradient and no filter")
    return [_typed(rule, parameter, problems) for rule in rules(setting, path)]


def _typed(rule: Rule, parameter: Parameter, problems: list[str]) -> Rule:
    """The rule with its values as the parameter's kind."""
    values = []
    for index, raw in enumerate(rule.values):
        try:
            values.append(parameter.read(raw))
        except ValueError as error:
            problems.append(f"{rule.path}{f'[{index}]' if len(rule.values) > 1 else ''}: {error}")
    return replace(rule, values=tuple(values))
