"""Torch's archives that are damaged or made to harm: one line each, no memory, no code, and never wrong numbers."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.checkpoint import open_checkpoint
from merge_engine.errors import CheckpointError
from merge_engine.storage import OpenFiles

STATE = {
    "v": torch.arange(16, dtype=torch.float32),
    "w": torch.arange(16, 32, dtype=torch.float32),
    "bias": torch.arange(5, dtype=torch.bfloat16),
}
Records = dict[str, bytes]


def read_all(path: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(path)
    found = {}
    with OpenFiles() as files:
        for name, operand in checkpoint.tensors.items():
            data = bytearray(operand.stored_bytes)
            operand.read_into(memoryview(data), 0, files)
            found[name] = bytes(data)
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def refused(path: Path) -> str:
    with warnings.catch_warnings(), pytest.raises(CheckpointError) as caught:
        warnings.simplefilter("error")
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message


def rewrite(path: Path, change: Callable[[Records], Records], compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with other records, written anew."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in change(records).items():
            archive.writestr(name, data)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(STATE, path)
    return path


def part(records: Records, end: str) -> str:
    return next(name for name in records if name.endswith(end))


def test_a_rewritten_archive_is_read(archive: Path) -> None:
    rewrite(archive, lambda records: records | {part(records, "data/0") + "unused": bytes(12)})
    assert read_all(archive) == {name: raw(tensor) for name, tensor in STATE.items()}


@pytest.mark.parametrize("key", ["data/0", "data/1", "data/2"])
@pytest.mark.parametrize("length", [0, 8, 60, 68, 4096])
def test_a_record_of_another_size(key: str, length: int, archive: Path) -> None:
    """A mapped record is not compared by torch: the tensor would be read on into the next one."""
    rewrite(
        archive,
        lambda records: records | {part(records, key): records[part(records, key)].ljust(length)[:length]},
    )
    assert "damaged: " in refused(archive) or "cannot be read" in refused(archive)


def test_swapped_records(archive: Path) -> None:
    def swap(records: Records) -> Records:
        a, b = part(records, "data/0"), part(records, "data/2")
        return records | {a: records[b], b: records[a]}

    rewrite(archive, swap)
    refused(archive)


def test_a_record_that_is_missing(archive: Path) -> None:
    rewrite(
        archive, lambda records: {name: data for name, data in records.items() if not name.endswith("data/1")}
    )
    refused(archive)


def test_compressed_records(archive: Path) -> None:
    rewrite(archive, lambda records: records, zipfile.ZIP_DEFLATED)
    assert "is compressed or encrypted" in refused(archive)


def test_records_that_are_there_twice(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as more, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more.writestr(part({info.filename: b"" for info in more.infolist()}, "data/0"), bytes(64))
    assert "'data/0' is there twice" in refused(archive)


def test_a_torchscript_archive(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    assert "a TorchScript archive, which holds code; save its state_dict" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_cut_off_anywhere(zipped: bool, archive: Path) -> None:
    torch.save(STATE, archive, _use_new_zipfile_serialization=zipped)
    whole = archive.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        archive.write_bytes(whole[:length])
        refused(archive)


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_damaged_bytes_never_give_anything_but_a_line(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    torch.save(STATE, path)
    data, chance = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(count):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)
    try:
        found = read_all(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert sum(map(len, found.values())) <= len(data)


# --- tensors that are more, or less, than their bytes

TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "expanded": (
        lambda: torch.ones(1).expand(10**10),
        "10,000,000,000 elements, but the file does not hold so many",
    ),
    "expanded row": (lambda: torch.ones(1, 4).expand(10**9, 4), "but the file does not hold so many"),
    "meta": (lambda: torch.empty(3, device="meta"), "it has no data: it is on the device meta"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), ""),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse, nested and quantized tensors are not supported"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse, nested and quantized tensors are not supported"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "quantized tensors are not",
    ),
    "a number": (lambda: 3, "expected only tensors by name, found 'x' with a int"),
    "an array of objects": (lambda: [torch.ones(1)], "expected only tensors by name, found 'x' with a list"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_plain(case: str, zipped: bool, tmp_path: Path) -> None:
    make, reason = TENSORS[case]
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": make()}, path, _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < 10_000
    assert reason in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_views_are_read_as_what_they_show(zipped: bool, tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    state = {
        "turned": whole.T,
        "part": whole[1:3, 2:5],
        "repeated": whole[0].expand(3, 6),
        "negated": torch.complex(whole, whole).conj().imag,
        "same": whole,
    }
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert read_all(path) == {name: raw(tensor.resolve_neg()) for name, tensor in state.items()}


def test_many_turned_views_of_little(tmp_path: Path) -> None:
    whole = torch.ones(100, 100)
    torch.save({str(i): whole.T for i in range(1000)}, tmp_path / "pytorch_model.bin")
    assert "have more data than the file" in refused(tmp_path / "pytorch_model.bin")


def test_an_ordered_dictionary_with_metadata(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert isinstance(state, OrderedDict)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path).tensors) == {"weight", "bias"}


@pytest.mark.parametrize("zipped", [True, False])
def test_claims_of_more_data_than_there_is_take_no_memory(zipped: bool, tmp_path: Path) -> None:
    """The number of elements in the pickle is changed from 16 to 2^31 - 1: 8 GB."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(16, dtype=torch.float32)}, path, _use_new_zipfile_serialization=zipped)

    def enlarge(data: bytes) -> bytes:
        return data.replace(
            b"X\x03\x00\x00\x00cpuq\x04K\x10", b"X\x03\x00\x00\x00cpuq\x04J\xff\xff\xff\x7f"
        ).replace(b"K\x10\x85", b"J\xff\xff\xff\x7f\x85")

    if zipped:
        rewrite(path, lambda r: {n: enlarge(d) if n.endswith("data.pkl") else d for n, d in r.items()})
    else:
        path.write_bytes(enlarge(path.read_bytes()))
    code = (
        "import sys, pathlib\n"
        "from merge_engine.checkpoint import open_checkpoint\n"
        "from merge_engine.errors import CheckpointError\n"
        "try: open_checkpoint(pathlib.Path(sys.argv[1]))\n"
        "except CheckpointError as error: print(error)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    line, peak = done.stdout.splitlines()
    assert line.startswith(f"{path}: ") and done.stderr == ""
    assert int(peak) < 1_000_000  # KiB; torch alone takes 250 MB
