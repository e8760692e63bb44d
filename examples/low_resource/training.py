"""The common parts of the training stages: the model, the streams of text, the loop, and finished stages on disk."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from examples.low_resource.errors import ExampleError
from examples.low_resource.settings import BATCH, MODEL, SEQUENCE, VOCABULARY, Training
from examples.low_resource.text import documents, load_text
from examples.low_resource.tokenizer import FOLDER, encode, load_tokenizer

logging.disable_progress_bar()
# Steps are so small that a second thread gains little, and on a busy machine it loses much: seeds run side by side.
torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
END_ID = 0
MARKER = "stage.json"
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Token ids and targets, both [sequences, tokens]; a target of -100 counts for nothing."""


def new_model(seed: int) -> LlamaForCausalLM:
    """A model with initial weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=END_ID, **MODEL
        )
    ).to(DEVICE)


def load_model(folder: Path) -> LlamaForCausalLM:
    """A checkpoint in float32, whatever it is stored in."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


def packed(kind: str, rng: random.Random) -> Iterator[list[int]]:
    """Endless sequences of SEQUENCE + 1 tokens: texts of one kind, shuffled, one after the other."""
    texts = encode(documents(kind))
    buffer = [END_ID]
    while True:
        rng.shuffle(texts)
        for ids in texts:
            buffer += [*ids, END_ID]
            while len(buffer) > SEQUENCE:
                yield buffer[: SEQUENCE + 1]
                buffer = buffer[SEQUENCE:]


def language_batches(shares: Mapping[str, float], seed: int) -> Batches:
    """Batches of text, each sequence of a kind drawn by its share."""
    rng = random.Random(seed)
    streams = {kind: packed(kind, random.Random(f"{seed} {kind}")) for kind in shares}
    while True:
        kinds = rng.choices(list(shares), list(shares.values()), k=BATCH)
        block = torch.tensor([next(streams[kind]) for kind in kinds])
        yield block[:, :-1], block[:, 1:]


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    plan: Training,
    label: str,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with a short warm-up. ``after`` is called with the number of steps done."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    model.train()
    start = time.perf_counter()
    for step in range(plan.steps):
        share = min(1.0, (step + 1) / 30) * (1 - 0.9 * step / plan.steps if plan.decays else 1.0)
        optimizer.param_groups[0]["lr"] = plan.learning_rate * share
        ids, targets = (tensor.to(DEVICE) for tensor in next(batches))
        hidden = model.model(ids).last_hidden_state
        counted = targets != -100  # the head is most of the work: only where there is a target
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), targets[counted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        after(step + 1)
        if (step + 1) % 100 == 0:
            rate = (step + 1) / (time.perf_counter() - start)
            print(f"{label}: {step + 1} of {plan.steps} steps, {rate:.1f} a second", flush=True)


def identity(stage: str, seed: int, *settings: object) -> str:
    """A digest of what a stage's result follows from: training text, tokenizer, model, its settings and its seed."""
    digest = hashlib.sha256(repr((stage, seed, MODEL, VOCABULARY, SEQUENCE, BATCH, settings)).encode())
    digest.update(repr(load_text("train")).encode())
    digest.update((FOLDER / "tokenizer.json").read_bytes())
    return digest.hexdigest()


def finished(folder: Path, expected: str) -> bool:
    """Whether a stage is done. What an interrupted one left is removed.

    Raises ``ExampleError`` when the folder is of other text or settings, or is none of ours.
    """
    if not folder.exists():
        return False
    if not (folder / MARKER).is_file():
        if any(path.suffix not in (".safetensors", ".json", ".jinja") for path in folder.iterdir()):
            raise ExampleError(f"{folder}: holds files that no stage wrote; move them away")
        shutil.rmtree(folder)
        return False
    if json.loads((folder / MARKER).read_text()).get("identity") != expected:
        raise ExampleError(
            f"{folder}: of another run, with other text or settings; remove it to train anew, or go back to "
            "the settings.py that made it"
        )
    return True


def save(model: LlamaForCausalLM, folder: Path, made_of: str) -> None:
    """Write a checkpoint; its mark comes last."""
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    (folder / MARKER).write_text(json.dumps({"identity": made_of}) + "\n")
