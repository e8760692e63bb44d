"""Settings of a recipe that change nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

from merge_engine.methods import Method
from merge_engine.recipe import ParameterSetting, Recipe, Rule, layer_of, rules
from merge_engine.text import did_you_mean, shown

_SHOWN = 5
"""Entries of one setting that get a line of their own."""


def unused_settings(
    recipe: Recipe, method: Method, merged: Collection[int], names: Sequence[str]
) -> list[str]:
    """A line for each setting that changes nothing, with its place in the recipe.

    ``merged`` are the recipe positions of the models that are merged, ``names`` those of all tensors.
    """
    stacks = recipe.stacks
    lines = []
    idle = set()
    for source in (source for each in stacks.slices for source in each.sources):
        if source.position not in merged:
            idle.add(source.settings.place)
            if source.settings.settings:
                lines.append(f"{source.settings.place}: not used, because {source.model} is the base")
    lines += _overridden(recipe, method, merged)
    layered = any(layer_of(name) is not None for name in names)
    for scope in stacks.scopes:
        if scope.place in idle:
            continue
        for key, setting in scope.settings.items():
            found = _never_used(rules(setting, f"{scope.place}.{key}"), names, layered)
            lines += islice(found, _SHOWN)
            if rest := sum(1 for _ in found):
                lines.append(f"{scope.place}.{key}: {rest:,} more entries change nothing")
    return lines


def _never_used(given: Sequence[Rule], names: Sequence[str], layered: bool) -> Iterator[str]:
    """The rules that match no tensor or stand behind one that matches all, and gradients without layers."""
    for_all, unmatched = False, 0
    for rule in given:
        if for_all:
            yield f"{rule.path}: never used, because an entry before it is for all tensors; move it up"
        elif rule.filter is not None and not any(rule.filter in name for name in names):
            near = (
                did_you_mean(rule.filter, _parts(names, rule.filter.count(".") + 1))
                if unmatched < _SHOWN
                else ""
            )
            unmatched += 1
            yield f"{rule.path}: the filter {shown(rule.filter)} matches no tensor{near}"
        elif len(rule.values) > 1 and not layered:
            yield f"{rule.path}: a gradient, but no tensor is in a layer; all take its first value"
        for_all = for_all or rule.filter is None


def _parts(names: Sequence[str], length: int) -> set[str]:
    """The parts of names, of so many words between dots. Those with a number are left out: each layer has them."""
    found = set()
    for name in names:
        words = name.split(".")
        for i in range(len(words) - length + 1):
            part = words[i : i + length]
            if not any(word.isdigit() for word in part):
                found.add(".".join(part))
    return found


def _overridden(recipe: Recipe, method: Method, merged: Collection[int]) -> Iterator[str]:
    """Settings for all models where each model has its own for all tensors."""
    of_models = {parameter.name for parameter in method.parameters if parameter.scope == "model"}
    sources = [source for each in recipe.stacks.slices for source in each.sources]
    own = [source.settings.settings for source in sources if source.position in merged]
    for key in recipe.parameters.keys() & of_models:
        if own and all(_covers_all(given, key) for given in own):
            yield f"parameters.{key}: not used, because every model has its own"


def _covers_all(given: Mapping[str, ParameterSetting], key: str) -> bool:
    return key in given and any(rule.filter is None for rule in rules(given[key], ""))
