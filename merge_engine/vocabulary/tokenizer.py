"""The tokenizer of a model as data: its tokens, what cuts a text into them, and the files that hold it.

Files are parsed, with a limit to their size, and nothing in them is run. A malformed one is an error of one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import read_settings
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.bounded import MAX_CONFIG, MAX_TOKENIZER, read_bounded
from merge_engine.text import shown, some

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_ONLY_READ_ELSEWHERE = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.spm", "tekken.json"),
    *("*.tiktoken", "qwen.tiktoken", "vocab.bpe"),
)
_MOST_IDS = 1 << 24
_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer. ``kind`` is that of its model, ``BPE``, ``Unigram``, ``WordPiece`` or ``WordLevel``.

    ``pieces`` are the tokens of the model with their ids, in order of these; ``scores`` are those of a Unigram model's,
    and ``merges`` the pairs of a BPE model, first the one that is merged first. ``added`` are tokens that are found
    in a text before the model sees it, as a tokenizer.json describes them. ``rest`` is a tokenizer.json without all
    these. ``file`` is the first of its files.
    """

    file: Path
    kind: str
    pieces: Mapping[str, int]
    scores: Mapping[str, float] = field(default_factory=dict)
    merges: Sequence[tuple[str, str]] = ()
    added: Sequence[Mapping[str, Any]] = ()
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.file.parent

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token, in order of the ids."""
        ids = {**self.pieces, **{token["content"]: token["id"] for token in self.added}}
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """The token of each id."""
        return {i: token for token, i in self.ids.items()}

    @property
    def size(self) -> int:
        """The largest id, and one."""
        return max(self.tokens, default=-1) + 1

    def without(self, rows: int) -> Tokenizer:
        """The tokenizer with the tokens whose ids are below ``rows``."""
        if self.size <= rows:
            return self
        pieces = {token: i for token, i in self.pieces.items() if i < rows}
        gone = self.pieces.keys() - pieces.keys()
        return replace(
            self,
            pieces=pieces,
            scores={token: score for token, score in self.scores.items() if token in pieces},
            merges=[
                pair for pair in self.merges if not gone.intersection((*pair, merged(pair, self.prefix)))
            ],
            added=[token for token in self.added if token["id"] < rows],
        )

    @property
    def prefix(self) -> str:
        """What a piece that continues a word begins with, in some BPE models."""
        return str(self.rest.get("model", {}).get("continuing_subword_prefix") or "")


def merged(pair: tuple[str, str], prefix: str) -> str:
    """The piece that a merge makes."""
    return pair[0] + pair[1].removeprefix(prefix)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder.

    Raises ``CheckpointError`` if there is none, if it has a format that only other libraries read, or if it is
    malformed.
    """
    for names, parse in _FORMATS.items():
        file = folder / names[0]
        found = [_read(folder / name) for name in names]
        if found[0] is not None:
            with_added = _with_added(parse(file, *found), folder)
            _check(with_added)
            return with_added
    others = sorted(path.name for name in _ONLY_READ_ELSEWHERE for path in folder.glob(name))
    if others:
        raise CheckpointError(
            f"{folder}: its tokenizer ({others[0]}) has a format in which vocabularies cannot be aligned; load it with "
            "AutoTokenizer of transformers and save it with save_pretrained, which writes a tokenizer.json"
        )
    raise CheckpointError(
        f"{folder}: it has no tokenizer (tokenizer.json); copy the one that belongs to it there"
    )


def _read(path: Path) -> bytes | None:
    try:
        return read_bounded(path, MAX_TOKENIZER)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{way_out(error)}") from error


def malformed(path: Path, reason: str) -> CheckpointError:
    """The error for a tokenizer that nobody could use."""
    return CheckpointError(f"{path}: a malformed tokenizer: {reason}; download it again")


def _json(path: Path, raw: bytes, kind: type) -> Any:
    try:
        found = parse_json(raw)
    except ValueError as error:
        raise malformed(path, str(error)) from None
    if not isinstance(found, kind):
        raise malformed(path, f"it holds {shown(found)}")
    return found


