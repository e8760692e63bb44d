"""Every wrong safetensors header is refused with one line that names the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from merge_engine.checkpoint import OutputTensor, encode_header, read_header
from merge_engine.checkpoint.header import MAX_HEADER
from merge_engine.dtypes import BF16, BY_CODE, F32
from merge_engine.errors import CheckpointError, OutputError
from merge_engine.storage import PAGE


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def with_entries(entries: dict[str, object], data: bytes = b"") -> bytes:
    return framed(json.dumps(entries).encode(), data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_entry(text: str) -> bytes:
    return framed(b'{"w":' + text.encode() + b"}", bytes(8))


ATTACKS = {
    "empty file": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a Git LFS pointer, not the weights; run git lfs pull",
    ),
    "header past the end": (struct.pack("<Q", 100) + b"{}", "truncated: claims a header of 100"),
    "header of 2^64 - 1": (b"\xff" * 8 + b"{}", f"more than the {MAX_HEADER}"),
    "header one above the limit": (struct.pack("<Q", MAX_HEADER + 1) + b"{}", f"more than the {MAX_HEADER}"),
    "empty header": (framed(b""), "does not start with"),
    "pickle": (framed(b"\x80\x02}q\x00."), "does not start with"),
    "leading space": (framed(b" {}"), "does not start with"),
    "list": (framed(b"[]"), "does not start with"),
    "not utf-8": (framed(b'{"\xff": 1}'), "no valid JSON"),
    "broken json": (framed(b'{"w":'), "no valid JSON"),
    "text after the object": (framed(b"{} {}"), "no valid JSON"),
    "nul padding": (framed(b"{}\0\0"), "no valid JSON"),
    "deep nesting": (framed(b'{"w":' + b"[" * 200_000), "no valid JSON"),
    "lone surrogate": (framed(b'{"\\ud800": {}}'), "no valid JSON"),
    "number of 5000 digits": (raw_entry('{"shape": [' + "9" * 5000 + "]}"), "no valid JSON"),
    "same name twice": (framed(b'{"w": {}, "w": {}}'), "'w' occurs twice"),
    "same field twice": (raw_entry('{"dtype":"F32","dtype":"F16"}'), "'dtype' occurs twice"),
    "metadata list": (with_entries({"__metadata__": []}), "__metadata__"),
    "metadata number": (with_entries({"__metadata__": {"a": 1}}), "'a' holds 1"),
    "tensor is a list": (with_entries({"w": []}), "tensor 'w': is []"),
    "unknown dtype": (with_entries({"w": entry("F33")}, bytes(8)), 'unknown dtype "F33"'),
    "dtype in lower case": (with_entries({"w": entry("f32")}, bytes(8)), 'unknown dtype "f32"'),
    "dtype missing": (raw_entry('{"shape":[2],"data_offsets":[0,8]}'), "unknown dtype null"),
    "dtype a list": (with_entries({"w": entry(["F32"])}, bytes(8)), "unknown dtype"),
    "shape missing": (raw_entry('{"dtype":"F32","data_offsets":[0,8]}'), "shape null"),
    "shape negative": (with_entries({"w": entry(shape=[-2])}, bytes(8)), "shape [-2]"),
    "both sizes negative": (with_entries({"w": entry(shape=[-1, -2])}, bytes(8)), "shape [-1, -2]"),
    "shape a float": (with_entries({"w": entry(shape=[2.0])}, bytes(8)), "shape [2.0]"),
    "shape a boolean": (with_entries({"w": entry(shape=[True, 2])}, bytes(8)), "shape [true, 2]"),
    "shape NaN": (raw_entry('{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}'), "it holds NaN"),
    "shape a number": (with_entries({"w": entry(shape=2)}, bytes(8)), "shape 2"),
    "size of 2^63": (with_entries({"w": entry(shape=[2**63])}, bytes(8)), "from 0 to 2^63"),
    "product of 2^64": (with_entries({"w": entry(shape=[2**32, 2**32])}, bytes(8)), "more than 2^63"),
    "wraps around to 2": (with_entries({"w": entry(shape=[2**62, 4, 2])}, bytes(8)), "more than 2^63"),
    "long product": (with_entries({"w": entry(shape=[2**62] * 100_000)}, bytes(8)), "more than 2^63"),
    "offsets missing": (raw_entry('{"dtype":"F32","shape":[2]}'), "data_offsets null"),
    "one offset": (with_entries({"w": entry(offsets=[8])}, bytes(8)), "data_offsets [8]"),
    "three offsets": (with_entries({"w": entry(offsets=[0, 8, 8])}, bytes(8)), "data_offsets [0, 8, 8]"),
    "offset a float": (with_entries({"w": entry(offsets=[0, 8.0])}, bytes(8)), "data_offsets [0, 8.0]"),
    "offset negative": (with_entries({"w": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets [-8, 0]"),
    "offset of 2^64": (with_entries({"w": entry(offsets=[2**64, 2**64 + 8])}, bytes(8)), "not two positions"),
    "offsets reversed": (with_entries({"w": entry(offsets=[8, 0])}, bytes(8)), "reversed"),
    "size differs": (with_entries({"w": entry(shape=[3])}, bytes(8)), "is 12 bytes, but"),
    "packed to half a byte": (with_entries({"w": entry("F4", [3], [0, 1])}, bytes(1)), "whole bytes"),
    "packed to three quarters": (with_entries({"w": entry("F6_E2M3", [2], [0, 1])}, bytes(1)), "whole bytes"),
    "overlap": (with_entries({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps by 4"),
    "same bytes twice": (with_entries({"a": entry(), "b": entry()}, bytes(8)), "overlaps by 8"),
    "hole at the start": (with_entries({"w": entry(offsets=[4, 12])}, bytes(12)), "the 4 bytes before it"),
    "hole": (with_entries({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)), "the 1 bytes before it"),
    "truncated": (with_entries({"w": entry()}, bytes(7)), "promises 8 bytes of data, the file has 7"),
    "far past the end": (with_entries({"w": entry("U8", [2**60], [0, 2**60])}), "truncated"),
    "rest at the end": (with_entries({"w": entry()}, bytes(9)), "the last 1 bytes"),
    "data without tensors": (framed(b"{}", bytes(3)), "the last 3 bytes"),
    "line break in a name": (with_entries({"a\nb": entry("no")}, bytes(8)), r"'a\nb'"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_in_one_line(attack: str, tmp_path: Path) -> None:
    content, reason = ATTACKS[attack]
    path = tmp_path / "attack.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 600


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot be read"):
            read_header(path)


def test_what_is_legal_is_read(tmp_path: Path) -> None:
    path = tmp_path / "legal.safetensors"
    entries = {
        "__metadata__": {"format": "pt"},
        "second": entry(offsets=[8, 16]),
        "packed": entry("F4", [2, 2], [16, 18]),
        "empty": entry(shape=[0, 5], offsets=[8, 8]),
        "first": {**entry("I64", [], [0, 8]), "future": "field"},
    }
    path.write_bytes(framed(json.dumps(entries).encode() + b"  \n", bytes(18)))
    header = read_header(path)
    assert list(header.tensors) == ["first", "empty", "second", "packed"]
    assert header.metadata == {"format": "pt"}
    assert header.tensors["first"].count == 1
    assert header.tensors["first"].start == header.data_start
    assert header.tensors["empty"].nbytes == 0
    assert header.tensors["packed"].count == 4


def test_no_tensors_at_all(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    path.write_bytes(framed(b'{"__metadata__":null}'))
    assert read_header(path).tensors == {}


def test_every_dtype_of_safetensors_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dtypes.safetensors"
    for code, dtype in BY_CODE.items():
        nbytes = 8 * dtype.bits // 8
        path.write_bytes(with_entries({"w": entry(code, [8], [0, nbytes])}, bytes(nbytes)))
        assert read_header(path).tensors["w"].dtype is dtype
        with safe_open(path, "pt") as file:
            assert list(file.keys()) == ["w"]


def test_agrees_with_the_library_that_wrote_the_file(tmp_path: Path) -> None:
    path = tmp_path / "library.safetensors"
    save_file({"b": torch.ones(3, 5, dtype=torch.bfloat16), "a": torch.zeros(7)}, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "b": (BF16, (3, 5)),
        "a": (F32, (7,)),
    }


@pytest.mark.parametrize("name_length", [1, 3900, 4010, 4020, 4096, 9000])
def test_encoded_header_ends_on_a_page(name_length: int, tmp_path: Path) -> None:
    tensor = OutputTensor("é" * name_length, F32, (2,))
    header = encode_header([tensor], {"format": "pt"})
    assert len(header) % PAGE == 0
    path = tmp_path / "encoded.safetensors"
    path.write_bytes(header + bytes(8))
    assert read_header(path).data_start == len(header)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor(tensor.name), torch.zeros(2))


def test_header_that_no_reader_accepts_is_not_written() -> None:
    with pytest.raises(OutputError, match="smaller shard size"):
        encode_header([OutputTensor("x" * MAX_HEADER, F32, (1,))], {})
