"""Find keys by rank in histograms: from the top, the bin in which the counts reach the rank.

One program for each rank adds up bins, a span of them at a time, and looks into the span where the rank is reached.
Nothing comes back to the host: what is found is a row (key, how many are larger, how many equal).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from merge_engine.kernels.launching import INTERPRETED, OPTIONS

SPAN = 32768 if INTERPRETED else 2048  # the interpreter takes about as long for many bins as for few


@triton.jit
def counts_of(histogram, bins, COPIES: tl.constexpr, BINS: tl.constexpr, SPAN: tl.constexpr):
    """The counts of a span of bins, over all copies of a histogram."""
    total = tl.zeros((SPAN,), tl.int64)
    for copy in tl.static_range(COPIES):
        total += tl.load(histogram + copy * BINS + bins)
    return total


@triton.jit
def select_kernel(
    histograms,
    queries,
    found,
    missing,
    COPIES: tl.constexpr,
    BINS: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    ONLY_MISSING: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One query: slot, rank, and key, above and equal as found at the level above."""
    query = queries + tl.program_id(0) * 5
    if ONLY_MISSING:  # noqa: SIM102 (a constant: without it nothing is loaded)
        if tl.load(missing + tl.load(query)) == 0:
            return
    histogram = histograms + tl.load(query) * COPIES * BINS
    prefix = tl.load(query + 2)
    above = tl.load(query + 3)
    wanted = tl.load(query + 1) - above
    within = tl.arange(0, SPAN)

    span = BINS // SPAN - 1
    passed = wanted * 0  # how many keys are in the spans above
    here = tl.sum(counts_of(histogram, span * SPAN + within, COPIES, BINS, SPAN), axis=0)
    while (passed + here < wanted) & (span > 0):
        passed += here
        span -= 1
        here = tl.sum(counts_of(histogram, span * SPAN + within, COPIES, BINS, SPAN), axis=0)

    counts = counts_of(histogram, span * SPAN + within, COPIES, BINS, SPAN)
    at_least = tl.cumsum(counts, axis=0, reverse=True)  # keys of this span in this bin or a higher one
    place = tl.sum((passed + at_least >= wanted).to(tl.int32), axis=0) - 1
    equal = tl.sum(tl.where((within == place) & (wanted > 0), counts, 0), axis=0)
    larger = tl.sum(tl.where(within > place, counts, 0), axis=0)
    row = found + tl.program_id(0) * 3
    tl.store(row, (prefix << NEXT_BITS) | (span * SPAN + place).to(tl.int64))
    tl.store(row + 1, above + passed + larger)
    tl.store(row + 2, equal)


def select(
    histograms: torch.Tensor,
    queries: torch.Tensor,
    found: torch.Tensor,
    next_bits: int,
    missing: torch.Tensor | None = None,
) -> None:
    """Answer ``queries``, [m, 5] int64: slot, rank, and what was found above (0, 0, 0 at level 0).

    ``found``: [m, 3] int64, written: the key so far (that of the level above, shifted by ``next_bits``, and the bin),
    how many keys are larger, how many equal: none where no key has the rank. With ``missing``, [slots] int64, only
    queries are answered for whose slot it is not 0.
    """
    select_kernel[(len(queries),)](
        histograms,
        queries,
        found,
        queries if missing is None else missing,
        COPIES=histograms.shape[1],
        BINS=histograms.shape[2],
        NEXT_BITS=next_bits,
        ONLY_MISSING=missing is not None,
        SPAN=SPAN,
        **OPTIONS,
    )
