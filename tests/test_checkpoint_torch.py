"""Checkpoints in torch's format: the same interface, and code in them never runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_engine.checkpoint import open_checkpoint
from merge_engine.dtypes import BF16
from merge_engine.errors import CheckpointError
from merge_engine.operands import Access
from merge_engine.storage import OpenFiles

STATE = {
    "w": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "turned": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
}


class Payload:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def assert_holds_state(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(STATE)
    assert checkpoint.tensors["w"].dtype is BF16
    with OpenFiles() as files:
        for name, tensor in STATE.items():
            operand = checkpoint.tensors[name]
            assert operand.shape == tuple(tensor.shape)
            expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert operand.stored_bytes == len(expected)
            data = bytearray(len(expected))
            some = operand.range(0, operand.count, Access(files, "cached", in_place=True))
            for first in range(0, some.length, 5):  # in pieces that cut through elements
                some.read(memoryview(data), first, min(first + 5, some.length))
            assert bytes(some.view(memoryview(data))) == expected
            data, step = bytearray(len(expected)), 5 * operand.dtype.itemsize
            for start in range(0, max(operand.count, 1), 5):
                at = start * operand.dtype.itemsize
                operand.read_into(memoryview(data)[at : at + step], start, files)
            assert bytes(data) == expected


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_single_file(zipped: bool, nested: bool, name: str, tmp_path: Path) -> None:
    state = {"state_dict": STATE, "epoch": 3} if nested else STATE
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    assert_holds_state(tmp_path)
    assert_holds_state(tmp_path / name)


def test_shards(tmp_path: Path) -> None:
    index = {}
    for number, (name, tensor) in enumerate(STATE.items()):
        index[name] = f"pytorch_model-{number}.bin"
        torch.save({name: tensor}, tmp_path / index[name])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_holds_state(tmp_path)
    fingerprint = open_checkpoint(tmp_path).fingerprint
    assert fingerprint == open_checkpoint(tmp_path).fingerprint


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"new"}


def test_parameters_are_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(3))}, tmp_path / "pytorch_model.bin")
    data = bytearray(12)
    with OpenFiles() as files:
        open_checkpoint(tmp_path).tensors["w"].read_into(memoryview(data), 0, files)
    assert bytes(data) == torch.ones(3).numpy().tobytes()


@pytest.mark.parametrize(
    "later",
    [
        {"w": torch.ones(3)},
        {"v": torch.ones(4)},
        {"w": torch.ones(4, dtype=torch.bfloat16)},
        {"w": torch.ones(2, 2)},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_file_that_changes_before_the_first_read(
    zipped: bool, later: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=zipped)
    w, before = open_checkpoint(tmp_path).tensors["w"], path.stat()
    torch.save(later, path, _use_new_zipfile_serialization=zipped)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # only its content shows the change
    reason = "its size has changed" if path.stat().st_size != before.st_size else "tensor 'w': has changed"
    with OpenFiles() as files:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=reason):
                w.read_into(memoryview(bytearray(16)), 0, files)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    state = {"w": torch.ones(2), "evil": Payload(trace)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        open_checkpoint(tmp_path)
    assert not trace.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # the payload would have worked


def broken_files() -> dict[str, tuple[object, str]]:
    return {
        "empty": (b"", "cannot be read as a torch checkpoint"),
        "text": (b"not a checkpoint", "a text, not the weights"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        "wrong reference": (b"\x80\x02h\x07.", "cannot be read as a torch checkpoint|refused"),
        "torn zip": (b"PK\x03\x04" + bytes(100), "cannot be read as a torch checkpoint"),
        "list": ([torch.ones(1)], "holds a list"),
        "number inside": ({"w": torch.ones(1), "epoch": 3}, "found 'epoch' with a int"),
        "numbered": ({0: torch.ones(1)}, "found 0 with a Tensor"),
        "sparse": ({"w": torch.eye(3).to_sparse()}, "sparse"),
        "complex": ({"w": torch.ones(1, dtype=torch.complex128)}, "dtype complex128 is not supported"),
    }


@pytest.mark.parametrize("case", broken_files())
def test_broken_files(case: str, tmp_path: Path) -> None:
    content, reason = broken_files()[case]
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [KeyError("7"), AssertionError(), IndexError("pop"), AttributeError("a\nb")]
)
def test_whatever_garbage_raises(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80garbage")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read as a torch checkpoint: \S"):
        open_checkpoint(tmp_path)
