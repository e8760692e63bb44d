"""What a plan is made from: the tensors of each input by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from merge_engine.operands import Operand
from merge_engine.text import some


@dataclass(frozen=True)
class Catalogue:
    """The tensors of one input, by name. ``label`` names the input in messages.

    ``tied`` says whether its head is its embedding; None if its config does not say. ``position`` is the model's in
    the recipe, from 0; None for the base model and the donor.
    """

    label: str
    tensors: Mapping[str, Operand]
    tied: bool | None = False
    position: int | None = None

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
    """All catalogues of a merge. ``base`` is given if the method uses one, ``models`` are by recipe position.

    ``reference`` is the one whose names and config the output gets: the base model, or the donor, or the first model.
    """

    base: Catalogue | None
    models: Mapping[int, Catalogue]
    reference: Catalogue | None

    def merged(self) -> list[Catalogue]:
        """Those that are merged, the base first."""
        return [*([self.base] if self.base is not None else []), *self.models.values()]

    def others(self) -> Iterator[Catalogue]:
        """Those that are merged but the reference."""
        return (catalogue for catalogue in self.merged() if catalogue is not self.reference)

    def map(self, change: Callable[[Catalogue], Catalogue]) -> Inputs:
        """All catalogues changed. A catalogue in two places is changed once, and stays in both."""
        changed: dict[int, Catalogue] = {}

        def once(catalogue: Catalogue) -> Catalogue:
            if id(catalogue) not in changed:
                changed[id(catalogue)] = change(catalogue)
            return changed[id(catalogue)]

        return Inputs(
            None if self.base is None else once(self.base),
            {i: once(model) for i, model in self.models.items()},
            None if self.reference is None else once(self.reference),
        )


def examples(names: Sequence[str]) -> str:
    """Up to three names, and how many others there are."""
    return some(names, 3)
