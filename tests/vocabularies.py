"""Small Llama models with tokenizers, for tests of vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from adversarial import generator
from safetensors.torch import save_file

WIDTH, INNER, LAYERS = 16, 24, 2
SPECIAL = ("<unk>", "<s>", "</s>")


def added(content: str, number: int, special: bool = False) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": number, "content": content, **flags, "normalized": not special, "special": special}


def tokenizer_json(
    pieces: Sequence[str] | Mapping[str, int],
    extra: Sequence[str] = (),
    kind: str = "BPE",
    merges: Sequence[str] = (),
    scores: Mapping[str, float] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """A tokenizer with these pieces, the first three of which are special, and more added tokens behind them."""
    ids = dict(pieces) if isinstance(pieces, Mapping) else {piece: i for i, piece in enumerate(pieces)}
    model: dict[str, Any] = {"type": kind, "vocab": ids}
    if kind == "BPE":
        model["merges"] = list(merges)
    elif kind == "Unigram":
        given = scores or {}
        model |= {"unk_id": 0, "vocab": [[piece, given.get(piece, -float(i))] for piece, i in ids.items()]}
    else:
        model |= {"unk_token": "<unk>"}
        if kind == "WordPiece":
            model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    size = max(ids.values()) + 1
    tokens = [added(token, ids[token], special=True) for token in SPECIAL if token in ids]
    tokens += [added(token, size + i) for i, token in enumerate(extra)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        **rest,
        "model": model,
    }


def tensors_of(
    rows: int, seed: int, dtype: torch.dtype = torch.bfloat16, tied: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a Llama with so many rows in its embedding and its head."""
    g = generator(seed, 77)
    shapes = {"model.embed_tokens.weight": (rows, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    if not tied:
        shapes["lm_head.weight"] = (rows, WIDTH)
    return {name: (torch.randn(shape, generator=g) * 0.05).to(dtype) for name, shape in shapes.items()}


def save_llama(
    folder: Path,
    tokenizer: Mapping[str, Any] | None,
    rows: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    **config: Any,
) -> Path:
    """A folder with a model and its tokenizer; ``rows`` are as many as tokens unless given."""
    folder.mkdir(parents=True)
    if rows is None:
        assert tokenizer is not None
        vocab = tokenizer["model"]["vocab"]
        ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
        rows = max([*ids, *(token["id"] for token in tokenizer["added_tokens"])]) + 1
    save_file(tensors_of(rows, seed, dtype, tied), folder / "model.safetensors", {"format": "pt"})
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(described))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 64,
            "clean_up_tokenization_spaces": False,
        }
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    return folder


def words(count: int, start: int = 3) -> list[str]:
    """The special tokens and more, so that there are ``count``."""
    return [*SPECIAL, *(f"w{i}" for i in range(start, count))]
