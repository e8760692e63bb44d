"""Digests: their definition; pieces, their order, threads and processes do not change them."""

from __future__ import annotations

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128

from merge_engine.errors import OutputError
from merge_engine.observe.digests import BLOCK, Digests, model_digest

BYTES = Random(0).randbytes(3 * BLOCK + 1000)
Sizes = dict[str, int]
Piece = tuple[str, int, memoryview]

near_blocks = st.builds(
    lambda blocks, rest: max(blocks * BLOCK + rest, 0), st.integers(0, 3), st.integers(-2, 900)
)
models = st.dictionaries(st.text(max_size=2), st.one_of(near_blocks, st.integers(0, 300)), max_size=5)


def data_of(name: str, size: int) -> memoryview:
    """A tensor's bytes; no two tensors begin with the same."""
    start = sum(name.encode()) % 97
    return memoryview(BYTES)[start : start + size]


def expected(data: memoryview) -> str:
    """A tensor's digest as docs/architecture.md defines it."""
    over_blocks = b""
    for start in range(0, len(data), 16 * 1024 * 1024):
        number = xxh3_128(data[start : start + 16 * 1024 * 1024]).intdigest()
        over_blocks += number.to_bytes(16, byteorder="big")
    return xxh3_128(over_blocks).hexdigest()


def expected_of(sizes: Sizes) -> dict[str, str]:
    return {name: expected(data_of(name, sizes[name])) for name in sorted(sizes)}


def pieces(sizes: Sizes, random: Random) -> list[list[Piece]]:
    """A model in pieces, in runs: the pieces of one run share blocks, so their order matters."""
    runs = []
    for name, size in sizes.items():
        cuts = {random.randint(0, size) for _ in range(random.randint(0, 6))}
        cuts |= {at for at in range(0, size, BLOCK) if random.random() < 0.7}
        for start, end in itertools.pairwise(sorted({0, size, *cuts})):
            if start % BLOCK == 0:
                runs.append([])
            runs[-1].append((name, start, data_of(name, size)[start:end]))
    random.shuffle(runs)
    return runs


def add_all(digests: Digests, run: list[Piece]) -> None:
    for piece in run:
        digests.add(*piece)


@settings(max_examples=40)
@given(models, st.integers(0, 2**32))
@example({}, 0)
@example({"none": 0}, 0)
@example({"": 3 * BLOCK, "b": BLOCK - 1, "a": BLOCK, "c": 2 * BLOCK + 1}, 1)
def test_any_cutting_in_any_order(sizes: Sizes, seed: int) -> None:
    random = Random(seed)
    runs = pieces(sizes, random)
    digests = Digests(sizes)
    while runs:
        run = random.choice(runs)
        digests.add(*run.pop(0))
        runs = [run for run in runs if run]
    assert digests.by_name() == expected_of(sizes)
    assert list(digests.by_name()) == sorted(sizes)


@settings(max_examples=30)
@given(models, st.integers(0, 2**32), st.integers(1, 8))
def test_any_number_of_threads(sizes: Sizes, seed: int, threads: int) -> None:
    digests = Digests(sizes)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda run: add_all(digests, run), pieces(sizes, Random(seed))))
    assert digests.by_name() == expected_of(sizes)


@settings(max_examples=30)
@given(models, st.integers(0, 2**32), st.integers(1, 4))
def test_parts_done_elsewhere_make_the_whole(sizes: Sizes, seed: int, places: int) -> None:
    """Any process may digest any block, report in any order, and report twice."""
    random = Random(seed)
    parts = [Digests(sizes) for _ in range(places)]
    for run in pieces(sizes, random):
        add_all(random.choice(parts), run)
    sent = [pickle.dumps(part.blocks()) for part in parts]
    whole = Digests(sizes)
    for blocks in [*random.sample(sent, places), random.choice(sent)]:
        whole.merge(pickle.loads(blocks))
    assert whole.by_name() == expected_of(sizes)


def test_halves_of_a_tensor_that_is_cut_at_a_block() -> None:
    sizes = {"w": 2 * BLOCK + 5}
    data = data_of("w", sizes["w"])
    first, second = Digests(sizes), Digests(sizes)
    first.add("w", 0, data[:BLOCK])
    second.add("w", BLOCK, data[BLOCK:])
    first.merge(second.blocks())
    assert first.by_name() == {"w": expected(data)}


