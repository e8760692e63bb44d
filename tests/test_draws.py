"""The random draws of elements: the generator's known answers, their definition, and their statistics."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from merge_engine.backends.reference import draws, philox
from merge_engine.dtypes import BY_NAME
from merge_engine.methods import Action, Task

COUNT = 1 << 18
UNLIKELY = 1e-6
"""The tests are not random: this only says how far from the expected the figures may be."""


@pytest.mark.parametrize(
    ("key", "counter", "stream", "words"),
    (
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, -1, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            0x85A308D3_243F6A88 - 2**64,
            0x03707344_13198A2E,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ),
)
def test_the_generator_gives_published_answers(
    key: int, counter: int, stream: int, words: tuple[int, ...]
) -> None:
    """Those of Philox 4x32-10 in Random123's file of known answers."""
    found = philox(key, torch.tensor([counter]), stream)
    assert tuple(int(word) for word in found) == words


def plain_philox(key: int, block: int, stream: int) -> tuple[int, int, int, int]:
    """One block, from the paper's definition."""
    lower = 2**32 - 1
    c0, c1, c2, c3 = block & lower, block >> 32, stream, 0
    for round_ in range(10):
        k0 = (key + round_ * 0x9E3779B9) & lower
        k1 = ((key >> 32) + round_ * 0xBB67AE85) & lower
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = odd >> 32 ^ c1 ^ k0, odd & lower, even >> 32 ^ c3 ^ k1, even & lower
    return c0, c1, c2, c3


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_a_draw_is_a_byte_above_24_bits(key: int, index: int) -> None:
    block = b"".join(word.to_bytes(4, "little") for word in plain_philox(key, index // 16, 0))
    lower = plain_philox(key, index // 4, 1)[index % 4] % 2**24
    assert int(draws(key, torch.tensor([index]))) == block[index % 16] * 2**24 + lower


def parts(drawn: torch.Tensor) -> dict[str, torch.Tensor]:
    """The top byte of draws, and the two bytes that follow, as numbers from 0 to 255."""
    return {f"bits from {shift} on": drawn >> shift & 0xFF for shift in (24, 16, 8)}


@pytest.mark.parametrize("key", (0, 123, 2**64 - 1))
def test_draws_are_uniform(key: int) -> None:
    drawn = draws(key, torch.arange(COUNT))
    assert stats.kstest(drawn.numpy() / 2.0**32, "uniform").pvalue > UNLIKELY
    for name, byte in parts(drawn).items():
        for lane in (byte, *(byte[start::16] for start in range(16))):  # each place in a block
            counts = torch.bincount(lane, minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > UNLIKELY, name


def independent(a: torch.Tensor, b: torch.Tensor) -> None:
    """A test of all pairs of the highest four bits, and of the linear correlation."""
    pairs = torch.bincount(a // 2**28 * 16 + b // 2**28, minlength=256)
    assert stats.chisquare(pairs.numpy()).pvalue > UNLIKELY
    assert stats.pearsonr(a.numpy(), b.numpy()).pvalue > UNLIKELY


@pytest.mark.parametrize("distance", (1, 2, 3, 4, 8, 15, 16, 17, 63, 64, 4096))
def test_neighbours_are_independent(distance: int) -> None:
    drawn = draws(99, torch.arange(COUNT + distance))
    independent(drawn[:COUNT], drawn[distance:])


def test_models_tensors_and_seeds_are_independent() -> None:
    def key(name: str, seed: int, model: int) -> int:
        bf16 = BY_NAME["bfloat16"]
        return Task(name, (1,), working=bf16, out=bf16, action=Action.MERGE, inputs=(), seed=seed).random_key(
            model
        )

    keys = [key("a", 0, 0), key("a", 0, 1), key("b", 0, 0), key("a", 1, 0), 5, 6, 5 + 2**32]
    drawn = [draws(one, torch.arange(COUNT)) for one in keys]
    for a, b in combinations(drawn, 2):
        independent(a, b)


def test_the_top_byte_says_nothing_of_the_lower_bits() -> None:
    drawn = draws(7, torch.arange(COUNT))
    independent(drawn, drawn % 2**24 * 2**8)
