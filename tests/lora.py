"""LoRA adapters for tests, in PEFT's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.mlp.up_proj": (32, 16)}
"""Modules of the tiny Llama (see families), with the shapes of their weights."""


def factors(
    modules: Mapping[str, tuple[int, int]] = MODULES,
    *,
    rank: int = 4,
    seed: int = 0,
    name: str = "{module}.lora_{side}.weight",
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Both factors of each module, by PEFT's names or others."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for module, (out, into) in modules.items():
        for side, shape in (("A", (rank, into)), ("B", (out, rank))):
            values = torch.randn(shape, generator=random) / 4
            made[PREFIX + name.format(module=module, side=side)] = values.to(dtype)
    return made


def save_adapter(
    folder: str | Path, tensors: Mapping[str, torch.Tensor] | None = None, **settings: Any
) -> Path:
    """A folder as PEFT writes it. A setting that is None is left out."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None} | settings
    (folder / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in given.items() if value is not None})
    )
    held = factors() if tensors is None else tensors
    save_file(
        {name: tensor.contiguous() for name, tensor in held.items()}, folder / "adapter_model.safetensors"
    )
    return folder