def _of_tokenizer_json(file: Path, raw: bytes) -> Tokenizer:
    rest = _json(file, raw, dict)
    model = rest.get("model")
    if not isinstance(model, dict):
        raise malformed(file, "it has no model")
    kind = model.get("type") or _guessed(model)
    if kind not in KINDS:
        raise malformed(file, f"its model is of the type {shown(kind)}; known are {', '.join(KINDS)}")
    vocabulary, merges = model.pop("vocab", None), model.pop("merges", None) or []
    added = rest.pop("added_tokens", None) or []
    scores: dict[str, float] = {}
    if kind == "Unigram":
        scores = _scores(file, vocabulary)
        vocabulary = {token: i for i, token in enumerate(scores)}
    return Tokenizer(
        file, kind, _pieces(file, vocabulary), scores, _pairs(file, merges), _added(file, added), rest
    )


def _guessed(model: Mapping[str, Any]) -> str:
    """The type of a model that does not name it, as old files."""
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _of_separate_files(file: Path, ids: bytes, merges: bytes | None) -> Tokenizer:
    lines = (merges or b"").decode("utf-8", "replace").split("\n")
    texts = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    pieces = _pieces(file, _json(file, ids, dict))
    kind = "BPE" if merges is not None else "WordLevel"
    return Tokenizer(file, kind, pieces, merges=_pairs(file.with_name("merges.txt"), texts))


def _of_lines(file: Path, raw: bytes) -> Tokenizer:
    try:
        lines = raw.decode().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise malformed(file, f"byte {error.start} is not UTF-8 text") from None
    pieces = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    if len(pieces) < len(lines):
        raise malformed(file, f"{len(lines) - len(pieces)} tokens in it stand twice")
    return Tokenizer(file, "WordPiece", pieces)


_FORMATS: Mapping[tuple[str, ...], Callable[..., Tokenizer]] = {
    (TOKENIZER_JSON,): _of_tokenizer_json,
    ("vocab.json", "merges.txt"): _of_separate_files,
    ("vocab.txt",): _of_lines,
}
"""The files of each format, which is known by the first, and what parses them."""


def _pieces(file: Path, vocabulary: object) -> Mapping[str, int]:
    if not isinstance(vocabulary, dict):
        raise malformed(file, f"its vocabulary is {shown(vocabulary)}")
    if wrong := [token for token, i in vocabulary.items() if type(i) is not int or not 0 <= i < _MOST_IDS]:
        raise malformed(file, f"the id of {shown(wrong[0])} is {shown(vocabulary[wrong[0]])}")
    return dict(sorted(vocabulary.items(), key=lambda item: item[1]))


def _scores(file: Path, vocabulary: object) -> dict[str, float]:
    entries = vocabulary if isinstance(vocabulary, list) else None
    if entries is None or not all(
        isinstance(each, list)
        and len(each) == 2
        and isinstance(each[0], str)
        and type(each[1]) in (int, float)
        for each in entries
    ):
        raise malformed(file, "the vocabulary of its Unigram model has no pairs of a token and a score")
    scores = {token: float(score) for token, score in entries}
    if len(scores) < len(entries):
        raise malformed(file, f"{len(entries) - len(scores)} tokens in it stand twice")
    return scores


def _pairs(file: Path, merges: object) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise malformed(file, f"its merges are {shown(merges)}")
    pairs = [tuple(each.split(" ")) if isinstance(each, str) else each for each in merges]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise malformed(file, f"{shown(pair)} is no merge of two tokens")
    return [(left, right) for left, right in pairs]


def _added(file: Path, added: object) -> list[Mapping[str, Any]]:
    if not isinstance(added, list):
        raise malformed(file, f"its added tokens are {shown(added)}")
    for token in added:
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
            or type(token.get("id")) is not int
            or not 0 <= token["id"] < _MOST_IDS
        ):
            raise malformed(file, f"{shown(token)} is no added token")
    return sorted(added, key=lambda token: int(token["id"]))


