"""The modules of a model, inferred from the names of its tensors: parts with layers of their own.

The layers of a stack are numbered from 0 in names: ``model.layers.0.mlp.weight`` is in layer 0 of the stack
``model.layers``. Most models have one stack. Encoder and decoder, or a vision tower beside a language model, are two.
Everything outside of the stacks belongs to one of them, before its layers or behind them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from merge_engine.planning.inputs import Catalogue
from merge_engine.planning.ties import HEADS
from merge_engine.recipe import Module, Stacks, layer_of
from merge_engine.text import did_you_mean, some

Kind: TypeAlias = Literal["text", "vision", "audio", "encoder", "decoder"]

_TOWERS: dict[Kind, re.Pattern[str]] = {
    "vision": re.compile("visi|visual"),
    "audio": re.compile("audio|speech"),
}
_NAMES: Mapping[Kind, str] = {
    "text": "text_decoder",
    "vision": "vision_tower",
    "audio": "audio_tower",
    "encoder": "encoder",
    "decoder": "decoder",
}
"""What mergekit calls the modules of such models."""

_CONNECTOR = "multi_modal_projector"
_CONNECTORS = frozenset(
    (
        *(_CONNECTOR, "mm_projector", "connector", "vision_adapter", "merger", "merger_list"),
        *("deepstack_merger_list", "patch_merger", "aligner"),
    )
)
"""Parts of the names of what stands between a tower and the language model. It has no layers of its own."""

_TASK_HEADS = frozenset(
    ("classification_head", "classifier", "cls", "lm_head", "mtp", "qa_outputs", "score", "v_head")
)

_FIRST = re.compile(
    r"(?:^|_)emb|^wte$|^wpe$|^shared$|patch_conv|^conv\d?$|^ln_pre$|^pre_layernorm$|^pre_layrnorm$|_token$|^project_in$|relative_pe"
)
"""Parts of the names of tensors that are used before the first layer: embeddings, their norms and projections."""


@dataclass(frozen=True)
class Stack:
    """The layers of one module.

    ``prefix`` is the text before their numbers, ``count`` how many there are. ``alone`` says that the model has no
    other stack, towers aside.
    """

    prefix: str
    count: int
    alone: bool = True

    def layer(self, number: int) -> str:
        """How the names in a layer begin, up to the dot behind its number."""
        return f"{self.prefix}.{number}." if self.prefix else f"{number}."

    @property
    def kind(self) -> Kind:
        """What the layers are for, as their names say."""
        for kind, pattern in _TOWERS.items():
            if pattern.search(self.prefix):
                return kind
        parts = self.prefix.split(".")
        return "decoder" if "decoder" in parts else "encoder" if "encoder" in parts else "text"


class Home(NamedTuple):
    """What a module of the recipe is: a stack of layers with what belongs to it, or ``names`` without layers.

    ``first`` and ``last`` are the numbers of its slices among all of the recipe.
    """

    place: str
    stack: Stack | None
    names: frozenset[str]
    first: int
    last: int


@dataclass(frozen=True)
class Anatomy:
    """The stacks of a model, in the order of its names. One with a few layers of a head or projector is no module."""

    stacks: tuple[Stack, ...]
    _homes: dict[str, Stack] = field(default_factory=dict, compare=False, repr=False)

    @property
    def names(self) -> list[str]:
        """The shortest name of each stack that recipes may use."""
        return [next(name for name, found in self.by_name.items() if found is each) for each in self.stacks]

    @cached_property
    def by_name(self) -> Mapping[str, Stack]:
        """The stacks by every name that a recipe may use: those of mergekit first, then the text before the number."""
        names: dict[str, Stack] = {} if len(self.stacks) != 1 else {"default": self.stacks[0]}
        kinds = [each.kind for each in self.stacks]
        names |= {_NAMES[each.kind]: each for each in self.stacks if kinds.count(each.kind) == 1}
        language = [each for each in self.stacks if each.kind not in _TOWERS]
        if len(language) == 1:
            names.setdefault(_NAMES["text"], language[0])
        starts = [each.prefix.rpartition(".")[0] for each in self.stacks]
        for each, start in zip(self.stacks, starts, strict=True):
            names.setdefault(each.prefix, each)
            if start and starts.count(start) == 1:
                names.setdefault(start, each)
        return names

    def home(self, name: str) -> Stack | None:
        """The stack that a tensor belongs to; None if there is none at all."""
        place = layer_of(name)
        key = name if place is None else place[0]
        if key not in self._homes:
            if not self.stacks:
                return None
            self._homes[key] = self._nearest(key)
        return self._homes[key]

    def _nearest(self, name: str) -> Stack:
        """The stack whose prefix has most parts in common with the name; of equals, the one that it is used in."""
        exact = [each for each in self.stacks if each.prefix == name]
        if exact:
            return exact[0]
        shared = [_in_common(name, each.prefix) for each in self.stacks]
        best = [each for each, parts in zip(self.stacks, shared, strict=True) if parts == max(shared)]
        order: tuple[Kind, ...] = ("encoder", "text", "decoder", "vision", "audio")
        if not is_first(name):
            order = ("text", "decoder", "encoder", "vision", "audio")
        return min(best, key=lambda each: order.index(each.kind))


def anatomy_of(names: Iterable[str]) -> Anatomy:
    """The stacks that these names show."""
    found: dict[str, set[int]] = {}
    for name in names:
        place = layer_of(name)
        if place is not None:
            found.setdefault(place[0], set()).add(place[1])
    stacks = {
        prefix: layers
        for prefix, layers in found.items()
        if not (_TASK_HEADS | _CONNECTORS) & set(prefix.split("."))
    }
    if len(stacks) > 1:  # numbered parts of something else have gaps, or are a single one
        whole = {p: layers for p, layers in stacks.items() if 1 < len(layers) == max(layers) + 1}
        stacks = whole or stacks
    alone = len(stacks) - sum(Stack(prefix, 0).kind in _TOWERS for prefix in stacks) < 2
    return Anatomy(tuple(Stack(prefix, max(layers) + 1, alone) for prefix, layers in stacks.items()))


def is_first(name: str) -> bool:
    """Whether a tensor outside of the layers is used before them, as embeddings are, and not behind them, as heads."""
    if name.endswith(HEADS):
        return False
    return any(_FIRST.search(part) for part in name.split("."))


def find_homes(
    stacks: Stacks, anatomy: Anatomy, reference: Catalogue, names: Collection[str], problems: list[str]
) -> list[Home]:
    """What each module of a recipe is. ``anatomy`` is that of the reference, ``names`` are those of all inputs.

    What cannot be is added to ``problems``.
    """
    homes: list[Home] = []
    number = 0
    for module in stacks.modules:
        place = "slices" if module.name is None else f"modules.{module.name}"
        stack, claimed = _named(module, anatomy, names)
        last = number + len(module.slices) - 1
        homes.append(Home(place, stack, claimed, number, last))
        number = last + 1
        if stack is None and module.name is None:
            problems.append(_ambiguous(place, anatomy, reference))
        elif stack is None and not claimed:
            known = some([*anatomy.names, *([_CONNECTOR] if _part_of(_CONNECTOR, names) else [])])
            near = did_you_mean(module.name or "", anatomy.by_name)
            problems.append(f"{place}: {reference.label} has no such module{near}; it has {known}")
        elif stack is None and any(source.layers is not None for source in module.slices[0].sources):
            problems.append(f"{place}: has no layers to slice; name whole models with the key models")
    if not problems:
        problems += _covered(homes, anatomy, reference)
    return homes


def _named(module: Module, anatomy: Anatomy, names: Collection[str]) -> tuple[Stack | None, frozenset[str]]:
    """The stack of a module, or else its names."""
    if module.name is None:
        return (anatomy.stacks[0] if len(anatomy.stacks) == 1 else None), frozenset()
    stack = anatomy.by_name.get(module.name)
    return stack, _part_of(module.name, names) if stack is None else frozenset()


def _ambiguous(place: str, anatomy: Anatomy, reference: Catalogue) -> str:
    if not anatomy.stacks:
        return f"{place}: the names of {reference.label} have no numbers of layers; use the key models"
    return (
        f"{place}: {reference.label} has several stacks of layers; slice each of them under the key modules, as "
        f"{some(anatomy.names)}"
    )


def _covered(homes: Sequence[Home], anatomy: Anatomy, reference: Catalogue) -> Iterator[str]:
    """A problem for each stack that several modules name, and one for those that no module names."""
    for stack, name in zip(anatomy.stacks, anatomy.names, strict=True):
        places = [home.place for home in homes if home.stack == stack]
        if len(places) > 1:
            yield f"{' and '.join(places)}: name the same module, {name}; leave one of them out"
    given = [home.stack for home in homes]
    left = [name for stack, name in zip(anatomy.stacks, anatomy.names, strict=True) if stack not in given]
    if left:
        yield (
            f"modules: {reference.label} also has {some(left)}, without which the output cannot be loaded; add "
            "each, with the key models"
        )


def _part_of(named: str, names: Collection[str]) -> frozenset[str]:
    """The tensors of a part without layers that a recipe names: by the start of their names, or the projector."""
    if named == _CONNECTOR:
        return frozenset(name for name in names if not _CONNECTORS.isdisjoint(name.split(".")))
    start = named.rstrip(".") + "."
    return frozenset(name for name in names if name.startswith(start))


def _in_common(one: str, other: str) -> int:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)
