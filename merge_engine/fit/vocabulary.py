"""The tokens of a model and their ids, and how those of two models differ, parsed no further than that needs.

A tokenizer.json takes up to 30 MB, and parsing it takes longer than planning a merge. In the layout that the tokenizers
library writes, its two large lists, of tokens and of merges, can be cut out and compared as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

_MODEL = b'\n  "model": {'
_CUTTING = ("normalizer", "pre_tokenizer")
"""What cuts a text into tokens besides the merges, in a tokenizer.json."""

_MEMBER_END = (b"\n    ]", b"\n    }")
"""The end of a list or an object that is a member of the model: all that is inside is indented further."""


@dataclass
class Vocabulary:
    """The tokens of a tokenizer. ``rest`` is its file without the tokens and merges of the model.

    ``added`` has the ids of added tokens. Tokens and merges are JSON (null without any), or ``raw_merges`` is the text
    of a merges.txt. Look-ups raise as ``json.loads`` and conversions do if they are malformed.
    """

    raw_ids: bytes = field(repr=False)
    raw_merges: bytes = field(repr=False)
    added: Mapping[str, int]
    rest: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token of the model."""
        given = json.loads(self.raw_ids)
        if isinstance(given, list):  # of a unigram model: pairs of token and score
            return {entry[0]: index for index, entry in enumerate(given)}
        return {} if given is None else dict(given)

    @cached_property
    def merges(self) -> Sequence[str]:
        """The merges in order, each as ``left right``."""
        if self.raw_merges.startswith((b"[", b"null")):
            given = json.loads(self.raw_merges) or []
            # Newer versions write pairs, older ones text.
            return given if not given or isinstance(given[0], str) else [f"{a} {b}" for a, b in given]
        lines = self.raw_merges.decode("utf-8").splitlines()
        return [line for line in lines if not line.startswith("#version")]

    def same_ids(self, other: Vocabulary) -> bool:
        """Whether the tokens of both models have the same ids."""
        return self.raw_ids == other.raw_ids or self.ids == other.ids

    def same_merges(self, other: Vocabulary) -> bool:
        """Whether both merge letters into tokens in the same order."""
        return self.raw_merges == other.raw_merges or self.merges == other.merges


def from_tokenizer_json(raw: bytes) -> Vocabulary:
    """The vocabulary in a tokenizer.json. Raises as ``json.loads`` and look-ups do if it is malformed."""
    document, ids, merges = _cut(raw) or _whole(raw)
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    return Vocabulary(ids, merges, added, document)


class Change(NamedTuple):
    """A token with its ids in two models, or an id with its tokens."""

    of: str | int
    one: str | int
    other: str | int


@dataclass(frozen=True)
class Difference:
    """How the vocabulary of one model differs from that of another.

    ``moved``: a token has another id, or an id is another token of the model itself. ``renamed``: an id is another
    added token, which may be one of those that were kept free for this. ``more``: the tokens that only the other has.
    ``splits``: the parts of the tokenizer that cut a text into tokens and differ.
    """

    moved: Sequence[Change]
    renamed: Sequence[Change]
    more: Sequence[str]
    splits: Sequence[str]


def difference(one: Vocabulary, other: Vocabulary) -> Difference:
    """How ``other`` differs from ``one``. Raises as their look-ups do."""
    ours, theirs = one.added, other.added
    if not one.same_ids(other):
        ours, theirs = {**one.ids, **ours}, {**other.ids, **theirs}
    moved = [Change(token, i, there) for token, i in ours.items() if (there := theirs.get(token, i)) != i]
    renamed, more = [], []
    lost = {i: token for token, i in ours.items() if token not in theirs}
    for token, i in theirs.items():
        if token in ours or one.ids.get(token) == i:  # a token of the model may be an added one as well
            continue
        if i not in lost:
            more.append(token)
        elif token in other.added and lost[i] in one.added:
            renamed.append(Change(i, lost[i], token))
        else:
            moved.append(Change(i, lost[i], token))
    splits = [] if moved or one.same_merges(other) else ["merges"]
    splits += [part for part in _CUTTING if not _alike(one.rest.get(part), other.rest.get(part))]
    return Difference(moved, renamed, more, splits)


def _alike(one: Any, other: Any) -> bool:
    """Whether two settings agree in all that both give: newer versions of the library write more keys."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_alike(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _cut(raw: bytes) -> tuple[Any, bytes, bytes] | None:
    """The document without the large lists, and these; None for another layout."""
    model = raw.find(_MODEL)
    if model < 0:
        return None
    cut = [b"null", b"null"]
    rest = []
    start = 0
    for i, key in enumerate((b'\n    "vocab": ', b'\n    "merges": ')):
        found = raw.find(key, max(model, start))
        if found < 0:
            continue
        begin = found + len(key)
        end = raw.find(_MEMBER_END[raw[begin : begin + 1] == b"{"], begin) + len(_MEMBER_END[0])
        if end < begin or raw[begin : begin + 1] not in (b"{", b"[") or raw[begin + 1 : begin + 2] != b"\n":
            return None
        cut[i] = raw[begin:end]
        rest += [raw[start:begin], b"null"]
        start = end
    try:
        return json.loads(b"".join((*rest, raw[start:]))), cut[0], cut[1]
    except ValueError:
        return None


def _whole(raw: bytes) -> tuple[Any, bytes, bytes]:
    document = json.loads(raw)
    model = document["model"]
    ids, merges = (json.dumps(model.pop(key, None)).encode() for key in ("vocab", "merges"))
    return document, ids, merges
