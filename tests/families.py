"""Small models with the configs and tokenizers of published families, for tests of what fits together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 64,
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 64,
}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 60, "content": "<|begin_of_text|>", "special": True},
        {"id": 61, "content": "<|end_of_text|>", "special": True},
        {"id": 62, "content": "<|reserved_special_token_0|>", "special": True},
        {"id": 63, "content": "<|eot_id|>", "special": True},
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "post_processor": {"type": "ByteLevel", "trim_offsets": False},
    "decoder": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "vocab": {f"Ġword{i}": i for i in range(60)},
        "merges": [f"Ġwor d{i}" for i in range(60)],
    },
}
TOKENIZER_CONFIG = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "model_max_length": 131072,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": 128001,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.43.0.dev0",
}


def changed(document: Mapping[str, Any], *removed: str, **given: Any) -> dict[str, Any]:
    """A copy of a JSON object with other values, and without some keys."""
    return {key: value for key, value in {**document, **given}.items() if key not in removed}


def tokenizer(indent: int | None = 2, *, added: Any = None, **model: Any) -> str:
    """A tokenizer.json, in the layout of the tokenizers library unless ``indent`` is another."""
    document = changed(TOKENIZER, model={**TOKENIZER["model"], **model})
    if added is not None:
        document["added_tokens"] = [{"id": i, "content": token} for token, i in added.items()]
    return json.dumps(document, indent=indent, ensure_ascii=False)


def save_model(
    folder: Path,
    seed: int,
    config: Mapping[str, Any] | None = LLAMA,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **files: Any,
) -> Path:
    """A model of two layers. ``files`` are texts or JSON objects by name, with ``__`` for a dot; None leaves one out.

    Without others it has a tokenizer and settings of generation.
    """
    folder.mkdir(parents=True)
    given: dict[str, Any] = {
        "config__json": config,
        "tokenizer__json": tokenizer(),
        "tokenizer_config__json": TOKENIZER_CONFIG,
        "generation_config__json": GENERATION,
    }
    for name, content in (given | files).items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content, indent=2)
            (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    held = {name: tensor.clone() for name, tensor in (tensors or state_dict(seed)).items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def state_dict(seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a tiny Llama."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,), "lm_head.weight": (64, 16)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{one}_proj.weight": (16, 16) for one in "qkvo"}
        shapes |= {f"{at}.mlp.up_proj.weight": (32, 16), f"{at}.mlp.down_proj.weight": (16, 32)}
    return {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}
