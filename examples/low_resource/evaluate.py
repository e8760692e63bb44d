"""The evaluation of a model: task accuracy in both languages, and bits per byte of Tamil.

python -m examples.low_resource.evaluate examples/low_resource/models/sft
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from examples.low_resource.errors import ExampleError, told
from examples.low_resource.settings import BPB_TEXTS
from examples.low_resource.tasks import CHOICES, Item, held_out_items
from examples.low_resource.text import load_text
from examples.low_resource.tokenizer import encode
from examples.low_resource.training import DEVICE, END_ID, load_model

_BATCH = 64
BPB = "tamil bits per byte"


def scores(model: LlamaForCausalLM) -> dict[str, float]:
    """Accuracy by language and task, from 0 to 1 (chance is 0.25), and bits per byte of held-out Tamil."""
    model.eval()
    with torch.inference_mode():
        found = {
            f"{language} {task}": accuracy(model, batches) for (language, task), batches in _batches().items()
        }
        texts = [tamil for _, tamil in load_text("held_out").pairs[-BPB_TEXTS:]]
        found[BPB] = float(bits(model, texts).sum()) / sum(len(text.encode()) for text in texts)
    return found


def accuracy(model: LlamaForCausalLM, batches: Sequence[Packed]) -> float:
    """Share of items whose right choice is the likeliest."""
    return float(answered(model, batches).float().mean())


def answered(model: LlamaForCausalLM, batches: Sequence[Packed]) -> torch.Tensor:
    """Whether the right choice of each item is the likeliest: bool [items]."""
    return torch.cat([likelihoods(model, batch).argmax(1) == 0 for batch in batches])


def likelihoods(model: LlamaForCausalLM, batch: Packed) -> torch.Tensor:
    """Log-likelihood of each choice and the end after it, given the prompt: [items, CHOICES]."""
    ids, positions, mask, places, targets, owners = (tensor.to(DEVICE) for tensor in batch)
    hidden = model.model(ids, position_ids=positions, attention_mask=mask).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[places])
    each = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    total = torch.zeros(len(ids) * CHOICES, device=each.device).index_add_(0, owners, each)
    return total.view(-1, CHOICES)


Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Ids and positions [items, tokens], an additive mask [items, 1, tokens, tokens], and for every scored token:
the flat place that predicts it, the token, and which choice of which item it belongs to."""


def pack(items: Sequence[Item]) -> Packed:
    """Items as sequences in which the choices follow the prompt side by side, each blind to the others."""
    prompts = encode([item.prompt for item in items])
    choices = encode([choice for item in items for choice in item.choices])
    rows = []
    for row, prompt in enumerate(prompts):
        own = choices[row * CHOICES : (row + 1) * CHOICES]
        rows.append(([END_ID, *prompt], own))
    length = max(len(prompt) + sum(map(len, own)) for prompt, own in rows)
    ids = torch.full((len(rows), length), END_ID)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no row is empty
    places, targets, owners = [], [], []
    for row, (prompt, own) in enumerate(rows):
        end = len(prompt)
        ids[row, :end], positions[row, :end] = torch.tensor(prompt), torch.arange(end)
        mask[row, :end, :end] = torch.ones(end, end).tril().bool()
        start = end
        for number, choice in enumerate(own):
            stop = start + len(choice)
            ids[row, start:stop] = torch.tensor(choice)
            positions[row, start:stop] = torch.arange(end, end + len(choice))
            mask[row, start:stop, :end] = True
            mask[row, start:stop, start:stop] = torch.ones(len(choice), len(choice)).tril().bool()
            places += [row * length + at for at in (end - 1, *range(start, stop))]
            targets += [*choice, END_ID]
            owners += [row * CHOICES + number] * (len(choice) + 1)
            start = stop
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)
    return ids, positions, additive, torch.tensor(places), torch.tensor(targets), torch.tensor(owners)


@cache
def _batches() -> Mapping[tuple[str, str], list[Packed]]:
    """The test items of the study."""
    return {key: in_batches(by_length(items)) for key, items in held_out_items().items()}


def by_length(items: Sequence[Item]) -> list[Item]:
    """The items in order of their tokens, so that little is padded in a batch."""
    return sorted(items, key=lambda item: len(encode([item.prompt])[0]))


def in_batches(items: Sequence[Item]) -> list[Packed]:
    """The items in their order, packed."""
    return [pack(items[i : i + _BATCH]) for i in range(0, len(items), _BATCH)]


def bits(model: LlamaForCausalLM, texts: Sequence[str]) -> torch.Tensor:
    """The bits that a model takes for each text, its end included; lower is better: float64 [texts]."""
    found = torch.zeros(len(texts), dtype=torch.float64)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for start in range(0, len(order), _BATCH):
        own = order[start : start + _BATCH]
        rows = [torch.tensor([END_ID, *ids, END_ID]) for ids in encode([texts[number] for number in own])]
        block = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(DEVICE)
        targets = block[:, 1:]
        hidden = model.model(block[:, :-1].clamp(min=0)).last_hidden_state
        counted = targets != -100
        each = torch.nn.functional.cross_entropy(
            model.lm_head(hidden[counted]), targets[counted], reduction="none"
        )
        loss = torch.zeros(targets.shape, device=each.device).masked_scatter(counted, each)
        found[torch.tensor(own)] = loss.double().sum(1).cpu() / math.log(2)
    return found


def main() -> None:
    """Print the scores of the checkpoints that are named."""
    if len(sys.argv) < 2:
        raise ExampleError("name checkpoint folders, such as examples/low_resource/models/sft")
    for folder in map(Path, sys.argv[1:]):
        if not (folder / "model.safetensors").is_file():
            raise ExampleError(f"{folder}: no checkpoint there; train it, or name another")
        print(
            folder, *(f"{name} {value:.3f}" for name, value in scores(load_model(folder)).items()), sep="  "
        )


if __name__ == "__main__":
    told(main)
