"""Which layers of its inputs each slice takes, and whether they have them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_engine.planning.inputs import Catalogue, Inputs
from merge_engine.recipe import Slice
from merge_engine.text import counted, some


@dataclass(frozen=True)
class Ranges:
    """The layers that one slice takes of each of its inputs, and the output's layers that they become.

    ``models`` are by recipe position. ``reference`` is None if the slice's inputs do not show which layers of the
    reference are theirs.
    """

    output: range
    base: range | None
    models: Mapping[int, range]
    reference: range | None

    def of(self, catalogue: Catalogue, inputs: Inputs) -> range | None:
        """The layers of one of the slice's ``inputs``."""
        if catalogue is inputs.base:
            return self.base
        own = (layers for i, layers in self.models.items() if inputs.models[i] is catalogue)
        return next(own, self.reference)

    def main(self, inputs: Inputs) -> tuple[Catalogue, range]:
        """The input whose config says what the layers are: the reference, or else the first that is merged."""
        if inputs.reference is not None and self.reference is not None:
            return inputs.reference, self.reference
        first = inputs.merged()[0]
        layers = self.of(first, inputs)
        assert layers is not None
        return first, layers


def read_ranges(
    slices: Sequence[Slice],
    inputs: Sequence[Inputs],
    layers: Sequence[Mapping[int, Collection[int]]],
    stack: str,
    problems: list[str],
) -> list[Ranges | None]:
    """The ranges of a module's slices; None for one slice of whole models.

    ``layers`` has the numbers of the layers that each input of a slice has, by the id of its catalogue. Each range that
    cannot be is a problem.
    """
    whole = _is_whole(slices, inputs, layers)
    found: list[Ranges | None] = []
    start = 0
    for number, (each, given, has) in enumerate(zip(slices, inputs, layers, strict=True)):
        at_an_end = number in (0, len(slices) - 1) and len(slices) > 1
        taken = [_Taken(each, i, given, has, stack, may_be_empty=at_an_end) for i in range(len(each.sources))]
        wrong = [problem for one in taken for problem in one.problems()]
        problems += wrong
        if wrong:
            continue
        lengths = [len(one.layers) for one in taken]
        if len(set(lengths)) > 1:
            problems.append(
                f"{each.place}: its sources have {' and '.join(map(str, dict.fromkeys(lengths)))} layers; all must "
                "have as many"
            )
            continue
        ranges = _ranges(each, given, has, taken, start, problems)
        start += lengths[0]
        found.append(None if whole else ranges)
    if not problems and not start:
        problems.append(f"{slices[0].place}: the output would have no layers; give it some")
    return found


def _is_whole(
    slices: Sequence[Slice], inputs: Sequence[Inputs], layers: Sequence[Mapping[int, Collection[int]]]
) -> bool:
    """Whether the module is one slice that takes all layers of models of the same length."""
    if len(slices) > 1:
        return False
    ranges = [source.layers for source in slices[0].sources]
    if all(each is None for each in ranges):
        return True
    every = [_count(layers[0][id(catalogue)]) for catalogue in inputs[0].all()]
    return all(each in (None, range(every[0])) for each in ranges) and len(set(every)) == 1


class _Taken:
    """What one source of a slice takes."""

    def __init__(
        self,
        of: Slice,
        index: int,
        inputs: Inputs,
        has: Mapping[int, Collection[int]],
        stack: str,
        may_be_empty: bool,
    ):
        source = of.sources[index]
        self.position = source.position
        self._place = f"{source.settings.place.removesuffix('.parameters')}"
        catalogue = inputs.models.get(source.position, inputs.base)
        assert catalogue is not None
        self._catalogue = catalogue
        self._has = has[id(catalogue)]
        self._stack = stack
        self._may_be_empty = may_be_empty
        self.layers = range(_count(self._has)) if source.layers is None else source.layers

    def problems(self) -> Iterator[str]:
        """Why the model cannot give these layers."""
        label, layers, count = self._catalogue.label, self.layers, _count(self._has)
        at = f"{self._place}.layer_range: [{layers.start}, {layers.stop}]"
        if not count:
            yield f"{self._place}: {label} has no layers {self._stack}.0 and so on; stack models of one architecture"
        elif layers.stop < layers.start:
            yield f"{at}: ends before it starts; the first layer comes first"
        elif layers.stop > count:
            yield f"{at}: {label} has {counted(count, 'layer')}, 0 to {count - 1}"
        elif not layers and not self._may_be_empty:
            yield f"{at}: holds no layer; the second number is one more than that of the last layer"
        elif missing := [str(i) for i in layers if i not in self._has]:
            yield f"{at}: {label} lacks the layers {some(missing)}"


def _ranges(
    of: Slice,
    inputs: Inputs,
    has: Mapping[int, Collection[int]],
    taken: Sequence[_Taken],
    start: int,
    problems: list[str],
) -> Ranges:
    models = {one.position: one.layers for one in taken if one.position in inputs.models}
    base = next((one.layers for one in taken if one.position not in inputs.models), None)
    common = taken[0].layers if all(one.layers == taken[0].layers for one in taken) else None
    if inputs.base is not None and base is None:
        base = common
        if common is None or not set(common) <= set(has[id(inputs.base)]):
            problems.append(
                f"{of.place}: the base model {inputs.base.label} is not among its sources, so it is not known which of "
                "its layers are meant; add it as a source, with its layer_range"
            )
    reference = inputs.reference
    own = next((layers for i, layers in models.items() if inputs.models[i] is reference), None)
    if own is None and reference is inputs.base:
        own = base
    elif (
        own is None
        and reference is not None
        and common is not None
        and set(common) <= set(has[id(reference)])
    ):
        own = common
    return Ranges(range(start, start + len(taken[0].layers)), base, models, own)


def _count(layers: Collection[int]) -> int:
    return max(layers, default=-1) + 1
