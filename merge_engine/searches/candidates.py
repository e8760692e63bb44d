"""The recipes of a space: whether each name and value means something, and what a proposal makes of a recipe.

If a search varies the method, a proposal has values for the parameters of all methods. Those that its own method does
not have are left out of its recipe. So are the recipe's own settings that this method does not have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

from merge_engine.errors import OptionError, RecipeError
from merge_engine.methods import find_method
from merge_engine.recipe import Parameter, Recipe, Scalar
from merge_engine.recipe.changes import KEYS, changed, no_change, parameter_of
from merge_engine.searches.space import Choices, Range, Space
from merge_engine.session.recipes import with_method
from merge_engine.text import shown

METHOD = "merge_method"
_NUMBERS = ("seed",)
"""The keys of a recipe whose values are numbers: whole ones."""


class Candidates:
    """The recipes that a space makes of one recipe."""

    def __init__(self, recipe: Recipe, space: Space):
        """Check every name, and the ends of every range and all choices.

        Raises ``OptionError`` with all problems: names that do not exist, values that are not allowed.
        """
        self.recipe = recipe
        self.space = space
        self.methods = _methods(recipe, space)
        problems: dict[str, None] = {}
        self._declared = {recipe.merge_method: _parameters_of(recipe.merge_method)}
        for method in self.methods:
            try:
                self._declared[method] = _parameters_of(method)
            except RecipeError as error:
                problems |= dict.fromkeys(error.problems)
        if not problems:
            for name, values in space.tried:
                problems |= dict.fromkeys(self._problems(name, values))
        if problems:
            raise OptionError([f"space: {line}" for line in problems])

    @cached_property
    def whole(self) -> Collection[str]:
        """The names whose ranges have whole numbers only."""
        return [name for name in self.space.varied if self._is_whole(name)]

    def values(self, proposed: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The values of a proposal that its method has, the fixed ones too."""
        varied = {name: self.space.varied[name].nearest(value) for name, value in proposed.items()}
        every = {**self.space.fixed, **varied}
        method = str(every.get(METHOD, self.recipe.merge_method))
        return {name: value for name, value in every.items() if self._has(method, name)}

    def recipe_of(self, proposed: Mapping[str, Scalar]) -> Recipe:
        """The recipe of a proposal. Raises ``RecipeError`` for values that do not go together."""
        values = self.values(proposed)
        method = str(values.get(METHOD, self.recipe.merge_method))
        return changed(self._for_method(method), values, find_method)

    @cached_property
    def unchanged(self) -> dict[str, Scalar] | None:
        """The proposal that changes nothing; None if the recipe does not lie in the space.

        What the recipe's method does not have is the first value that the space allows.
        """
        found: dict[str, Scalar] = {}
        for name, domain in self.space.varied.items():
            if self._has(self.recipe.merge_method, name):
                if name not in self.current or self.current[name] not in domain:
                    return None
                found[name] = self.current[name]
            else:
                found[name] = domain.tried[0]
        fixed = [name for name in self.space.fixed if self._has(self.recipe.merge_method, name)]
        return found if all(self._value(name) == self.space.fixed[name] for name in fixed) else None

    @cached_property
    def current(self) -> dict[str, Scalar]:
        """The values of the recipe itself, for those names for which it has one value."""
        own = [name for name in self.space.varied if self._has(self.recipe.merge_method, name)]
        values = {name: self._value(name) for name in own}
        return {name: self._as_given(name, value) for name, value in values.items() if value is not None}

    def probes(self, method: str) -> list[dict[str, Scalar]]:
        """Three proposals of a method: the lowest values, the highest, and those in the middle."""
        domains = {name: domain for name, domain in self.space.varied.items() if name != METHOD}
        own: dict[str, Scalar] = {METHOD: method} if METHOD in self.space.varied else {}
        ends = [{name: domain.tried[i] for name, domain in domains.items()} | own for i in (0, -1)]
        middle = {name: self._middle(name) for name in domains} | own
        return [*ends, middle]

    def _problems(self, name: str, values: tuple[Scalar, ...]) -> list[str]:
        methods = [method for method in self.methods if self._has(method, name)]
        if not methods:
            known = {each for method in self.methods for each in self._declared[method]} | {*KEYS}
            whose = " and ".join(self.methods)
            return [f"{name}: {no_change(name, whose, known)}"]
        if name == METHOD:
            return []
        domain = self.space.varied.get(name)
        if isinstance(domain, Range) and (wrong := self._wrong_range(name, methods, domain)):
            return [wrong]
        problems: dict[str, None] = {}
        for method in methods:
            for value in values:
                try:
                    changed(self._for_method(method), {METHOD: method, name: value}, find_method)
                except RecipeError as error:
                    problems |= dict.fromkeys(error.problems)
        return list(problems)

    def _wrong_range(self, name: str, methods: Collection[str], domain: Range) -> str | None:
        kinds = {self._declared[method][parameter_of(name)].kind for method in methods if name not in KEYS}
        if (name in KEYS and name not in _NUMBERS) or kinds & {bool, str}:
            return f"{name}: is no number; give a list of choices"
        ends = (domain.low, domain.high, domain.step or 1)
        if self._is_whole(name) and not all(float(each).is_integer() for each in ends):
            return f"{name}: must be a whole number; give a range and a step of whole numbers"
        return None

    def _is_whole(self, name: str) -> bool:
        if name in KEYS:
            return name in _NUMBERS
        having = [self._declared[method] for method in self.methods if self._has(method, name)]
        return any(declared[parameter_of(name)].kind is int for declared in having)

    def _has(self, method: str, name: str) -> bool:
        return name in KEYS or parameter_of(name) in self._declared[method]

    def _for_method(self, method: str) -> Recipe:
        return self.recipe if method == self.recipe.merge_method else with_method(self.recipe, method)

    def _value(self, name: str) -> Scalar | None:
        """The one value that the recipe has for a name; None if it has several, or none."""
        if name in KEYS:
            value = getattr(self.recipe, name)
            return value if isinstance(value, Scalar) else None
        parameter = self._declared[self.recipe.merge_method][parameter_of(name)]
        found: dict[int, set[object]] = {}
        for each in self.recipe.stacks.slices:
            for source in each.sources:
                if source.model != each.base:
                    settings = [source.settings, *each.scopes]
                    given = [
                        scope.settings[parameter.name]
                        for scope in settings
                        if parameter.name in scope.settings
                    ]
                    found.setdefault(source.position, set()).add(
                        _single(given[0] if given else None, parameter)
                    )
        models = [found[position] for position in sorted(found)]
        if name != parameter.name:  # of one model
            models = models[(model := int(name[len(parameter.name) + 1 : -1])) : model + 1]
        values = set().union(*models)
        value = values.pop() if len(values) == 1 else None
        return value if isinstance(value, Scalar) else None

    def _as_given(self, name: str, value: Scalar) -> Scalar:
        """The value as the space writes it: 0 where the recipe's default is 0.0."""
        domain = self.space.varied[name]
        same = [each for each in domain.values if each == value] if isinstance(domain, Choices) else []
        return same[0] if same else value

    def _middle(self, name: str) -> Scalar:
        domain = self.space.varied[name]
        if isinstance(domain, Choices):
            return domain.values[len(domain.values) // 2]
        if name in self.whole:
            step = int(domain.step or 1)
            return int(domain.low) + (int(domain.high) - int(domain.low)) // (2 * step) * step
        return domain.low + (domain.high - domain.low) / 2


def _methods(recipe: Recipe, space: Space) -> tuple[str, ...]:
    """The methods of the proposals. Raises ``OptionError`` if one is no text."""
    varied = space.varied.get(METHOD)
    if isinstance(varied, Range):
        raise OptionError(f"space: {METHOD}: must be a list of methods, not a range of numbers")
    methods = varied.values if varied else (space.fixed.get(METHOD, recipe.merge_method),)
    if wrong := [each for each in methods if not isinstance(each, str)]:
        raise OptionError(f"space: {METHOD}: must be the name of a method, not {shown(wrong[0])}")
    return tuple(map(str, methods))


def _parameters_of(method: str) -> Mapping[str, Parameter]:
    return {each.name: each for each in find_method(method).parameters}


def _single(setting: object, parameter: Parameter) -> Scalar | None:
    """The value of a setting that is one for all tensors."""
    if setting is None:
        return parameter.default
    return parameter.read(setting) if isinstance(setting, Scalar) else None
