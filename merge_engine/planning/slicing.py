"""From whole models to the parts of them that each slice of the output is made of.

The layers of a slice get the numbers that they have in the output. Of what is outside of the layers, embeddings and all
else that is used before them come from the first slice of a module, norms and heads from its last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from merge_engine.checkpoint import LayerOrigin
from merge_engine.operands import Operand
from merge_engine.planning.inputs import Catalogue, Inputs
from merge_engine.planning.layer_ranges import Ranges, read_ranges
from merge_engine.planning.modules import Home, Stack, anatomy_of, find_homes, is_first
from merge_engine.recipe import Slice, Stacks, layer_of, layer_positions

Aliases = Mapping[int, Mapping[str, str]]
"""The tensors of an input that stand for others, by the id of its catalogue and the name of the other."""


@dataclass(frozen=True)
class Cut:
    """The tensors of the output that one slice gives.

    ``number`` is that of the slice among all of the recipe, from 0. ``inputs`` hold these tensors only, under the names
    that the output has. ``positions`` are the layer positions t of these names. ``own_names`` has the names in a model
    itself, where they differ, by recipe position and the output's name. ``layers`` is the number of layers; None for
    whole models.
    """

    number: int
    inputs: Inputs
    positions: Mapping[str, float]
    own_names: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    layers: int | None = None


class _Names(NamedTuple):
    """The names of one model in one module: those of each layer, and those outside of the layers."""

    layers: dict[int, list[str]]
    outside: list[str]


class Slicing:
    """What each slice of a recipe takes of its inputs.

    ``slices`` are the inputs of each slice with all their tensors, and all have the same reference. What cannot be done
    is added to ``problems``, one line each; if there is any, nothing can be asked for.
    """

    def __init__(self, stacks: Stacks, slices: Sequence[Inputs], problems: list[str]):
        self._slices = slices
        self._ranges: list[Ranges | None] = [None] * len(slices)
        self._homes: list[Home] = []
        self._names: dict[int, list[_Names]] = {}
        reference = slices[0].reference
        layered = any(source.layers is not None for each in stacks.slices for source in each.sources)
        if reference is None or not (layered or len(slices) > 1 or stacks.modules[0].name is not None):
            return
        catalogues = {id(catalogue): catalogue for inputs in slices for catalogue in inputs.all()}
        names = {name for catalogue in catalogues.values() for name in catalogue.tensors}
        self._anatomy = anatomy_of(reference.names)
        found: list[str] = []
        self._homes = find_homes(stacks, self._anatomy, reference, names, found)
        if not found:
            self._names = {key: self._by_home(catalogue) for key, catalogue in catalogues.items()}
            self._read_ranges(list(stacks.slices), found)
        problems += found

    def giver(self, name: str) -> int:
        """The number of the slice that a tensor outside of the layers comes from."""
        if not self._homes:
            return 0
        home = self._homes[self._home_of(name)]
        return home.first if is_first(name) else home.last

    def cuts(self, aliases: Aliases) -> list[Cut]:
        """What each slice gives, in order."""
        return [self._cut(number, aliases) for number in range(len(self._slices))]

    def origins(self) -> dict[Stack, list[LayerOrigin]]:
        """Where the layers of each stack come from that is not made of whole models, in order."""
        found: dict[Stack, list[LayerOrigin]] = {}
        for index, home in enumerate(self._homes):
            for number in range(home.first, home.last + 1):
                ranges = self._ranges[number]
                if home.stack is not None and ranges is not None:
                    model, layers = ranges.main(self._slices[number])
                    count = max(self._names[id(model)][index].layers) + 1
                    found.setdefault(home.stack, []).extend(
                        LayerOrigin(model.label, model.config, count, layer) for layer in layers
                    )
        return found

    def _read_ranges(self, given: Sequence[Slice], problems: list[str]) -> None:
        for index, home in enumerate(self._homes):
            if home.stack is not None:
                own = slice(home.first, home.last + 1)
                layers = [
                    {id(each): self._names[id(each)][index].layers for each in inputs.all()}
                    for inputs in self._slices[own]
                ]
                self._ranges[own] = read_ranges(
                    given[own], self._slices[own], layers, home.stack.prefix, problems
                )

    def _home_of(self, name: str) -> int:
        for index, home in enumerate(self._homes):
            if name in home.names:
                return index
        stack = self._anatomy.home(name)
        return next(index for index, home in enumerate(self._homes) if home.stack == stack)

    def _by_home(self, catalogue: Catalogue) -> list[_Names]:
        """The names of a model by module."""
        found = [_Names({}, []) for _ in self._homes]
        prefixes = {home.stack.prefix: i for i, home in enumerate(self._homes) if home.stack is not None}
        for name in catalogue.tensors:
            place = layer_of(name)
            index = None if place is None else prefixes.get(place[0])
            if place is None or index is None:
                found[self._home_of(name)].outside.append(name)
            else:
                found[index].layers.setdefault(place[1], []).append(name)
        return found

    def _cut(self, number: int, aliases: Aliases) -> Cut:
        inputs, ranges = self._slices[number], self._ranges[number]
        own_names: dict[int, dict[str, str]] = {}
        made: dict[int, Catalogue] = {}
        for each in inputs.all():
            own = {
                name: other for name, other in aliases.get(id(each), {}).items() if self.giver(name) == number
            }
            taken = self._taken(number, each, None if ranges is None else ranges.of(each, inputs), own)
            made[id(each)] = each if taken is None else each.holding(taken)
            if each.position is not None and own:
                own_names[each.position] = own
        reference = inputs.reference
        if ranges is not None and reference is not None and ranges.reference is None:
            reference = inputs.merged()[0]
        inputs_cut = Inputs(
            None if inputs.base is None else made[id(inputs.base)],
            {i: made[id(model)] for i, model in inputs.models.items()},
            None if reference is None else made[id(reference)],
        )
        names = dict.fromkeys(name for each in inputs_cut.merged() for name in each.tensors)
        if ranges is None:
            return Cut(number, inputs_cut, layer_positions(names), own_names)
        positions = self._positions(number, names, ranges.output)
        return Cut(number, inputs_cut, positions, own_names, len(ranges.output))

    def _taken(
        self, number: int, catalogue: Catalogue, layers: range | None, own: dict[str, str]
    ) -> dict[str, Operand] | None:
        """The tensors that a slice takes of a model, by the output's names; None for all as they are.

        The model's own names, where they differ, are added to ``own``, which has the tensors that stand for others.
        """
        tensors = catalogue.tensors
        ranges = self._ranges[number]
        if ranges is None and len(self._homes) < 2:
            return {**tensors, **{name: tensors[other] for name, other in own.items()}} if own else None
        index = next(i for i, home in enumerate(self._homes) if home.first <= number <= home.last)
        home, names = self._homes[index], self._names[id(catalogue)][index]
        outside = names.outside
        if home.first < home.last:
            outside = [name for name in outside if self.giver(name) == number]
        taken = {name: tensors[name] for name in outside}
        taken |= {name: tensors[other] for name, other in own.items()}
        if ranges is None or home.stack is None:
            return taken | {name: tensors[name] for those in names.layers.values() for name in those}
        for new, old in zip(ranges.output, layers or (), strict=False):
            before, after = home.stack.layer(old), home.stack.layer(new)
            for name in names.layers[old]:
                renamed = after + name[len(before) :]
                taken[renamed] = tensors[name]
                if new != old:
                    own[renamed] = name
        return taken

    def _positions(self, number: int, names: Iterable[str], layers: range) -> dict[str, float]:
        """Gradients run over the layers of the slice; what is outside of the layers has their first value."""
        home = next(home for home in self._homes if home.first <= number <= home.last)
        assert home.stack is not None
        places = {name: layer_of(name) for name in names}
        last = len(layers) - 1
        return {
            name: 0.0
            if place is None or place[0] != home.stack.prefix
            else (place[1] - layers.start) / last
            if last
            else 1.0
            for name, place in places.items()
        }
