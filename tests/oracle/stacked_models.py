"""Makes small models with transformers, and looks at what was stacked of them. See README.md.

usage: python stacked_models.py make FOLDER | check JOB.json

``make`` writes two models of each architecture, FOLDER/NAME-0 and FOLDER/NAME-1. ``check`` prints a line for each
thing in a stacked model that is not as in the model that its layer is of. A job has by name: the stacked folder, the
path of the layers in the model, and for each layer the folder of its model and its number there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers

transformers.logging.disable_progress_bar()

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "num_hidden_layers": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"head_dim": 8, "sliding_window": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
GROUPS = {
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
}
HEADS = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
NUMBERED = ("layer_idx", "layer_id", "layer_index", "has_relative_attention_bias")
"""Attributes of modules that follow from the number of their layer."""

MODELS = {
    "qwen2": (
        "Qwen2ForCausalLM",
        {**SIZES, "use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
    ),
    "gemma2": ("Gemma2ForCausalLM", {**SIZES, **WINDOW}),
    "gemma3": ("Gemma3ForCausalLM", {**SIZES, **WINDOW, "sliding_window_pattern": 3}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 8, "mlp_only_layers": [1, 4]},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**SIZES, **LATENT, **GROUPS, "moe_intermediate_size": 8, "first_k_dense_replace": 2},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**SIZES, "no_rope_layer_interval": 3}),
    "lfm2": ("Lfm2ForCausalLM", {**SIZES, "full_attn_idxs": [2, 5], "block_multiple_of": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_layer": 6, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 64},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "num_layers": 6,
            "attention_types": [[["global", "local"], 3]],
            "hidden_size": 16,
            "num_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "window_size": 8,
        },
    ),
    "bert": (
        "BertForMaskedLM",
        {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
        | {"num_hidden_layers": 6},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 6, "num_heads": 2, "vocab_size": 64},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "num_mel_bins": 8,
            "vocab_size": 64,
            **HEADS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
}


def make(folder: Path) -> None:
    for name, (kind, settings) in MODELS.items():
        cls = getattr(transformers, kind)
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = cls(cls.config_class(**settings))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            model.save_pretrained(folder / f"{name}-{seed}")


def plain(module: torch.nn.Module) -> dict[str, object]:
    """The settings of a module, but for the number of its layer."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | None) and key not in NUMBERED and not key.startswith("_")
    }


def check(job: dict) -> list[str]:
    wrong = []
    loaded = {}

    def load(folder: str):
        if folder not in loaded:
            kind = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
            loaded[folder] = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
        return loaded[folder]

    for title, one in job.items():
        model, info = load(one["stacked"])
        wrong += [f"{title}: {key} {sorted(map(str, value))}" for key, value in info.items() if value]
        layers = model.get_submodule(one["path"])
        if len(layers) != len(one["layers"]):
            wrong.append(f"{title}: {len(layers)} layers")
            continue
        for number, (folder, old) in enumerate(one["layers"]):
            there = load(folder)[0].get_submodule(f"{one['path']}.{old}")
            ours, theirs = dict(layers[number].named_modules()), dict(there.named_modules())
            wrong += [
                f"{title}: layer {number} is not layer {old} of {folder}: {part or 'the whole'}"
                for part in ours.keys() & theirs.keys()
                if plain(ours[part]) != plain(theirs[part])
            ]
            values = dict(there.named_parameters())
            wrong += [
                f"{title}: layer {number}: {part} has other values"
                for part, value in layers[number].named_parameters()
                if part in values and not torch.equal(value, values[part])
            ]
    return wrong


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        print("\n".join(check(json.loads(Path(sys.argv[2]).read_text()))))
