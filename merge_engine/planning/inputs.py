"""What a plan is made from: the tensors of each input by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from merge_engine.operands import Operand
from merge_engine.text import some


@dataclass(frozen=True)
class Catalogue:
    """The tensors of one input, by name. ``label`` names the input in messages.

    ``tied`` says whether its head is its embedding; None if its config does not say. ``position`` is the model's in
    the recipe, from 0; None for the base model and the donor. ``config`` is its config.json.
    """

    label: str
    tensors: Mapping[str, Operand]
    tied: bool | None = False
    position: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> Set[str]:
        """The names of the tensors; equality is that of sets."""
        return self.tensors.keys()

    def holding(self, tensors: Mapping[str, Operand]) -> Catalogue:
        """The same input with other tensors."""
        return replace(self, tensors=tensors)

    def renamed(self, new: Mapping[str, str]) -> Catalogue:
        """The same input with these names in place of others."""
        return self.holding({new.get(name, name): operand for name, operand in self.tensors.items()})


@dataclass(frozen=True)
class Inputs:
    """The catalogues of one slice. ``base`` is given if the method uses one, ``models`` are by recipe position.

    ``reference`` is the one whose names the output gets: the donor of the config, or else a model that is merged.
    """

    base: Catalogue | None
    models: Mapping[int, Catalogue]
    reference: Catalogue | None

    def merged(self) -> list[Catalogue]:
        """Those that are merged, the base first."""
        return [*([self.base] if self.base is not None else []), *self.models.values()]

    def all(self) -> list[Catalogue]:
        """Those that are merged, and the reference, each once."""
        given = self.merged()
        new = self.reference is not None and all(each is not self.reference for each in given)
        return [*given, self.reference] if new and self.reference is not None else given

    def others(self) -> Iterator[Catalogue]:
        """Those that are merged but the reference."""
        return (catalogue for catalogue in self.merged() if catalogue is not self.reference)


def map_all(given: Sequence[Inputs], change: Callable[[Catalogue], Catalogue]) -> list[Inputs]:
    """All catalogues changed. A catalogue in several places is changed once, and stays in all of them."""
    changed: dict[int, Catalogue] = {}

    def once(catalogue: Catalogue) -> Catalogue:
        if id(catalogue) not in changed:
            changed[id(catalogue)] = change(catalogue)
        return changed[id(catalogue)]

    return [
        Inputs(
            None if inputs.base is None else once(inputs.base),
            {i: once(model) for i, model in inputs.models.items()},
            None if inputs.reference is None else once(inputs.reference),
        )
        for inputs in given
    ]


def examples(names: Sequence[str]) -> str:
    """Up to three names, and how many others there are."""
    return some(names, 3)
