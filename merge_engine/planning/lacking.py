"""Tensors that some inputs lack, and slices with too few models or too many."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from merge_engine.methods import Method
from merge_engine.planning.inputs import Catalogue, Inputs, examples
from merge_engine.planning.selection import pattern_for
from merge_engine.recipe import Recipe, exclude_key
from merge_engine.text import some


class Lacking:
    """Collects the tensors that some inputs lack, but those that another message explains.

    ``found`` are the recipe positions of the models that have a tensor. ``begin`` says which slice the next tensors are
    of.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._in_models: dict[str, list[str]] = {}
        self._in_base: dict[tuple[str, ...], tuple[Catalogue, list[str]]] = {}
        self._in_too_few: dict[tuple[str, ...], list[str]] = {}
        self._copied: dict[str, list[str]] = {}
        self._others: set[str] = set()

    def begin(self, inputs: Inputs, explained: Collection[str]) -> None:
        """Take these inputs from now on. ``explained`` are the names that another message explains."""
        self._inputs, self._explained = inputs, explained

    def in_models(self, name: str, found: Sequence[int]) -> None:
        """Keep a tensor that only the models in ``found`` have."""
        models = self._inputs.models
        if len(found) < len(models) and name not in self._explained:
            for label in dict.fromkeys(model.label for i, model in models.items() if i not in found):
                self._in_models.setdefault(label, []).append(name)

    def in_base(self, name: str, found: Sequence[int]) -> None:
        """Keep a tensor that the base lacks."""
        base = self._inputs.base
        if base is not None and name not in self._explained:
            having = (base.label, *self._having(found))
            self._in_base.setdefault(having, (base, []))[1].append(name)

    def in_too_few(self, name: str, found: Sequence[int]) -> None:
        """Keep a tensor that fewer models have than the method needs."""
        if name not in self._explained:
            having = self._having(found)
            if having not in self._in_too_few:
                self._others |= {name for catalogue in self._inputs.merged() for name in catalogue.tensors}
            self._in_too_few.setdefault(having, []).append(name)

    def copied(self, name: str, found: Sequence[int]) -> None:
        """Keep a tensor that is copied from the one model in ``found``, or else from the base."""
        base = self._inputs.base
        [label] = self._having(found) or [base.label if base is not None else ""]
        self._copied.setdefault(label, []).append(name)

    def notes(self) -> Iterator[str]:
        """A note for each model that lacks tensors, and for each input that some are copied from."""
        for label, names in self._in_models.items():
            yield f"{label} lacks {some(names)}; merged from the inputs that have them"
        for label, names in self._copied.items():
            yield f"too few inputs have {some(names)} for {self._method.name}; copied from {label}"

    def problems(self) -> Iterator[str]:
        """A problem for tensors that too few models have, and for those without a task vector: the base lacks them."""
        for those, names in self._in_too_few.items():
            pattern = pattern_for(names, self._others - set(names))
            yield (
                f"{examples(names)}: of the models only {', '.join(those)} has it, and {self._method.name} takes "
                f"{_numbers(self._method)}; to merge without it, add {exclude_key(pattern)} to the recipe"
            )
        for (_, *having), (base, names) in self._in_base.items():
            which = "" if base.label == "the base model" else f" {base.label}"  # a state dict has no path
            yield (
                f"{examples(names)}: in {', '.join(having)}, but not in the base model{which}; to merge without "
                f"what the base lacks, add {exclude_key(pattern_for(names, base.names))} to the recipe"
            )

    def _having(self, found: Sequence[int]) -> tuple[str, ...]:
        return tuple(self._inputs.models[i].label for i in found)


def count_problems(recipe: Recipe, method: Method, slices: Sequence[Inputs]) -> list[str]:
    """A line for each slice with fewer or more models than the method takes."""
    problems = []
    for each, inputs in zip(recipe.stacks.slices, slices, strict=True):
        where = "" if each.place == "models" else f"{each.place}: "
        count = len(inputs.models)
        if not count:
            problems.append(f"{where}{method.name}: there is no model to merge besides the base")
        elif count < method.min_models or (method.max_models is not None and count > method.max_models):
            besides = " besides the base model" if method.uses_base else ""
            problems.append(f"{where}{method.name}: takes {_numbers(method)} model(s){besides}, not {count}")
    return problems


def _numbers(method: Method) -> str:
    """The allowed numbers of models in words."""
    if method.max_models is None:
        return f"at least {method.min_models}"
    return f"{'exactly' if method.min_models == method.max_models else 'at most'} {method.max_models}"
