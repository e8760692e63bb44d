"""``diff``: what differs between two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from merge_engine.checkpoint import Checkpoint, open_reference
from merge_engine.errors import OptionError
from merge_engine.inspect.elements import PIECE, Tally, compare, has_values
from merge_engine.inspect.reading import STEP, access_to, in_threads, load
from merge_engine.inspect.side_files import config_differences, differing_tokens, file_differences
from merge_engine.operands import Access, Operand
from merge_engine.recipe import ModelReference
from merge_engine.recipe.problems import describe
from merge_engine.storage import File


@dataclass(frozen=True)
class TensorType:
    """The dtype of a tensor, by its name in torch, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both checkpoints have, and that differs.

    ``differing`` is the number of elements that differ: in their bits or, between two dtypes, in their values. It is
    None if the shapes differ, or if two dtypes cannot be compared. Of these, ``same_value`` have equal values (0.0
    and -0.0), and in ``nan`` either is NaN. ``largest`` is the largest absolute difference of the others: exact for
    integers, else in float64. It is None if there is none, and for dtypes that torch does not compute with.
    """

    name: str
    a: TensorType
    b: TensorType
    elements: int
    differing: int | None = None
    same_value: int = 0
    nan: int = 0
    largest: int | float | None = None


@dataclass
class Difference:
    """What differs between the checkpoints ``a`` and ``b``.

    ``equal`` is the number of tensors with the same dtype, shape and bytes in both. ``tensors`` are those that both
    have and that differ. ``config`` has the settings of config.json that differ, by dotted path, each with its values
    under ``a`` and ``b``. ``files`` says of each other file whether it is ``equal``, ``different``, ``only in a`` or
    ``only in b``. ``tokens`` is the number of positions in tokenizer.json with differing tokens; None if the files are
    equal or there are no two.
    """

    a: Path
    b: Path
    equal: int = 0
    tensors: list[TensorDifference] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    tokens: int | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        differing_files = any(state != "equal" for state in self.files.values())
        return not (self.tensors or self.only_in_a or self.only_in_b or self.config or differing_files)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data. Infinity and NaN, which JSON does not have, become the texts "inf" and "nan"."""
        found = {**asdict(self), "a": str(self.a), "b": str(self.b), "same": self.same}
        return {key: _plain(value) for key, value in found.items()}


class _Chunk(NamedTuple):
    """``number`` elements of a tensor from ``start`` on."""

    name: str
    start: int
    number: int


def diff(
    a: str | Path,
    b: str | Path,
    *,
    on_start: Callable[[int], None] = lambda nbytes: None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Difference:
    """Compare two checkpoints: folders, weight files, or names on the hub.

    Both are read once, in bounded memory. ``on_start`` is called with the bytes of tensor data that will be read,
    ``progress`` with the bytes of each finished part.

    Raises ``OptionError`` for a name that can be neither, and ``CheckpointError`` for a checkpoint that cannot be read.
    """
    one, two = _open(a), _open(b)
    found = Difference(
        one.path,
        two.path,
        only_in_a=[name for name in one.tensors if name not in two.tensors],
        only_in_b=[name for name in two.tensors if name not in one.tensors],
        config=config_differences(one.config, two.config),
        files=file_differences(one.path, two.path),
        tokens=differing_tokens(one.folder, two.folder),
    )
    both = {name: (x, two.tensors[name]) for name, x in one.tensors.items() if name in two.tensors}
    tallies = {name: Tally() for name, pair in both.items() if _can_compare(*pair)}
    on_start(sum(operand.stored_bytes for name in tallies for operand in both[name]))
    for chunk, tally in _compare_all({name: both[name] for name in tallies}):
        tallies[chunk.name] += tally
        progress(sum(operand.dtype.bits * chunk.number // 8 for operand in both[chunk.name]))
    for name, (x, y) in both.items():
        total = tallies.get(name)
        if x.dtype == y.dtype and total is not None and not total.differing:
            found.equal += 1
        else:
            found.tensors.append(_difference(name, x, y, total))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _open(given: str | Path) -> Checkpoint:
    try:
        reference = ModelReference.model_validate(given)
    except ValidationError as error:
        raise OptionError(f"a checkpoint{describe(error)[0]}") from None
    return open_reference(reference)


def _can_compare(a: Operand, b: Operand) -> bool:
    return a.shape == b.shape and (a.dtype == b.dtype or (has_values(a.dtype) and has_values(b.dtype)))


def _compare_all(pairs: Mapping[str, tuple[Operand, Operand]]) -> Iterator[tuple[_Chunk, Tally]]:
    """Every chunk of every pair, with what differs in it. Raises ``CheckpointError``."""
    chunks = [chunk for name, pair in pairs.items() for chunk in _chunks(name, *pair)]
    files: set[File] = {file for pair in pairs.values() for operand in pair for file in operand.files}
    with access_to(files) as access, in_threads(partial(_compare, access, pairs), chunks) as tallies:
        yield from zip(chunks, tallies, strict=True)


def _chunks(name: str, a: Operand, b: Operand) -> Iterator[_Chunk]:
    """Chunks of at most ``STEP`` bytes in either operand."""
    step = STEP * 8 // max(a.dtype.bits, b.dtype.bits) // PIECE * PIECE
    for start in range(0, a.count, step):
        yield _Chunk(name, start, min(step, a.count - start))


def _compare(access: Access, pairs: Mapping[str, tuple[Operand, Operand]], chunk: _Chunk) -> Tally:
    a, b = pairs[chunk.name]
    ranges = [operand.range(chunk.start, chunk.number, access) for operand in (a, b)]
    x, y = (load(one, number) for number, one in enumerate(ranges))
    tally = compare(x, y, a.dtype, b.dtype)
    for one in ranges:
        one.verify()
        one.release()
    return tally


def _difference(name: str, a: Operand, b: Operand, tally: Tally | None) -> TensorDifference:
    types = TensorType(a.dtype.name, a.shape), TensorType(b.dtype.name, b.shape)
    if tally is None:
        return TensorDifference(name, *types, a.count)
    ordered = tally.differing - tally.nan or a.dtype != b.dtype
    largest = tally.largest if ordered and has_values(a.dtype) else None
    return TensorDifference(name, *types, a.count, tally.differing, tally.same_value, tally.nan, largest)
