"""From what a backend is asked for to the structures of a native module, each of which has types of its own."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from merge_engine.backends.operations import Band, Chunk, Combine, Dense, Draw, FoundBand, Line, Ranked
from merge_engine.backends.statistics import sum_block
from merge_engine.dtypes import MERGEABLE, DType

if TYPE_CHECKING:
    from merge_engine import _native_types

ELECTIONS = ("none", "sum", "count", "deltas", "overlap")


class Structures:
    """Builds those of one native module."""

    def __init__(self, native: _native_types.NativeTypes):
        self._native = native
        self._dtypes = {dtype.code: getattr(native.DType, dtype.code) for dtype in MERGEABLE}
        self._elections = {name: getattr(native.Election, name) for name in ELECTIONS}

    def dtype(self, dtype: DType) -> _native_types.DType:
        """A dtype that can be merged."""
        result: _native_types.DType = self._dtypes[dtype.code]
        return result

    def election(self, election: str) -> _native_types.Election:
        """How signs are elected: see ``Consensus``."""
        result: _native_types.Election = self._elections[election]
        return result

    def mask(self, mask: Any, thresholds: int = 0) -> _native_types.Mask:
        """A mask; one that the module made is its own already. ``thresholds`` is where those of a ranked one are."""
        native = self._native.Mask
        if isinstance(mask, native):
            return mask
        match mask:
            case Dense():
                return native.dense()
            case Band():
                return native.band(
                    low=mask.low,
                    high=mask.high,
                    low_positions=mask.low_positions,
                    high_positions=mask.high_positions,
                    by_draw=mask.by_draw,
                    random_key=mask.random_key,
                )
            case Draw():
                return native.draw(below=mask.below, random_key=mask.random_key)
            case Ranked():
                return native.ranked(
                    thresholds=thresholds,
                    inverse_probability=mask.inverse_probability,
                    random_key=mask.random_key,
                )
        raise TypeError(f"not a mask: {mask!r}")

    def rank_band(self, band: FoundBand) -> _native_types.RankBand:
        """A band of ranks, without what was found for them."""
        return self._native.RankBand(
            first=band.mask.first,
            last=band.mask.last,
            slack=band.mask.slack,
            has_high=band.high is not None,
            spread=band.mask.ties == "spread",
            every_tie=band.mask.ties == "all",
            low_positions=band.low_positions,
            high_positions=band.high_positions,
            random_key=band.mask.random_key,
        )


def check(chunk: Chunk, output: Any = None) -> None:
    """What works on a device trusts addresses and counts, so they are checked here."""
    for one in chunk.inputs if output is None else [*chunk.inputs, output]:
        if one.count != chunk.count:
            raise ValueError(f"a chunk of {chunk.count} elements got an array of {one.count}")
    if chunk.count >= 2**32:
        raise ValueError(f"a chunk of {chunk.count} elements is too large; cut it below 2**32")


def check_lines(chunk: Chunk, line: Line | None) -> None:
    """The same for sums of lines: the chunk begins with a block of them, and has whole rows if they are columns."""
    check(chunk)
    if chunk.start % sum_block(line):
        raise ValueError(f"a chunk that begins inside a block of sums, at element {chunk.start}")
    if line is not None and line.stride > 1 and chunk.count % line.stride:
        raise ValueError(f"a chunk of {chunk.count} elements with rows of {line.stride}")


def check_combination(chunk: Chunk, operation: Combine, output: Any) -> None:
    """The same for a linear combination."""
    check(chunk, output)
    terms = len(chunk.models) if operation.on_base else len(chunk.inputs)
    if operation.lines is None:
        if len(operation.coefficients) != terms:
            raise ValueError(f"{len(operation.coefficients)} coefficients for {terms} inputs")
        return
    if operation.divisor is not None or operation.fused:
        raise ValueError("lines with coefficients of their own have no divisor, and are not fused")
    line, values = operation.lines
    lines = line.stride if line.stride > 1 else -(-(chunk.start + chunk.count) // line.length)
    if len(values) < terms * lines:
        raise ValueError(f"{len(values)} coefficients for {terms} inputs of {lines} lines")


def coefficients_of(chunk: Chunk, operation: Combine) -> array[float]:
    """The coefficients of the lines that a chunk has elements of: [lines, terms] float64."""
    assert operation.lines is not None
    line, values = operation.lines
    if line.stride > 1:
        return values
    terms = len(chunk.models) if operation.on_base else len(chunk.inputs)
    first, last = chunk.start // line.length, -(-(chunk.start + chunk.count) // line.length)
    return values[first * terms : last * terms]
