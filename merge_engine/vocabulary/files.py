"""The files of the output's tokenizer, and what its other settings say of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import read_settings, tokenizer_files
from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.bounded import MAX_CONFIG, MAX_TOKENIZER, read_bounded
from merge_engine.text import some
from merge_engine.vocabulary.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, Tokenizer, as_json

_OTHER_FORMATS = ("*.model", "*.model.*", "*.spm", "*.tiktoken", "tekken.json", "vocab.bpe", "*.vocab")
"""Files of tokenizers that are not written anew: with another vocabulary they would be wrong."""


def tokenizer_edits(
    source: Path, made: Tokenizer, is_changed: bool, of_donor: Path, warnings: list[str]
) -> tuple[dict[str, bytes], frozenset[str]]:
    """The files of ``made`` that the donor's folder has otherwise, and the names of those that the output lacks.

    ``source`` is the folder that its other files come from. Raises ``CheckpointError``.
    """
    own, donors = tokenizer_files(source), tokenizer_files(of_donor)
    written: dict[str, bytes] = {}
    if source.resolve() != of_donor.resolve():
        written = {name: _read(path) for name, path in own.items()}
    if is_changed:
        for name, encode in _WRITERS.items():
            if name in own or name in _FORMATS.get(made.file.name, ()):
                written[name] = encode(made)
        if TOKENIZER_CONFIG in own:
            config = read_settings(own[TOKENIZER_CONFIG], MAX_CONFIG) or {}
            if "added_tokens_decoder" in config:
                written[TOKENIZER_CONFIG] = encode_settings(config | {"added_tokens_decoder": _decoder(made)})
    stale = [name for name in own if is_changed and _is_other(name)]
    if stale:
        warnings.append(
            f"tokenizer: {some(stale)} of {source} cannot be written with other tokens, so the output has only "
            f"{TOKENIZER_JSON}; programs that read the other format do not find a tokenizer"
        )
    written = {name: content for name, content in written.items() if name not in stale}
    kept = own.keys() - set(stale)
    return written, frozenset(donors.keys() - kept - written.keys())


def _is_other(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OTHER_FORMATS)


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_TOKENIZER)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{way_out(error)}") from error


def library_json(made: Tokenizer) -> bytes:
    """A tokenizer.json as the tokenizers library writes it.

    Raises ``CheckpointError`` unless the library reads the tokenizer, with the ids that it should have.
    """
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(as_json(made))
        ids = library.get_vocab()
        written: str = library.to_str(pretty=True)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library panics, with an exception that is no Exception
        raise CheckpointError(
            f"{made.file}: the tokenizers library cannot read it with the output's tokens: {error}"
        ) from None
    wrong = [token for token, i in made.ids.items() if ids.get(token) != i]
    if wrong:
        raise CheckpointError(
            f"{made.file}: the tokenizers library gives other ids to {some(wrong, 3)}; load it with AutoTokenizer of "
            "transformers and save it with save_pretrained"
        )
    return written.encode()


def _decoder(made: Tokenizer) -> dict[str, Any]:
    return {str(t["id"]): {key: value for key, value in t.items() if key != "id"} for t in made.added}


def encode_settings(settings: Mapping[str, Any]) -> bytes:
    """Settings as a JSON file."""
    return json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"


def _merges(made: Tokenizer) -> bytes:
    return "\n".join(["#version: 0.2", *map(" ".join, made.merges), ""]).encode()


def _added(made: Tokenizer) -> bytes:
    return encode_settings({t["content"]: t["id"] for t in made.added})


def _lines(made: Tokenizer) -> bytes:
    return "\n".join([*made.pieces, ""]).encode()


_FORMATS = {
    TOKENIZER_JSON: (TOKENIZER_JSON,),
    "vocab.json": ("vocab.json", "merges.txt", "added_tokens.json"),
    "vocab.txt": ("vocab.txt", "added_tokens.json"),
}
"""The files of each format, which is known by the first."""

_WRITERS: Mapping[str, Callable[[Tokenizer], bytes]] = {
    TOKENIZER_JSON: library_json,
    "vocab.json": lambda made: encode_settings(made.pieces),
    "merges.txt": _merges,
    "vocab.txt": _lines,
    "added_tokens.json": _added,
}
