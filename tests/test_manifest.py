"""The digests of a manifest are those of the files."""

from __future__ import annotations

import json

import torch
from conftest import SaveCheckpoint
from safetensors.torch import load_file
from xxhash import xxh3_128

import merge_engine as me

SHAPES = {"embed.weight": (900, 70), "layers.0.weight": (70, 300), "norm.weight": (300,), "scale": ()}


def test_digests_are_those_of_the_tensors_written(save_checkpoint: SaveCheckpoint) -> None:
    folders = [
        save_checkpoint(
            name, {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()}
        )
        for name in ("base", "a", "b")
    ]
    options = {"weight": 0.5, "density": 0.3}
    recipe = {
        "merge_method": "ties",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder), "parameters": options} for folder in folders[1:]],
    }
    models = []
    for number, memory in enumerate(("400MB", "1MB")):  # the second cuts the large tensor
        out = folders[0].parent / str(number)
        me.run(recipe, out, memory=memory)
        manifest = json.loads((out / "merge_manifest.json").read_text())
        written = load_file(out / "model.safetensors")
        lines = []
        for name in sorted(SHAPES):
            data = bytes(written[name].flatten().view(torch.uint8).tolist())
            assert manifest["tensors"][name]["xxh3_128"] == xxh3_128(data).hexdigest()
            lines.append(f"{xxh3_128(data).hexdigest()}  {name}\n")
        assert manifest["digest"] == xxh3_128("".join(lines).encode()).hexdigest()
        models.append(manifest["digest"])
    assert models[0] == models[1]
