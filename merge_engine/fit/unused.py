"""Settings of a recipe that change nothing."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from merge_engine.methods import Method
from merge_engine.recipe import ParameterSetting, Recipe, Rule, layer_of, rules
from merge_engine.text import counted, did_you_mean, shown

_SHOWN = 5
"""Entries of one setting that get a line of their own."""


@dataclass(frozen=True)
class SliceNames:
    """The names that the settings of a slice are for.

    ``output`` are those of the output's tensors, ``models`` those that each model that is merged has itself, by recipe
    position. ``layers`` is the number of layers, None if the slice is of whole models.
    """

    output: Collection[str]
    models: Mapping[int, Collection[str]]
    layers: int | None = None


def unused_settings(recipe: Recipe, method: Method, slices: Sequence[SliceNames]) -> list[str]:
    """A line for each setting that changes nothing, with its place in the recipe. ``slices`` are all of the recipe."""
    lines = []
    idle = set()
    names: dict[str, list[tuple[Collection[str], int | None]]] = {}
    for each, found in zip(recipe.stacks.slices, slices, strict=True):
        for source in each.sources:
            place = source.settings.place
            names.setdefault(place, []).append((found.models.get(source.position, ()), found.layers))
            if source.position not in found.models:
                idle.add(place)
                if source.settings.settings:
                    lines.append(f"{place}: not used, because {source.model} is the base")
        for scope in each.scopes:
            own = names.setdefault(scope.place, [])
            own.append((found.output, found.layers))
            if found.layers is not None:
                own += [(of_model, found.layers) for of_model in found.models.values()]
    lines += _overridden(recipe, method, slices)
    for scope in recipe.stacks.scopes:
        if scope.place in idle or not scope.settings:
            continue
        held, counts = zip(*names[scope.place], strict=True)
        known = held[0] if len(held) == 1 else dict.fromkeys(name for those in held for name in those)
        layers = None if None in counts else max(counts)
        if layers is None:
            layers = sys.maxsize if any(layer_of(name) is not None for name in known) else 0
        for key, setting in scope.settings.items():
            unused = _never_used(rules(setting, f"{scope.place}.{key}"), known, layers)
            lines += islice(unused, _SHOWN)
            if rest := sum(1 for _ in unused):
                lines.append(f"{scope.place}.{key}: {rest:,} more entries change nothing")
    return lines


def _never_used(given: Sequence[Rule], names: Collection[str], layers: int) -> Iterator[str]:
    """The rules that match no tensor or stand behind one that matches all, and gradients over too few layers."""
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
        elif len(rule.values) > 1 and not layers:
            yield f"{rule.path}: a gradient, but no tensor is in a layer; all take its first value"
        elif len(rule.values) > max(layers, 1):
            yield (
                f"{rule.path}: a gradient of {len(rule.values)} values over {counted(layers, 'layer')}; some of them "
                "are never used"
            )
        for_all = for_all or rule.filter is None


def _parts(names: Collection[str], length: int) -> set[str]:
    """The parts of names, of so many words between dots. Those with a number are left out: each layer has them."""
    found = set()
    for name in names:
        words = name.split(".")
        for i in range(len(words) - length + 1):
            part = words[i : i + length]
            if not any(word.isdigit() for word in part):
                found.add(".".join(part))
    return found


def _overridden(recipe: Recipe, method: Method, slices: Sequence[SliceNames]) -> Iterator[str]:
    """Settings for all models where each model has its own for all tensors."""
    of_models = {parameter.name for parameter in method.parameters if parameter.scope == "model"}
    nearer = [
        [source.settings, *each.scopes[:-1]]
        for each, found in zip(recipe.stacks.slices, slices, strict=True)
        for source in each.sources
        if source.position in found.models
    ]
    for key in recipe.parameters.keys() & of_models:
        if nearer and all(any(_covers_all(scope.settings, key) for scope in scopes) for scopes in nearer):
            yield f"parameters.{key}: not used, because every model has its own"


def _covers_all(given: Mapping[str, ParameterSetting], key: str) -> bool:
    return key in given and any(rule.filter is None for rule in rules(given[key], ""))
