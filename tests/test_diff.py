"""``diff``: every difference between two checkpoints, counted as torch counts it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import merge_engine as me
from merge_engine.dtypes import ALL, BY_CODE, DType
from merge_engine.inspect.elements import PIECE, compare, has_values
from merge_engine.storage import reading

VALUED = [dtype for dtype in ALL if has_values(dtype)]
INTEGERS = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")

valued = st.sampled_from(VALUED)


def bits_of(raw: bytes, dtype: DType) -> list[int]:
    """Elements as bits."""
    if dtype.bits >= 8:
        size = dtype.itemsize
        return [int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size)]
    number = int.from_bytes(raw, "little")
    return [number >> at & (1 << dtype.bits) - 1 for at in range(0, 8 * len(raw), dtype.bits)]


def numbers_of(raw: bytes, dtype: DType) -> list[Any]:
    """Elements as Python's numbers, one by one."""
    if dtype.code == "BOOL":
        return list(raw)
    found = []
    for at in range(0, len(raw), dtype.itemsize):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = torch.frombuffer(bytearray(raw[at : at + dtype.itemsize]), dtype=getattr(torch, dtype.name))
        if dtype.code in INTEGERS:
            found.append(one.item())
        else:
            found.append(one.to(torch.complex128 if dtype.code == "C64" else torch.float64).item())
    return found


def is_nan(x: Any) -> bool:
    return x != x


def distance(p: Any, q: Any) -> Any:
    if isinstance(p, int) and isinstance(q, int):
        return abs(p - q)
    if isinstance(p, complex) or isinstance(q, complex):
        return abs(complex(p) - complex(q))
    if math.isinf(p) or math.isinf(q):
        return math.inf
    if isinstance(p, float) and isinstance(q, float):
        return abs(p - q)
    return float(abs(Fraction(p) - Fraction(q)))


def oracle(a: bytes, b: bytes, a_type: DType, b_type: DType) -> tuple[int, int, int, Any]:
    """The definition, element by element."""
    x, y = numbers_of(a, a_type), numbers_of(b, b_type)
    if a_type == b_type:
        pairs = [
            (p, q) for p, q, i, j in zip(x, y, bits_of(a, a_type), bits_of(b, b_type), strict=True) if i != j
        ]
    else:
        pairs = [(p, q) for p, q in zip(x, y, strict=True) if p != q and not (is_nan(p) and is_nan(q))]
    ordered = [(p, q) for p, q in pairs if not is_nan(p) and not is_nan(q)]
    ordered = [(p, q) for p, q in ordered if not is_nan(distance(p, q))]
    largest = max((distance(p, q) for p, q in ordered), default=0)
    return len(pairs), sum(p == q for p, q in pairs), len(pairs) - len(ordered), largest


def special(dtype: DType) -> list[bytes]:
    """Elements that break careless arithmetic: the bounds, zeros of both signs, infinities, NaN."""
    size = dtype.itemsize
    chosen = [0, 1, 2 ** (dtype.bits - 1), 2 ** (dtype.bits - 1) - 1, 2**dtype.bits - 1, 2**53 + 1]
    found = [(bits % 2**dtype.bits).to_bytes(size, "little") for bits in chosen]
    if dtype.code in ("F64", "F32", "F16", "BF16"):
        for value in (-0.0, math.inf, -math.inf, math.nan, 1.5, 2.0**60):
            one = torch.tensor([value], dtype=getattr(torch, dtype.name))
            found.append(one.view(torch.uint8).numpy().tobytes())
    return found


@st.composite
def elements(draw: st.DrawFn, dtype: DType, count: int) -> bytes:
    one = st.sampled_from(special(dtype)) | st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)
    return b"".join(draw(st.lists(one, min_size=count, max_size=count)))


@given(st.data(), valued, st.integers(1, 20))
@settings(max_examples=300)
def test_elements_of_one_type(data: st.DataObject, dtype: DType, count: int) -> None:
    a, b = data.draw(elements(dtype, count)), data.draw(elements(dtype, count))
    found = compare(memoryview(a), memoryview(b), dtype, dtype)
    assert (found.differing, found.same_value, found.nan, found.largest) == oracle(a, b, dtype, dtype)


@given(st.data(), valued, valued, st.integers(1, 20))
@settings(max_examples=300)
def test_elements_of_two_types(data: st.DataObject, a_type: DType, b_type: DType, count: int) -> None:
    a, b = data.draw(elements(a_type, count)), data.draw(elements(b_type, count))
    found = compare(memoryview(a), memoryview(b), a_type, b_type)
    expected = oracle(a, b, a_type, b_type)
    if a_type == b_type:
        return
    assert (found.differing, found.nan) == (expected[0], expected[2])
    assert found.largest == expected[3]


