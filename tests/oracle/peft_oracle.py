"""Makes small models, puts LoRA adapters into them with PEFT, and saves model, adapter and result.

usage: python peft_oracle.py FOLDER

Below FOLDER each case gets ``base`` (a checkpoint), ``adapter`` (as PEFT saves it) and ``merged`` (the tensors after
merge_and_unload, in float32). See README.md; needs an environment with PEFT, which mergekit brings along.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)


def llama(**changed: object) -> LlamaForCausalLM:
    """A tiny Llama."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changed}))


def qwen() -> Qwen2ForCausalLM:
    """A tiny Qwen: its projections have biases, and its head is its embedding."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True))


def gpt2() -> GPT2LMHeadModel:
    """A tiny GPT-2, which stores weights as [in, out]."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4))


CASES = {
    "plain": (llama, {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, "model.layers.1.mlp.up_proj": 7},
            "alpha_pattern": {
                "^model.layers.0.self_attn.q_proj": 3,
                "layers.1.self_attn.q_proj": 5,
                "up_proj": 20,
            },
            "layers_to_transform": [0, 1],
        },
    ),
    "embeddings": (
        llama,
        {"r": 3, "target_modules": ["embed_tokens", "o_proj", "lm_head"], "modules_to_save": ["norm"]},
    ),
    "head": (llama, {"r": 2, "target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    "biases": (qwen, {"r": 4, "target_modules": ["k_proj"], "bias": "all"}),
    "tied": (qwen, {"r": 4, "target_modules": ["embed_tokens", "gate_proj"]}),
    "transposed": (gpt2, {"r": 5, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
}


def main(folder: Path) -> None:
    """Do all cases."""
    torch.set_num_threads(1)
    for seed, (name, (make, settings)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = make()
        model.save_pretrained(folder / name / "base")
        tuned = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter_name, parameter in tuned.named_parameters():
                if parameter.requires_grad:  # factors, saved modules and biases, as after a training
                    assert "original_module" not in parameter_name
                    parameter.normal_(std=0.5)
        tuned.save_pretrained(folder / name / "adapter")
        tuned.merge_and_unload().save_pretrained(folder / name / "merged")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
