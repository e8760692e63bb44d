"""Whether the names of models belong together: prefixes, numbers of layers, and how many names they share.

Every model is compared with the reference, whose names the output gets. Tensors that a model may have or lack
without being another model do not count: heads of a task, and buffers (see ``buffers``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from merge_engine.fit import Remarks
from merge_engine.fit.adapters import is_factor
from merge_engine.operands import Operand
from merge_engine.planning.buffers import is_buffer
from merge_engine.planning.inputs import Catalogue, Inputs, examples, map_all
from merge_engine.planning.spellings import respelled
from merge_engine.planning.ties import may_be_tied
from merge_engine.recipe import exclude_key, layer_of, rename_key

_HEADS = frozenset(
    (
        "classification_head",
        "classifier",
        "cls",
        "embed_out",
        "generator_lm_head",
        "generator_predictions",
        "lm_head",
        "pooler",
        "pre_classifier",
        "qa_outputs",
        "reward_head",
        "score",
        "v_head",
        "value_head",
        "vocab_layer_norm",
        "vocab_projector",
        "vocab_transform",
    )
)
"""Parts of the names of heads: another task gives the same model another head."""

_MOST_RENAMES = 4  # entries of the key that a message proposes, or a few more
_SAMPLE = 64  # names that vote on a prefix


class _Prefix(NamedTuple):
    """What stands at the start of a model's names, and what at the start of the same names of the reference."""

    old: str
    new: str

    def __str__(self) -> str:
        if not self.new:
            return f'"{self.old}" at the start is removed'
        if not self.old:
            return f'"{self.new}" is put before them'
        return f'"{self.old}" at the start becomes "{self.new}"'

    def applied(self, names: Iterable[str], known: Collection[str]) -> dict[str, str]:
        """The new names by the old ones. Nothing is put before a name that so becomes none of the known ones."""
        new = {name: self.new + name[len(self.old) :] for name in names if name.startswith(self.old)}
        return new if self.old else {name: mapped for name, mapped in new.items() if mapped in known}


def match_names(slices: Sequence[Inputs], remarks: Remarks) -> list[Inputs]:
    """The inputs of all slices under the names of their one reference.

    A model is mapped, with a note, if its names become those of the reference, but for heads and buffers, when one
    prefix is removed from them or put before them; and where it spells names otherwise (see ``spellings``).
    """
    reference = slices[0].reference

    def matched(catalogue: Catalogue) -> Catalogue:
        if reference is None or catalogue is reference or catalogue.names == reference.names:
            return catalogue
        told = f"{catalogue.label}: tensors get the names that they have in {reference.label}: "
        if found := _by_prefix(catalogue, reference):
            remarks.notes.append(told + str(found[0]))
            return catalogue.renamed(found[1])
        if new := respelled(catalogue, reference):
            old = min(new)
            remarks.notes.append(f"{told}{len(new)} are spelled otherwise, such as {new[old]} for {old}")
            return catalogue.renamed(new)
        return catalogue

    return map_all(slices, matched)


def _by_prefix(catalogue: Catalogue, reference: Catalogue) -> tuple[_Prefix, dict[str, str]] | None:
    """The prefix that makes the names of a model those of the reference, and the new names by the old ones."""
    extra, lacking = _difference(catalogue, reference)
    prefix = _prefix(extra, lacking)
    if prefix is None or (prefix.old and prefix.new):
        return None
    mapped = prefix.applied(extra, set(lacking))
    new = set(mapped.values())
    if _essential(extra - mapped.keys(), catalogue) or _essential(lacking - new, reference):
        return None
    if 2 * len(new) < len(catalogue.tensors) or new & catalogue.tensors.keys():
        return None
    return prefix, mapped


def examine_names(inputs: Inputs, remarks: Remarks, told: set[str]) -> set[str]:
    """Report models whose names do not belong to those of the reference; returns the names that this explains.

    ``told`` are the labels of the models that were reported before, in other slices; new ones are added.
    """
    reference = inputs.reference
    if reference is None:
        return set()
    others = [catalogue for catalogue in inputs.others() if catalogue.names != reference.names]
    if not others:
        return set()
    empty = [catalogue for catalogue in [reference, *others] if not catalogue.tensors]
    if empty:
        remarks.problems += [f"{each.label}: holds no tensors to merge; name another model" for each in empty]
        return {name for catalogue in [reference, *others] for name in catalogue.names}
    explained = _examine_layers([reference, *others], inputs.base is not None, remarks)
    for catalogue in others:
        extra, lacking = _difference(catalogue, reference)
        alone = _essential(extra, catalogue) - explained
        missing = _essential(lacking, reference) - explained
        mismatch = _mismatch(catalogue, reference, alone, missing)
        if mismatch is None:
            continue
        explained |= extra | lacking
        if catalogue.label in told:
            continue
        told.add(catalogue.label)
        if inputs.base is not None and alone:  # without the base's tensor there is no task vector to allow
            remarks.problems.append(f"{mismatch.line}; {mismatch.way_out}")
        else:
            remarks.misfit("names", *mismatch)
    return explained


class _Mismatch(NamedTuple):
    line: str
    way_out: str


