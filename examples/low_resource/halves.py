"""Two halves of the held-out text: one chooses recipes, the other judges those that were chosen.

A sentence is in one half with the items of both tasks, and so are two texts that differ in case, spaces, digits or
punctuation alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from transformers import LlamaForCausalLM

from examples.low_resource.evaluate import Packed, answered, bits, by_length, in_batches
from examples.low_resource.fronts import Measured
from examples.low_resource.split import drawn, same
from examples.low_resource.tasks import Item, every_held_out_item
from examples.low_resource.text import load_text

BITS, ENGLISH, TAMIL = "Tamil bits per byte", "English accuracy", "Tamil accuracy"
Name = Literal["choosing", "judging"]


@dataclass(frozen=True)
class Half:
    """``texts`` in Tamil, and the ``items`` of both tasks by what their accuracy is called."""

    texts: Sequence[str]
    items: Mapping[str, Sequence[Item]]

    def measured(self, model: LlamaForCausalLM, leave_out: Collection[str] = ()) -> dict[str, Measured]:
        """Tamil bits per byte, and each accuracy over the items of both tasks together, but for some."""
        model.eval()
        with torch.inference_mode():
            sizes = np.array([len(text.encode()) for text in self.texts], float)
            found = {BITS: Measured(bits(model, self.texts).numpy(), sizes)}
            for name in self.items.keys() - set(leave_out):
                questions = self._questions[name]
                right = answered(model, questions.batches).cpu().numpy()
                found[name] = Measured(np.bincount(questions.sentence, right), questions.asked)
        return found

    @property
    def identity(self) -> str:
        """A digest of the texts and the items."""
        return hashlib.sha256(repr((self.texts, self.items)).encode()).hexdigest()

    @cached_property
    def _questions(self) -> dict[str, _Questions]:
        return {name: _Questions.of(items) for name, items in self.items.items()}


@dataclass(frozen=True)
class _Questions:
    """Packed items, the number of each item's sentence [items], and how many items each sentence has [sentences]."""

    batches: Sequence[Packed]
    sentence: np.ndarray
    asked: np.ndarray

    @classmethod
    def of(cls, items: Sequence[Item]) -> _Questions:
        ordered = by_length(items)
        _, sentence = np.unique([item.sentence for item in ordered], return_inverse=True)
        return cls(in_batches(ordered), sentence, np.bincount(sentence).astype(float))


def half_of(text: str) -> Name:
    """The half that a text belongs to, whatever other texts there are."""
    return "choosing" if drawn(f"half {same(text)}", 0.5) else "judging"


def choosing(sentences: int, texts: int) -> Half:
    """So many English sentences and Tamil texts of the half that chooses. It has no Tamil items."""
    english = _items("choosing", "english")
    taken = set(sorted({item.sentence for item in english}, key=_order)[:sentences])
    return Half(_texts("choosing", texts), {ENGLISH: [item for item in english if item.sentence in taken]})


def judging(texts: int) -> Half:
    """So many Tamil texts of the half that judges, and all its items."""
    return Half(
        _texts("judging", texts), {ENGLISH: _items("judging", "english"), TAMIL: _items("judging", "tamil")}
    )


def _items(name: Name, language: str) -> list[Item]:
    every = [items for key, items in every_held_out_item().items() if key[0] == language]
    return [item for items in every for item in items if half_of(item.sentence) == name]


def _texts(name: Name, texts: int) -> list[str]:
    every = (tamil for _, tamil in load_text("held_out").pairs)
    return sorted((text for text in every if half_of(text) == name), key=_order)[:texts]


def _order(text: str) -> str:
    """Sorts texts as if they were drawn at random, always in the same way."""
    return hashlib.sha256(text.encode()).hexdigest()