def _with_added(found: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer with the tokens that transformers adds to it from other files."""
    is_whole = found.file.name == TOKENIZER_JSON
    added, known, taken = list(found.added), {t["content"] for t in found.added}, set(found.tokens)
    for token in _more_added(folder, is_whole):
        content, number = str(token.get("content")), token["id"]
        renamed = found.pieces.get(content, number) != number or (
            content not in found.pieces and number in taken
        )
        if content not in known and not (is_whole and renamed):  # a tokenizer.json has the last word
            added.append(token)
            known.add(content)
    return replace(found, added=_added(folder / TOKENIZER_CONFIG, added))


def _more_added(folder: Path, is_whole: bool) -> Iterator[Mapping[str, Any]]:
    described = (read_settings(folder / TOKENIZER_CONFIG, MAX_CONFIG) or {}).get("added_tokens_decoder")
    for number, token in described.items() if isinstance(described, dict) else ():
        if not isinstance(token, dict) or not str(number).isdecimal() or len(number) > 9:
            raise malformed(folder / TOKENIZER_CONFIG, f"{shown(token)} is no added token")
        yield {"id": int(number), **token}
    raw = None if is_whole else _read(folder / "added_tokens.json")
    if raw is not None:
        for content, number in _json(folder / "added_tokens.json", raw, dict).items():
            yield added_token(content, number)


def some_tokens(tokens: Sequence[str]) -> str:
    """The first three tokens for a message, and the number of the others."""
    rest = len(tokens) - _SHOWN
    return ", ".join(map(shown, tokens[:_SHOWN])) + (f" and {rest:,} more" if rest > 0 else "")


def added_token(content: str, number: int) -> dict[str, Any]:
    """An ordinary added token, with the properties that the tokenizers library gives it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": number, "content": content, **flags, "normalized": True, "special": False}


def _check(tokenizer: Tokenizer) -> None:
    """Raise ``CheckpointError`` for a tokenizer in which one id is two tokens, or one token has two ids."""
    if not tokenizer.ids:
        raise malformed(tokenizer.file, "it has no tokens")
    if tokenizer.size > 4 * len(tokenizer.ids) + 1024:
        raise malformed(
            tokenizer.file, f"{len(tokenizer.ids):,} tokens have ids up to {tokenizer.size - 1:,}"
        )
    added: dict[str, int] = {}
    for token in tokenizer.added:
        content, number = token["content"], token["id"]
        if tokenizer.pieces.get(content, number) != number or added.setdefault(content, number) != number:
            raise malformed(tokenizer.file, f"the token {shown(content)} has two ids")
    if len(tokenizer.tokens) < len(tokenizer.ids):
        twice = [token for token, i in tokenizer.ids.items() if tokenizer.tokens[i] != token]
        same = [f"{shown(one)} and {shown(tokenizer.tokens[tokenizer.ids[one]])}" for one in twice]
        raise malformed(tokenizer.file, f"tokens with the same id: {some(same, 3)}")


def as_json(tokenizer: Tokenizer) -> str:
    """The tokenizer as the text of a tokenizer.json."""
    model: dict[str, Any] = {"type": tokenizer.kind, **tokenizer.rest.get("model", {})}
    if tokenizer.kind == "Unigram":
        model["vocab"] = [[token, tokenizer.scores[token]] for token in tokenizer.pieces]
    else:
        model["vocab"] = dict(tokenizer.pieces)
    if tokenizer.kind == "BPE":
        # Versions of the library before 0.20 read texts alone, and only lists can hold pieces with a space in them.
        spaced = any(" " in left or " " in right for left, right in tokenizer.merges)
        model["merges"] = [list(pair) if spaced else " ".join(pair) for pair in tokenizer.merges]
    document = {"version": "1.0", **tokenizer.rest, "added_tokens": list(tokenizer.added), "model": model}
    return json.dumps(document, ensure_ascii=False)
