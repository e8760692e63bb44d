"""Stages 3 to 6 for one seed: base, CT, SFT, and CT-then-SFT. Finished ones are left as they are.

python -m examples.low_resource.train 0
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

from examples.low_resource.errors import ExampleError, told
from examples.low_resource.settings import (
    BASE,
    BASE_TEXT,
    CT,
    CT_SNAPSHOTS,
    CT_TEXT,
    RUNS,
    SFT,
    SFT_BATCH,
    WORDS,
)
from examples.low_resource.tasks import training_items
from examples.low_resource.tokenizer import encode
from examples.low_resource.training import (
    END_ID,
    Batches,
    finished,
    identity,
    language_batches,
    load_model,
    new_model,
    save,
    train,
)


def seed_folder(seed: int) -> Path:
    """Where the checkpoints of a seed are."""
    return RUNS / f"seed-{seed}"


def train_base(seed: int) -> str:
    """English, and a little Tamil, from nothing. Returns what identifies the stage."""
    folder, made_of = seed_folder(seed) / "base", identity("base", seed, BASE, BASE_TEXT)
    if not finished(folder, made_of):
        model = new_model(seed)
        train(model, language_batches(BASE_TEXT, seed), BASE, f"seed {seed}: base")
        save(model, folder, made_of)
    return made_of


def train_ct(seed: int, base: str) -> str:
    """Continual pre-training on Tamil, with a snapshot at each budget."""
    folders = {steps: seed_folder(seed) / f"ct-{steps}" for steps in CT_SNAPSHOTS}
    made_of = identity("ct", seed, base, CT, CT_TEXT)
    done = [finished(folder, made_of) for folder in folders.values()]
    if not all(done):
        model = load_model(seed_folder(seed) / "base")

        def snapshot(step: int) -> None:
            if step in folders:
                save(model, folders[step], made_of)

        train(model, language_batches(CT_TEXT, 1000 + seed), CT, f"seed {seed}: CT", snapshot)
    return made_of


def train_sft(seed: int, start: str, made_of_start: str, name: str) -> None:
    """Both tasks, in English, from a checkpoint of this seed."""
    folder = seed_folder(seed) / name
    made_of = identity("sft", seed, start, made_of_start, SFT, SFT_BATCH, WORDS)
    if not finished(folder, made_of):
        model = load_model(seed_folder(seed) / start)
        model.model.embed_tokens.requires_grad_(False)
        train(model, task_batches(2000 + seed), SFT, f"seed {seed}: {name}")
        save(model, folder, made_of)


def task_batches(seed: int) -> Batches:
    """Items as sequences, of which the right answer and the end are the targets."""
    items = training_items(random.Random(seed))
    while True:
        batch = [next(items) for _ in range(SFT_BATCH)]
        prompts, answers = (
            encode([item.prompt for item in batch]),
            encode([item.choices[0] for item in batch]),
        )
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + 1
        ids = torch.full((SFT_BATCH, length), END_ID)
        targets = torch.full((SFT_BATCH, length), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            sequence = [END_ID, *prompt, *answer, END_ID]
            ids[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
            targets[row, len(prompt) : len(sequence) - 1] = torch.tensor(sequence[len(prompt) + 1 :])
        yield ids, targets


def train_seed(seed: int) -> None:
    """Everything that is trained for a seed."""
    base = train_base(seed)
    ct = train_ct(seed, base)
    train_sft(seed, "base", base, "sft")
    train_sft(seed, f"ct-{CT_SNAPSHOTS[-1]}", ct, "ct-then-sft")


def main() -> None:
    """Train the seeds that are named."""
    if len(sys.argv) < 2 or not all(argument.isdecimal() for argument in sys.argv[1:]):
        raise ExampleError("name the seeds to train, such as `python -m examples.low_resource.train 0 1`")
    for seed in map(int, sys.argv[1:]):
        train_seed(seed)


if __name__ == "__main__":
    told(main)
