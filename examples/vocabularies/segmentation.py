"""How Tamil is cut into tokens before and after a merge of vocabularies. See docs/vocabularies.md.

A tokenizer is trained on English. Two others extend it with pieces of Tamil, each from another source of text, as those
of models do that learn a language after their base. merge_engine merges three models with these tokenizers. The tokens
of its output are compared with those of a tokenizer that got the same new pieces as added tokens.

python -m examples.vocabularies.segmentation
"""

from __future__ import annotations

import json
import lzma
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import merge_engine as me
from examples.low_resource.settings import DATA
from examples.low_resource.text import SOURCES

ENGLISH, TAMIL = 3000, 1500
"""Tokens of the base, and of each training on Tamil."""

END = "<|end|>"
WIDTH = 8

Texts = Mapping[str, Mapping[str, Sequence[str]]]
"""By part (``train``, ``held_out``) and source: its Tamil. ``english`` stands for the English of all sources."""


def load_texts() -> Texts:
    """The text of the repository."""
    texts: dict[str, dict[str, list[str]]] = {"train": {"english": []}, "held_out": {"english": []}}
    for source in SOURCES:
        content = json.loads(lzma.decompress((DATA / f"{source}.json.xz").read_bytes()))
        for part, found in texts.items():
            found[source] = [tamil for _, tamil in content[part]["pairs"]]
            found["english"] += content[part]["english"]
    return texts


def new_bpe() -> Tokenizer:
    """Byte-level BPE. Words are cut at spaces alone: the usual expression would cut Tamil at vowel signs."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> Tokenizer:
    """Train byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_unigram() -> Tokenizer:
    """Unigram, as sentencepiece makes it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def train_unigram(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> Tokenizer:
    """Train Unigram."""
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def extended(base: Mapping[str, Any], tamil: Mapping[str, Any]) -> dict[str, Any]:
    """The base's tokenizer with the pieces of another: merges behind its own, or scores."""
    document: dict[str, Any] = json.loads(json.dumps(base))
    model, other = document["model"], tamil["model"]
    if model["type"] == "Unigram":
        known = {piece for piece, _ in model["vocab"]}
        model["vocab"] += [entry for entry in other["vocab"] if entry[0] not in known]
    else:
        for piece in other["vocab"]:
            model["vocab"].setdefault(piece, len(model["vocab"]))
        known_merges = set(map(tuple, model["merges"]))
        model["merges"] += [pair for pair in other["merges"] if tuple(pair) not in known_merges]
    return document


def save_model(folder: Path, document: Mapping[str, Any]) -> Path:
    """A model with a tokenizer, its embedding, and nothing else."""
    folder.mkdir()
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = torch.randn(tokenizer.get_vocab_size(), WIDTH)
    save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(rows)}))
    return folder


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a model."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def with_added_tokens(base: Path, tuned: Sequence[Path]) -> Tokenizer:
    """The base's tokenizer, to which the pieces that it lacks are added as whole tokens."""
    tokenizer = load(base)
    known = tokenizer.get_vocab()
    for folder in tuned:
        pieces = sorted(load(folder).get_vocab().items(), key=lambda item: item[1])
        tokenizer.add_tokens([piece for piece, _ in pieces if piece not in known])
    return tokenizer


def pieces_of(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[str]]:
    """The tokens of each word, which has the space before it."""
    return [each.tokens for each in tokenizer.encode_batch(words, add_special_tokens=False)]


def compare(words: Sequence[str], before: Tokenizer, after: Tokenizer) -> tuple[float, float]:
    """The tokens of a word after a merge, on average, and the share of words that are cut as before."""
    own, merged = pieces_of(before, words), pieces_of(after, words)
    same = sum(one == other for one, other in zip(own, merged, strict=True))
    return sum(map(len, merged)) / len(words), same / len(words)


def words_of(texts: Sequence[str]) -> list[str]:
    """The words of texts, each with a space before it, as inside of a text."""
    return [f" {word}" for text in texts for word in text.split()]


Kind = tuple[Callable[[], Tokenizer], Callable[[Tokenizer, Sequence[str], int], Tokenizer]]
KINDS: Mapping[str, Kind] = {"BPE": (new_bpe, train_bpe), "Unigram": (new_unigram, train_unigram)}


def rows_of_table(kind: str, texts: Texts, folder: Path) -> list[str]:
    """The lines of the table for one kind of tokenizers."""
    new, train = KINDS[kind]
    documents = {"base": json.loads(train(new(), texts["train"]["english"], ENGLISH).to_str())}
    for source in SOURCES:
        tamil = json.loads(train(new(), texts["train"][source], TAMIL).to_str())
        documents[source] = extended(documents["base"], tamil)
    folders = {name: save_model(folder / name, document) for name, document in documents.items()}
    lines = []
    for tuned in (SOURCES[:1], SOURCES):
        output = folder / f"merged with {len(tuned)}"
        merge([folders[name] for name in ("base", *tuned)], output)
        others = with_added_tokens(folders["base"], [folders[source] for source in tuned])
        for name in (*tuned, "english"):
            words = words_of(texts["held_out"][name])
            base = load(folders["base"])
            own = base if name == "english" else load(folders[name])
            cells = [f"{compare(words, own, each)[0]:.2f}" for each in (base, own)]
            for merged in (load(output), others):
                tokens, same = compare(words, own, merged)
                cells += [f"{tokens:.2f}", f"{same:.1%}"]
            lines.append(f"| {kind} | {' and '.join(tuned)} | {name} | {' | '.join(cells)} |")
    return lines


def merge(folders: Sequence[Path], output: Path) -> None:
    """Merge models, of which the first is the base, into one with all tokens."""
    recipe = {
        "merge_method": "linear",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders],
        "parameters": {"weight": 1.0},
        "tokenizer_source": "union",
    }
    me.run(recipe, output)


HEAD = (
    "| model | extensions | words of | tokens a word: base | extended | merged | words cut as before | added tokens | "
    "words cut as before |\n| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def main() -> None:
    """Print the table."""
    texts = load_texts()
    print(HEAD)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(rows_of_table(kind, texts, Path(folder))))


if __name__ == "__main__":
    main()
