"""Tensors of one name whose shapes or types cannot be merged, in one line for each cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from merge_engine.operands import Operand
from merge_engine.planning.inputs import Inputs, examples
from merge_engine.recipe import exclude_key
from merge_engine.text import cut
from merge_engine.vocabulary.names import is_vocabulary

_SHOWN = 3


class Disagreements:
    """Collects tensors whose operands differ in shape or type."""

    def __init__(self) -> None:
        self._vocabularies: dict[str, list[str]] = {}
        self._transposed: list[tuple[str, Sequence[Operand]]] = []
        self._sizes: list[tuple[str, Sequence[Operand]]] = []
        self._types: dict[str, list[str]] = {}

    def add(self, name: str, operands: Sequence[Operand]) -> bool:
        """Keep a tensor if its operands cannot be merged, and say whether that is so."""
        first = operands[0]
        shape, kind = first.shape, first.dtype
        alike = True
        for operand in operands:
            if operand.shape != shape:
                self._add_shapes(name, operands)
                return True
            alike = alike and (operand.dtype is kind or operand.dtype == kind)
        if alike or all(operand.dtype.mergeable for operand in operands):
            return False
        self._types.setdefault(_by_owner(operands, lambda o: o.dtype), []).append(name)
        return True

    def problems(self) -> list[str]:
        """A line for each cause."""
        lines = [_of_sizes(names, sizes) for sizes, names in self._vocabularies.items()]
        if self._transposed:
            lines.append(
                f"{_shapes(self._transposed)}: one is the other transposed; save the models with the same class first"
            )
        if self._sizes:
            lines.append(
                f"{_shapes(self._sizes)}{_mostly(self._sizes)}; merge models of one size, or leave such tensors out "
                f"with {exclude_key(self._sizes[0][0])}"
            )
        lines += [
            f"{examples(names)}: these types cannot be merged with each other: {types}; convert the models to one "
            "of bfloat16, float16 and float32 first"
            for types, names in self._types.items()
        ]
        return lines

    def _add_shapes(self, name: str, operands: Sequence[Operand]) -> None:
        shapes = {operand.shape for operand in operands}
        if is_vocabulary(name) and len({shape[1:] for shape in shapes}) == 1 and () not in shapes:
            self._vocabularies.setdefault(_by_owner(operands, lambda o: o.shape[0]), []).append(name)
        elif len({tuple(sorted(shape)) for shape in shapes}) == 1 and len(operands[0].shape) == 2:
            self._transposed.append((name, operands))
        else:
            self._sizes.append((name, operands))


def stacked_vocabularies(given: Mapping[int, Mapping[str, Operand]], slices: Sequence[Inputs]) -> list[str]:
    """A line if embedding and head come from slices whose vocabularies have different sizes.

    ``given`` has the tensors that each slice gives to the output, ``slices`` all tensors of the inputs. Tensors of
    which some input has both, with as many rows, have a row for each token of one vocabulary.
    """
    found = [
        (number, name, operand)
        for number, tensors in given.items()
        for name, operand in tensors.items()
        if is_vocabulary(name)
    ]
    whole = [catalogue.tensors for inputs in slices for catalogue in inputs.all()]
    for at, (first, one, embedding) in enumerate(found):
        for last, other, head in found[at + 1 :]:
            if first != last and embedding.shape[:1] != head.shape[:1]:
                both = ((each[one], each[other]) for each in whole if one in each and other in each)
                if any(mine.shape[:1] == its.shape[:1] for mine, its in both):
                    return [_of_sizes([one, other], _by_owner([embedding, head], lambda o: o.shape[0]))]
    return []


def _of_sizes(names: Sequence[str], sizes: str) -> str:
    return (
        f"{examples(names)}: the vocabularies have different sizes: {sizes}; to bring their rows together by "
        'tokens, add "tokenizer_source: union" to the recipe, or "tokenizer_source: base" to keep those of the base'
    )


_Found = Sequence[tuple[str, Sequence[Operand]]]


def _shapes(found: _Found) -> str:
    """That shapes differ: of the one tensor, or the number of tensors and the first three."""
    first = [f"({_by_owner(operands, lambda o: list(o.shape))})" for _, operands in found[:_SHOWN]]
    if len(found) == 1:
        return f"{found[0][0]}: the shapes differ {first[0]}"
    shown = ", ".join(f"{name} {shapes}" for (name, _), shapes in zip(found, first, strict=False))
    rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"the shapes of {len(found)} tensors differ: {shown}{rest}"


def _by_owner(operands: Sequence[Operand], value: Callable[[Operand], object]) -> str:
    """Each value once, with the inputs that have it: ``bfloat16 in base and a, uint8 in b``."""
    owners: dict[str, list[str]] = {}
    for operand in operands:
        owners.setdefault(str(value(operand)), []).append(operand.owner)
    return ", ".join(f"{cut(one, 200)} in {' and '.join(having)}" for one, having in owners.items())


def _mostly(found: _Found) -> str:
    """The sizes that differ most often, such as those of the hidden states."""
    sizes: Counter[str] = Counter()
    for _, operands in found:
        if len({len(operand.shape) for operand in operands}) == 1:
            for along in zip(*(operand.shape for operand in operands), strict=True):
                if len(set(along)) > 1:
                    sizes[" against ".join(map(str, dict.fromkeys(along)))] += 1
    if len(found) < 2 or not sizes:
        return ""
    return f", most often {sizes.most_common(1)[0][0]}"
