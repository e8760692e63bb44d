"""From what a backend is asked for to the structures of the native modules, which know addresses only.

``native`` is the module to build them with: each has types of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_engine.backends.operations import (
    Band,
    Chunk,
    Combine,
    Consensus,
    Dense,
    Draw,
    FoundBand,
    Ranked,
)
from merge_engine.dtypes import DType


def dtype(native: Any, dtype: DType) -> Any:
    """A dtype of the module."""
    return getattr(native.DType, dtype.code)


def array(native: Any, address: int, of: DType) -> Any:
    """Elements at an address."""
    return native.Array(address, dtype(native, of))


def mask(native: Any, mask: Any) -> Any:
    """A mask; one that a module solved is its own already. The thresholds of a ``Ranked`` one are still to be set."""
    if isinstance(mask, native.Mask):
        return mask
    result = native.Mask()
    match mask:
        case Dense():
            result.kind = native.MaskKind.Dense
        case Band():
            result.kind = native.MaskKind.Band
            result.low, result.high = mask.low, mask.high
            result.set_low_positions(*mask.low_positions)
            result.set_high_positions(*mask.high_positions)
            result.by_draw, result.random_key = mask.by_draw, mask.random_key
        case Draw():
            result.kind = native.MaskKind.Draw
            result.set_low_positions(*((0, mask.below - 1) if mask.below else (1, 0)))
            result.random_key = mask.random_key
        case Ranked():
            result.kind = native.MaskKind.Ranked
            result.inverse_probability, result.random_key = mask.inverse_probability, mask.random_key
        case _:
            raise TypeError(f"not a mask: {mask!r}")
    return result


def noted(native: Any, address: int) -> Any:
    """A mask of what was noted before: a bit for each element of a chunk."""
    result = native.Mask()
    result.kind = native.MaskKind.Noted
    result.set_notes(address)
    return result


def rank_band(native: Any, band: FoundBand) -> Any:
    """A band of ranks, without what was found for them."""
    return native.RankBand(
        band.mask.first,
        band.mask.last,
        band.mask.slack,
        band.high is not None,
        band.mask.ties == "spread",
        band.mask.ties == "all",
        band.low_positions,
        band.high_positions,
        band.mask.random_key,
    )


def consensus(native: Any, chunk: Chunk, operation: Consensus, output: Any, masks: Sequence[Any]) -> Any:
    """A consensus over a chunk, with native masks."""
    entries = [
        native.Entry(model.native, mask, entry.rescale, entry.weight, entry.vote_slack, entry.retain_slack)
        for model, mask, entry in zip(chunk.models, masks, operation.entries, strict=True)
    ]
    return native.Consensus(
        chunk.base.native,
        output.native,
        dtype(native, chunk.working),
        entries,
        getattr(native.Election, operation.election),
        operation.normalize,
        operation.storage_rounding,
        operation.scale,
        operation.divisor,
    )


def combine(native: Any, chunk: Chunk, operation: Combine, output: Any) -> Any:
    """A linear combination of a chunk's inputs."""
    return native.Combine(
        [array.native for array in chunk.inputs],
        list(operation.coefficients),
        output.native,
        dtype(native, chunk.working),
        operation.divisor is not None,
        1.0 if operation.divisor is None else operation.divisor,
        operation.fused,
    )


def check(chunk: Chunk, output: Any = None) -> None:
    """Native code trusts addresses and counts, so they are checked here."""
    for array in chunk.inputs if output is None else [*chunk.inputs, output]:
        if array.count != chunk.count:
            raise ValueError(f"a chunk of {chunk.count} elements got an array of {array.count}")
    if chunk.count >= 2**32:
        raise ValueError(f"a chunk of {chunk.count} elements is too large; cut it below 2**32")


def check_combination(chunk: Chunk, operation: Combine, output: Any) -> None:
    """The same for a linear combination."""
    check(chunk, output)
    if len(operation.coefficients) != len(chunk.inputs):
        raise ValueError(f"{len(operation.coefficients)} coefficients for {len(chunk.inputs)} inputs")
