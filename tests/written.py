"""Writing states as checkpoint folders, and reading what was written with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from merge_engine.checkpoint import CheckpointWriter, OutputTensor, ShardLayout, plan_shards
from merge_engine.dtypes import BY_NAME
from merge_engine.storage import PAGE

State = dict[str, torch.Tensor]
# Big enough for early write-back, for whole pages and for two shards.
STATE: State = {
    "big": torch.arange(1_200_000, dtype=torch.float32),
    "page": torch.arange(PAGE, dtype=torch.int64),
    "odd": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(0.5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
}
LIMIT = 4_000_000
OLD: State = {name: torch.full((300,), float(i)) for i, name in enumerate(("a", "b", "c"))}
NEW: State = {name: tensor + 10 for name, tensor in OLD.items()}
ONE_FILE, THREE_SHARDS, TWO_SHARDS = 10**9, 1200, 2400


def plan(state: State, limit: int = LIMIT) -> list[ShardLayout]:
    described = [
        OutputTensor(name, BY_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in state.items()
    ]
    return plan_shards(described, limit)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write_all(writer: CheckpointWriter, state: State) -> None:
    for name, tensor in state.items():
        writer.write(name, 0, memoryview(raw(tensor)))


def write_checkpoint(folder: Path, state: State, limit: int = LIMIT) -> None:
    with CheckpointWriter(folder, plan(state, limit), overwrite=True) as writer:
        write_all(writer, state)
        writer.finish()


def load_folder(folder: Path) -> State:
    """Load as the hub's clients do: by the index, with the safetensors library."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state: State = {}
    for name, file_name in index["weight_map"].items():
        with safe_open(folder / file_name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            state[name] = file.get_tensor(name)
    assert index["metadata"] == {"total_size": sum(len(raw(tensor)) for tensor in state.values())}
    return state


def assert_same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert raw(found[name]) == raw(tensor)


def names_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))