@given(st.sampled_from([dtype for dtype in ALL if not has_values(dtype)]), st.data())
@example(BY_CODE["F6_E2M3"], None)
def test_elements_of_types_that_torch_does_not_compute_with(dtype: DType, data: st.DataObject | None) -> None:
    size = 24
    a = bytes(size) if data is None else data.draw(st.binary(min_size=size, max_size=size))
    b = b"\xff" * size if data is None else data.draw(st.binary(min_size=size, max_size=size))
    found = compare(memoryview(a), memoryview(b), dtype, dtype)
    assert found.differing == sum(p != q for p, q in zip(bits_of(a, dtype), bits_of(b, dtype), strict=True))


def test_integers_beyond_what_float64_holds() -> None:
    def stored(values: list[int], signed: bool) -> memoryview:
        return memoryview(b"".join(value.to_bytes(8, "little", signed=signed) for value in values))

    i64, u64 = BY_CODE["I64"], BY_CODE["U64"]
    low, high = -(2**63), 2**63 - 1
    assert compare(stored([low, 5], True), stored([high, 5], True), i64, i64).largest == 2**64 - 1
    assert compare(stored([0], False), stored([2**64 - 1], False), u64, u64).largest == 2**64 - 1
    assert compare(stored([low], True), stored([2**64 - 1], False), i64, u64).largest == 2**64 - 1 + 2**63
    power = memoryview(torch.tensor([2.0**53], dtype=torch.float64).numpy()).cast("B")
    one = compare(stored([2**53 + 1], True), power, i64, BY_CODE["F64"])
    assert (one.differing, one.largest) == (1, 1)


def test_many_elements_are_compared_piece_by_piece() -> None:
    torch.manual_seed(0)
    x = torch.randn(3 * PIECE + 100)
    y = x.clone()
    y[PIECE + 5] += 1
    y[-1] -= 2
    found = compare(*(memoryview(one.numpy()).cast("B") for one in (x, y)), BY_CODE["F32"], BY_CODE["F32"])
    assert (found.differing, found.nan) == (2, 0)
    assert found.largest == float((x.double() - y.double()).abs().max())


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
floats = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@given(st.data(), shapes, floats, floats)
@settings(max_examples=40)
def test_checkpoints_against_torch(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    shape: tuple[int, ...],
    one: torch.dtype,
    two: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(shape).to(one)
    y = (x + torch.randn(shape).to(one) * data.draw(st.sampled_from([0, 1]))).to(two)
    save_file({"w": x}, folder / "a.safetensors")
    torch.save({"w": y}, folder / "b.bin")
    found = me.diff(folder / "a.safetensors", folder / "b.bin")
    distance = (x.double() - y.double()).abs()
    if one == two and torch.equal(x, y):
        assert found.same and found.equal == 1
        return
    (tensor,) = found.tensors
    assert (tensor.a.shape, tensor.b.dtype) == (shape, str(two).removeprefix("torch."))
    assert tensor.differing == int((x.double() != y.double()).sum()) and tensor.nan == 0
    assert tensor.largest == (float(distance.max()) if distance.numel() else 0)


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = {f"layers.{i}.weight": torch.randn(40, 30).bfloat16() for i in range(5)}
    return made | {"scalar": torch.tensor(0.5), "none": torch.zeros(0, 3), "ids": torch.arange(7)}


@pytest.mark.parametrize("available", [0, 1 << 40])  # past the page cache, and through it
def test_the_same_tensors_in_other_files(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "available_memory", lambda: available)
    tensors = state()
    a = save_checkpoint("a", tensors)
    b = save_checkpoint("b", dict(reversed(tensors.items())), shards=3)
    c = save_checkpoint("c", {})
    (c / "model.safetensors").unlink()
    torch.save(tensors, c / "pytorch_model.bin")
    for other in (b, c):
        started, parts = [], []
        found = me.diff(a, other, on_start=started.append, progress=parts.append)
        assert found.same and found.equal == len(tensors), found
        assert [sum(parts)] == started == [2 * sum(tensor.nbytes for tensor in tensors.values())]


def test_a_large_tensor_that_differs_at_one_place(save_checkpoint: SaveCheckpoint) -> None:
    large = torch.zeros(3_000_000)
    a = save_checkpoint("a", {"w": large})
    large[2_345_678] = 0.25
    found = me.diff(a, save_checkpoint("b", {"w": large}))
    (tensor,) = found.tensors
    assert (tensor.differing, tensor.largest, tensor.elements) == (1, 0.25, 3_000_000)


def test_zeros_infinities_and_nan(save_checkpoint: SaveCheckpoint) -> None:
    nan, inf, tensor = math.nan, math.inf, torch.tensor
    a = save_checkpoint("a", {"zero": tensor([0.0]), "nan": tensor([nan, 1, nan]), "inf": tensor([inf, inf])})
    b = save_checkpoint("b", {"zero": tensor([-0.0]), "nan": tensor([nan, nan, 2]), "inf": tensor([inf, 1])})
    found = {tensor.name: tensor for tensor in me.diff(a, b).tensors}
    assert (found["zero"].differing, found["zero"].same_value, found["zero"].largest) == (1, 1, 0)
    assert (found["nan"].differing, found["nan"].nan, found["nan"].largest) == (2, 2, None)
    assert (found["inf"].differing, found["inf"].largest) == (1, inf)
    plain = json.loads(json.dumps(me.diff(a, b).as_dict(), allow_nan=False))
    assert {tensor["name"]: tensor["largest"] for tensor in plain["tensors"]} == {
        "zero": 0,
        "nan": None,
        "inf": "inf",
    }


def test_names_shapes_and_dtypes(save_checkpoint: SaveCheckpoint) -> None:
    def ones() -> torch.Tensor:
        return torch.ones(4, 2)

    a = save_checkpoint("a", {"shape": ones(), "dtype": ones(), "old": ones(), "same": ones()})
    b = save_checkpoint("b", {"shape": ones().T, "dtype": ones().half(), "new": ones(), "same": ones()})
    found = me.diff(a, b)
    assert (found.only_in_a, found.only_in_b, found.equal) == (["old"], ["new"], 1)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert (by_name["shape"].differing, by_name["shape"].b.shape) == (None, (2, 4))
    assert (by_name["dtype"].differing, by_name["dtype"].largest) == (0, 0)
    assert by_name["dtype"].b.dtype == "float16" and not found.same


def test_config_and_other_files(save_checkpoint: SaveCheckpoint) -> None:
    one = {"a": 1, "text": {"rope": 1e4, "deep": {"x": [1]}}, "gone": None, "flag": 1}
    two = {"a": 1, "text": {"rope": 1e6, "deep": {"x": [1, 2]}}, "new": "x", "flag": True}
    a, b = save_checkpoint("a", state(), one), save_checkpoint("b", state(), two)
    for folder, token in ((a, "y"), (b, "z")):
        vocabulary = {"x": 0, token: 1, **({"w": 2} if folder == a else {})}
        tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 9, "content": token}]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "generation_config.json").write_text(json.dumps(token))
    (a / "merges.txt").write_text("")
    found = me.diff(a, b)
    assert found.config == {
        "text.rope": {"a": 1e4, "b": 1e6},
        "text.deep.x": {"a": [1], "b": [1, 2]},
        "gone": {"a": None},
        "flag": {"a": 1, "b": True},
        "new": {"b": "x"},
    }
    assert found.tokens == 3
    assert found.files == {
        "generation_config.json": "different",
        "merges.txt": "only in a",
        "tokenizer.json": "different",
        "tokenizer_config.json": "equal",
    }
    assert found.equal == len(state()) and not found.same and me.diff(a, a).same


