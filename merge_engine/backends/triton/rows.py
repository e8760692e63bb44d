"""Masks, bands and keys as rows of int64, the way that kernels/masks.py and kernels/bands.py take them.

Some rows are known to the host, others are in device memory already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from merge_engine.backends.operations import Band, Dense, Draw, Found, FoundBand, Ranked, Scored
from merge_engine.backends.triton.handles import FoundRow, SolvedRow
from merge_engine.kernels import masks

_LARGEST = 2**63 - 2  # one can be added to it
_LAST_DRAW = 2**32 - 1


def signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def bounded(*values: int) -> list[int]:
    """Bounds of 64 bits as int64, which no key and no index exceeds."""
    return [min(value, _LARGEST) for value in values]


def found_row(found: Found | FoundRow | None) -> Sequence[int] | torch.Tensor:
    """Key, how many are larger, how many equal; zeros for none."""
    if isinstance(found, FoundRow):
        return found.row
    return list(found or Found(0, 0, 0))


def described_band(band: FoundBand) -> list[int]:
    """The columns of kernels/bands.py, up to what was found."""
    return [
        band.mask.first,
        band.mask.last,
        band.mask.slack > 0,
        band.high is not None,
        band.mask.ties == "spread",
        band.mask.ties == "all",
        *bounded(*band.low_positions, *band.high_positions),
        signed(band.mask.random_key),
    ]


def band_kind(by_draw: bool, has_top: bool) -> int:
    """The number of a band's kind in kernels/masks.py."""
    if has_top:
        kind = masks.BAND_WITH_TOP_BY_DRAW if by_draw else masks.BAND_WITH_TOP_BY_INDEX
    else:
        kind = masks.BAND_BY_DRAW if by_draw else masks.BAND_BY_INDEX
    result: int = kind.value
    return result


def kind_of(mask: Any) -> int:
    """The number of a mask's kind in kernels/masks.py. Raises ``TypeError`` for anything else."""
    match mask:
        case Dense():
            kind = masks.DENSE
        case Draw():
            kind = masks.DRAW if mask.below else masks.NOTHING
        case Ranked(inverse_probability=inverse):
            kind = masks.RANKED_INVERSE if inverse else masks.RANKED
        case Scored():
            kind = masks.NOTED
        case SolvedRow():
            return mask.kind
        case Band():
            return band_kind(mask.by_draw, has_top=mask.high < _LARGEST)
        case _:
            raise TypeError(f"not a mask: {mask!r}")
    result: int = kind.value
    return result


def mask_row(mask: Any) -> Sequence[int] | torch.Tensor:
    """The numbers of kernels/masks.py; of a band, keys where its thresholds go (see ``masks.resolve``)."""
    row = [0] * masks.ROW.value
    match mask:
        case SolvedRow():
            return mask.row
        case Band():
            last = _LAST_DRAW if mask.by_draw else _LARGEST
            row[masks.LOW.value], row[masks.HIGH.value] = bounded(mask.low, mask.high)
            row[masks.LOW_FIRST.value : masks.HIGH_LAST.value + 1] = [
                min(position, last) for position in (*mask.low_positions, *mask.high_positions)
            ]
        case Draw():
            row[masks.LOW_LAST.value] = mask.below - 1
    row[masks.RANDOM_KEY.value] = signed(getattr(mask, "random_key", 0))
    return row
