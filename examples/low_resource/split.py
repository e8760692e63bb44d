"""Training and held-out text without leaks: texts that are equal in either language stay on one side."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A text in both languages. ``page`` is the page it stands on, empty if it stands alone."""

    english: str
    tamil: str
    page: str = ""

    @property
    def texts(self) -> tuple[str, str]:
        """English, Tamil."""
        return self.english, self.tamil


def same(text: str) -> str:
    """What two texts share when they differ in case, spaces, digits or punctuation alone."""
    # Vowel signs are marks, not letters, to \w: only what is plainly punctuation may go.
    return re.sub(r"[\s\d!-/:-@\[-`{-~\u2010-\u2027\u2030-\u205e]+", "", text.casefold()) or text


def drawn(text: str, share: float) -> bool:
    """Whether a text belongs to the share that is held out: by its digest, so whatever else there is."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < share * 2**32


def split_pairs(sources: Mapping[str, Sequence[Pair]], share: float) -> dict[str, dict[str, list[Pair]]]:
    """Pairs by source and part ("train", "held_out"), without those seen before in either language.

    Pairs that share a text in one language, or a page, are linked, and everything that is linked goes to the
    same part. One English and one Tamil text then occurs once in all.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def keys(pair: Pair) -> list[str]:
        return [
            f"en {same(pair.english)}",
            f"ta {same(pair.tamil)}",
            *([f"page {pair.page}"] if pair.page else []),
        ]

    for pairs in sources.values():
        for pair in pairs:
            first, *others = keys(pair)
            for other in others:
                parent[root(other)] = root(first)
    groups: dict[str, list[str]] = {}
    for key in parent:
        groups.setdefault(root(key), []).append(key)
    held_out = {name for name, members in groups.items() if drawn(min(members), share)}
    seen: set[str] = set()
    parts: dict[str, dict[str, list[Pair]]] = {}
    for source, pairs in sources.items():
        parts[source] = {"train": [], "held_out": []}
        for pair in pairs:
            english, tamil, *_ = keys(pair)
            if not {english, tamil} & seen:
                parts[source]["held_out" if root(english) in held_out else "train"].append(pair)
            seen |= {english, tamil}
    return parts


def split_paragraphs(
    sources: Mapping[str, Sequence[str]], share: float, pairs: Mapping[str, set[str]]
) -> dict[str, dict[str, list[str]]]:
    """Paragraphs by source and part, each text once; none that is in a pair of the other part.

    ``pairs`` are the texts of the pairs by part.
    """
    elsewhere = {"train": pairs["held_out"], "held_out": pairs["train"]}
    taken = {part: {same(text) for text in texts} for part, texts in elsewhere.items()}
    seen: set[str] = set()
    parts: dict[str, dict[str, list[str]]] = {}
    for source, paragraphs in sources.items():
        parts[source] = {"train": [], "held_out": []}
        for text in paragraphs:
            key = same(text)
            part = "held_out" if drawn(key, share) else "train"
            if key not in seen and key not in taken[part]:
                parts[source][part].append(text)
            seen.add(key)
    return parts