def _mismatch(
    catalogue: Catalogue, reference: Catalogue, alone: set[str], missing: set[str]
) -> _Mismatch | None:
    """The message for a model with these names of its own, which lacks those of the reference; None if it fits."""
    adapters = sorted(filter(is_factor, alone))
    if 2 * len(adapters) > len(alone):
        return _Mismatch(
            f"{catalogue.label}: holds {len(adapters)} tensors of an adapter ({examples(adapters)})",
            "first merge the adapter into its model and name the result",
        )
    shared = len(catalogue.tensors.keys() & reference.tensors.keys())
    fits = 2 * shared >= shared + max(len(alone), len(missing))
    renames, mapped = _renames(catalogue.names, alone, missing)
    if 2 * len(mapped) >= min(len(alone), len(missing)) and len(mapped) > fits:
        starts = ", ".join(f'"{new}" for "{old}"' for old, new in renames.items())
        left = sorted(alone - mapped.keys()) or sorted(missing - set(mapped.values()))
        others = f"; others would still differ ({examples(left)})" if left else ""
        return _Mismatch(
            f"{catalogue.label}: {len(mapped)} of its {len(catalogue.tensors)} tensors would have the names of "
            f"{reference.label} if they began with {starts}{others}",
            f"if they are the same, add {rename_key(renames)} to the model's entry",
        )
    if fits and _layers_of(alone).isdisjoint(_layers_of(missing)):
        return None
    own = f" ({examples(sorted(alone))})" if alone else ""
    others = "another" if len(missing) == 1 else f"{len(missing) or 'no'} others"
    there = f" ({examples(sorted(missing))})" if missing else ""
    return _Mismatch(
        f"{catalogue.label}: shares {shared or 'no'} names of tensors with {reference.label}, which lacks "
        f"{len(alone) or 'none'} of its tensors{own}, and has {others}{there}",
        "merge models of one architecture",
    )


def _layers_of(names: Iterable[str]) -> set[tuple[str, int]]:
    """The layers in which these tensors are. If both models have some of their own there, the layers are others."""
    return {place[:2] for place in map(layer_of, names) if place is not None}


def _examine_layers(catalogues: Sequence[Catalogue], has_base: bool, remarks: Remarks) -> set[str]:
    """Report stacks of which the models have different layers; returns the names of the layers that not all have."""
    stacks = [_stacks(catalogue.tensors) for catalogue in catalogues]
    explained: set[str] = set()
    for stack, layers in stacks[0].items():
        having = [(c, found[stack]) for c, found in zip(catalogues, stacks, strict=True) if stack in found]
        if all(found.keys() == layers.keys() for _, found in having) or _HEADS & set(stack.split(".")):
            continue
        common = set(layers).intersection(*(found.keys() for _, found in having))
        explained |= {name for _, found in having for i in found.keys() - common for name in found[i]}
        line = f"{stack}: the models have different numbers of layers: " + ", ".join(
            f"{_counted(found.keys())} in {catalogue.label}" for catalogue, found in having
        )
        beyond = sorted({i for _, found in having for i in found.keys() - layers.keys()})
        if has_base and beyond:
            pattern = f"{stack}.{beyond[0]}.*".lstrip(".")
            remarks.problems.append(
                f'{line}; leave out the layers that the base model lacks, as with "{exclude_key(pattern)}"'
            )
        else:
            remarks.misfit("layers", line)
    return explained


def _stacks(names: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """The names in layers: by stack, then by the layer's index."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        place = layer_of(name)
        if place is not None:
            stacks.setdefault(place[0], {}).setdefault(place[1], []).append(name)
    return stacks


def _counted(layers: Collection[int]) -> str:
    if max(layers) == len(layers) - 1:
        return str(len(layers))
    return f"{len(layers)} (between {min(layers)} and {max(layers)})"


def _difference(catalogue: Catalogue, reference: Catalogue) -> tuple[set[str], set[str]]:
    """The names that only the model has, and those that only the reference has."""
    own, there = catalogue.tensors.keys(), reference.tensors.keys()
    return own - there, there - own


def _essential(names: Iterable[str], catalogue: Catalogue) -> set[str]:
    """The names of tensors that make it another model if they are missing."""
    return {name for name in names if not _is_extra(name, catalogue.tensors[name])}


def _is_extra(name: str, operand: Operand) -> bool:
    place = layer_of(name)
    outside = name if place is None else place[0]
    return not _HEADS.isdisjoint(outside.split(".")) or is_buffer(name, operand) or may_be_tied(name)


def _prefix(extra: Collection[str], lacking: Collection[str]) -> _Prefix | None:
    """The change at the start of names that makes most of ``extra`` names of ``lacking``; None if there is none."""
    if not extra or not lacking:
        return None
    ends: dict[str, str | None] = {}  # the only name that ends so; None if there are several
    for name in lacking:
        for end in _ends(name):
            ends[end] = None if end in ends else name
    votes: Counter[_Prefix] = Counter()
    ordered = sorted(extra)
    for name in ordered[:: max(len(ordered) // _SAMPLE, 1)]:
        for end in _ends(name):
            whole = ends.get(end)
            if whole is not None:
                votes[_Prefix(name.removesuffix(end), whole.removesuffix(end))] += 1
                break
    return votes.most_common(1)[0][0] if votes else None


def _renames(
    names: Collection[str], extra: set[str], lacking: set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What makes names of ``lacking`` of as many of ``extra`` as can be: the starts of names, and all new names.

    No start is that of another of the model's ``names``.
    """
    renames: dict[str, str] = {}
    mapped: dict[str, str] = {}
    while len(renames) < _MOST_RENAMES:
        prefix = _prefix(extra - mapped.keys(), lacking - set(mapped.values()))
        if prefix is None:
            break
        new = prefix.applied(extra - mapped.keys(), lacking)
        fitting = {name: other for name, other in new.items() if other in lacking}
        mapped |= fitting
        alone = all(name in fitting for name in names if name.startswith(prefix.old))
        parts = [""] if alone else sorted({_first_part(name[len(prefix.old) :]) for name in fitting})
        renames |= {prefix.old + part: prefix.new + part for part in parts}
    return renames, mapped


def _first_part(name: str) -> str:
    return name[: name.find(".") + 1]


def _ends(name: str) -> Iterable[str]:
    """The name, and what follows each of its dots, the longest first."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)
