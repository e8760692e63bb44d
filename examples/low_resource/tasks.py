"""The two tasks: choose one of four words that answers a question about a sentence.

- ``edge``: the sentence, then "? first :" or "? last :". The answer is that word of it; the other choices are
  other words of it.
- ``cloze``: the sentence with "_" for one of its words, then "? gap :". The answer is the word; the other
  choices are words of as many tokens from other sentences.

The questions are asked in English in both languages. A model is trained on English items and tested in both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from examples.low_resource.settings import ITEMS, WORDS
from examples.low_resource.text import load_text
from examples.low_resource.tokenizer import encode

CHOICES = 4
_PROSE = re.compile(r"[A-Za-z ,.;:()'’?!-]+")  # and no formulas or code


class Item(NamedTuple):
    """One question. The first choice is the right one: models see each choice alone, never their order."""

    prompt: str
    choices: list[str]
    sentence: str


def edge(sentence: str, rng: random.Random) -> Item | None:
    """The first or the last word; None when the sentence has too few different words."""
    words = sentence.split()
    place, answer = rng.choice([("first", words[0]), ("last", words[-1])])
    others = sorted(set(words) - {answer})
    if len(others) < CHOICES - 1:
        return None
    choices = [f" {word}" for word in (answer, *rng.sample(others, CHOICES - 1))]
    return Item(f"{sentence} ? {place} :", choices, sentence)


def cloze(sentence: str, rng: random.Random, words_by_length: dict[int, list[str]]) -> Item | None:
    """A word of the sentence; None when too few others have as many tokens."""
    words = sentence.split()
    place = rng.randrange(len(words))
    answer = words[place]
    alike = words_by_length.get(len(_tokens(answer)), [])
    others = rng.sample(alike, min(2 * CHOICES, len(alike)))
    others = [word for word in others if word not in words][: CHOICES - 1]
    if len(others) < CHOICES - 1:
        return None
    gapped = " ".join([*words[:place], "_", *words[place + 1 :]])
    return Item(f"{gapped} ? gap :", [f" {word}" for word in (answer, *others)], sentence)


def sentences(part: str, language: str) -> list[str]:
    """Texts of a part that are long enough for a task, and short enough."""
    text = load_text(part)
    if language == "tamil":
        found = [tamil for _, tamil in text.pairs]
    else:
        found = [t for t in text.english + [english for english, _ in text.pairs] if _PROSE.fullmatch(t)]
    return [sentence for sentence in found if WORDS[0] <= len(sentence.split()) <= WORDS[1]]


@cache
def every_held_out_item() -> dict[tuple[str, str], list[Item]]:
    """An item of each task for each held-out sentence that can have one, by language and task; always the same."""
    items = {}
    for language, task in ITEMS:
        rng = random.Random(f"{language} {task}")
        pool = sentences("held_out", language)
        rng.shuffle(pool)
        items[language, task] = list(_items(task, pool, rng))
    return items


def held_out_items() -> dict[tuple[str, str], list[Item]]:
    """The test items of the study by language and task."""
    return {key: every_held_out_item()[key][:limit] for key, limit in ITEMS.items()}


def training_items(rng: random.Random) -> Iterator[Item]:
    """Endless English training items, both tasks in turn."""
    pool = sentences("train", "english")
    while True:
        rng.shuffle(pool)
        half = len(pool) // 2
        yield from (
            item
            for pair in zip(_items("edge", pool[:half], rng), _items("cloze", pool[half:], rng), strict=False)
            for item in pair
        )


def _items(task: str, pool: Sequence[str], rng: random.Random) -> Iterator[Item]:
    words_by_length = _by_length(tuple(sorted(pool))) if task == "cloze" else {}
    for sentence in pool:
        item = edge(sentence, rng) if task == "edge" else cloze(sentence, rng, words_by_length)
        if item is not None:
            yield item


def _by_length(pool: Sequence[str]) -> dict[int, list[str]]:
    words = sorted({word for sentence in pool for word in sentence.split()})
    lengths: dict[int, list[str]] = {}
    for word, ids in zip(words, encode([f" {word}" for word in words]), strict=True):
        lengths.setdefault(len(ids), []).append(word)
    return lengths


@cache
def _tokens(word: str) -> tuple[int, ...]:
    return tuple(encode([f" {word}"])[0])
