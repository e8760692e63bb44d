"""TIES written by hand in plain torch: one tensor after the other, streamed.

    python -m merge_engine.bench.torch_ties OUTPUT DENSITY WEIGHT BASE MODEL [MODEL ...]

Folders of safetensors in, one model.safetensors out. Every tensor is read, trimmed at its k-th largest
magnitude, elected, averaged and written before the next is touched, so that memory is bounded by the largest
tensor. Entries that equal the threshold are all kept, as in the TIES paper's code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from merge_engine.bench.tensor_memory import memory_of
from merge_engine.checkpoint.header import OutputTensor, encode_header
from merge_engine.dtypes import BF16


def ties(base: torch.Tensor, models: list[torch.Tensor], density: float, weight: float) -> torch.Tensor:
    """The merged tensor, in the base's dtype."""
    anchor = base.float()
    vectors = []
    for model in models:
        vector = model.float() - anchor
        magnitude = vector.abs()
        kept = max(int(density * vector.numel()), 1)
        threshold = magnitude.view(-1).kthvalue(vector.numel() - kept + 1).values
        vectors.append(torch.where(magnitude >= threshold, vector * weight, 0.0))
    total = sum(vectors[1:], vectors[0])
    elected = torch.where(total >= 0, 1.0, -1.0)
    mean, weights = torch.zeros_like(anchor), torch.zeros_like(anchor)
    for vector in vectors:
        agrees = vector * elected > 0
        mean += torch.where(agrees, vector, 0.0)
        weights += agrees * weight
    return (anchor + mean / torch.where(weights == 0, 1.0, weights)).to(base.dtype)


def merge(output: Path, density: float, weight: float, folders: list[Path]) -> None:
    """Merge checkpoints, the base first, into the folder ``output``."""
    checkpoints = [_open(folder) for folder in folders]
    tensors = [
        OutputTensor(name, BF16, tuple(file.get_slice(name).get_shape()))
        for name, file in checkpoints[0].items()
    ]
    output.mkdir(parents=True)
    with (output / "model.safetensors").open("wb", buffering=0) as stream:
        stream.write(encode_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            base, *models = (files[tensor.name].get_tensor(tensor.name) for files in checkpoints)
            merged = ties(base, models, density, weight)
            data = memory_of(merged)
            while data:
                data = data[stream.write(data) :]


def _open(folder: Path) -> dict[str, Any]:
    """The open file of every tensor."""
    files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


if __name__ == "__main__":
    merge(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