def test_every_shape_and_type_of_memory() -> None:
    data = BYTES[:240]
    for view in (
        memoryview(data).cast("f"),
        memoryview(data).cast("B", (2, 3, 40)),
        memoryview(bytearray(data)),
    ):
        for size in (240, 480):
            digests = Digests({"w": size})
            for offset in range(0, size, 240):
                digests.add("w", offset, view)
            assert digests.by_name() == {"w": expected(memoryview(data * (size // 240)))}


def test_the_model_is_its_tensors_in_order_of_their_names() -> None:
    sizes = {"b": 5, "a.2": BLOCK + 1, "a.10": 0, "\u00fc": 7}
    lines = "".join(
        f"{expected(data_of(name, sizes[name]))}  {name}\n" for name in ("a.10", "a.2", "b", "\u00fc")
    )
    found = expected_of(sizes)
    assert model_digest(found) == xxh3_128(lines.encode()).hexdigest()
    assert model_digest(dict(reversed(found.items()))) == model_digest(found)
    assert model_digest({**found, "c": found["b"]}) != model_digest(found)


def test_the_document_defines_the_same() -> None:
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = text.split("## Digests")[1].split("```python\n")[1].split("```")[0]
    defined: dict[str, Any] = {}
    exec(code, defined)
    sizes = {"b": 2 * BLOCK + 1, "a": BLOCK, "c": 3, "none": 0}
    data = {name: bytes(data_of(name, size)) for name, size in sizes.items()}
    assert {name: defined["tensor_digest"](data[name]) for name in sizes} == expected_of(sizes)
    assert defined["model_digest"](data) == model_digest(expected_of(sizes))


@pytest.mark.parametrize(
    ("sizes", "given_pieces", "said"),
    [
        ({"w": 10}, [(0, 11)], "'w': it has 10 bytes, not 11 from 0 on"),
        ({"w": 10}, [(-1, 2)], "'w': it has 10 bytes, not 2 from -1 on"),
        ({"w": 10}, [(8, 3)], "'w': it has 10 bytes, not 3 from 8 on"),
        ({"w": 10}, [(3, 3)], "'w': block 0 got byte 3 and not 0"),
        ({"w": 10}, [(0, 3), (4, 3)], "'w': block 0 got byte 4 and not 3"),
        ({"w": 10}, [(0, 3), (0, 3)], "'w': block 0 got byte 0 and not 3"),
        ({"w": 10}, [(0, 10), (0, 10)], "'w': block 0 was digested twice"),
        ({"w": 10}, [(0, 10), (0, 4), (4, 6)], "'w': block 0 was digested twice"),
        ({"w": 10}, [(0, 10), (4, 4)], "'w': block 0 got byte 4 and not 0"),
        ({"w": BLOCK + 9}, [(BLOCK, 9), (BLOCK - 1, 10)], f"'w': block 0 got byte {BLOCK - 1} and not 0"),
        ({"w": BLOCK + 9}, [(0, BLOCK), (BLOCK, 9), (BLOCK, 9)], "'w': block 1 was digested twice"),
    ],
)
def test_bytes_that_are_not_the_next(sizes: Sizes, given_pieces: list[tuple[int, int]], said: str) -> None:
    digests = Digests(sizes)
    with pytest.raises(OutputError, match=f"internal error: digest of tensor {said}"):
        for offset, nbytes in given_pieces:
            digests.add("w", offset, memoryview(BYTES)[:nbytes])


def test_tensors_that_are_not_complete_are_named() -> None:
    digests = Digests({"none": 0, "all": 4, "half": 4, "blocks": 2 * BLOCK, "nothing": 1})
    digests.add("all", 0, memoryview(BYTES)[:4])
    digests.add("half", 0, memoryview(BYTES)[:2])
    digests.add("blocks", 0, memoryview(BYTES)[:BLOCK])
    assert {name: list(blocks) for name, blocks in digests.blocks().items()} == {"all": [0], "blocks": [0]}
    with pytest.raises(OutputError, match=r"not completely digested: blocks, half, nothing$"):
        digests.by_name()


def test_reports_that_do_not_fit() -> None:
    digests = Digests({"w": 4, "none": 0})
    digests.add("w", 0, memoryview(b"abcd"))
    digests.merge(digests.blocks())
    for blocks, said in (
        ({"w": {0: bytes(16)}}, "'w': block 0 came to different bytes in two places"),
        ({"w": {1: bytes(16)}}, "'w': it has no block 1"),
        ({"w": {-1: bytes(16)}}, "'w': it has no block -1"),
        ({"none": {0: bytes(16)}}, "'none': it has no block 0"),
        ({"x": {0: bytes(16)}}, "'x': it has no block 0"),
    ):
        with pytest.raises(OutputError, match=said):
            digests.merge(blocks)
    assert digests.by_name() == {"none": expected(memoryview(b"")), "w": expected(memoryview(b"abcd"))}