def test_tokens_of_a_vocabulary_that_is_a_list(save_checkpoint: SaveCheckpoint) -> None:
    a, b = save_checkpoint("a", state()), save_checkpoint("b", state())
    for folder, tokens in ((a, ["x", "y"]), (b, ["x", "z", "y"])):
        model = {"model": {"vocab": [[token, -1.5] for token in tokens]}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(model))
    assert me.diff(a, b).tokens == 2
    (b / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    assert me.diff(a, b).tokens is None and me.diff(a, b).files["tokenizer.json"] == "different"


def test_checkpoints_that_are_missing(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    a = save_checkpoint("a", state())
    with pytest.raises(me.CheckpointError, match="there is no such folder"):
        me.diff(a, tmp_path / "nowhere")
    with pytest.raises(me.OptionError):
        me.diff(a, "owner/name@one@two")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merge_engine", "diff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    tensors = {f"w\x1b[2J{i}": torch.full((3,), float(i)) for i in range(30)}
    a = save_checkpoint("a", tensors)
    b = save_checkpoint("b", {name: tensor + i for i, (name, tensor) in enumerate(tensors.items())})
    same = call(a, a)
    assert same.returncode == 0 and "nothing differs" in same.stdout
    different = call(a, b)
    assert different.returncode == 1 and "1 equal, 29 different" in different.stdout
    assert "9 more differ; --all shows them" in different.stdout and "\x1b" not in different.stdout
    assert r"w\x1b[2J29" in different.stdout and call(a, b, "--all").stdout.count(r"w\x1b") == 29
    found = json.loads(call(a, b, "--json").stdout)
    assert found == json.loads(json.dumps(me.diff(a, b).as_dict()))
    missing = call(a, tmp_path / "nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and not missing.stdout
