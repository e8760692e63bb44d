"""Small models of ten families, with tokenizers of 96 tokens: inputs for every shape of recipe.

Each family has a base and three fine-tunes, ``base``, ``a``, ``b``, ``c``: the base plus noise. Of Llama there are
copies in other files and types, two models with added tokens, and two LoRA adapters of the base.
"""

from __future__ import annotations

import json
import logging
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace

VOCABULARY, HIDDEN = 96, 64
SPECIAL = ("<unk>", "<s>", "</s>")
SHARED, OWN = "<extra_shared>", {"plus-a": "<extra_a>", "plus-b": "<extra_b>"}
"""The added tokens: one of both models, and one of each."""
TEMPLATES = {
    "base": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    "tuned": "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }} {% endfor %}",
}
_TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llava() -> transformers.PreTrainedConfig:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    text = transformers.LlamaConfig(num_hidden_layers=2, head_dim=16, **_TEXT)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCABULARY - 1)


_OLD = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "": lambda: transformers.LlamaConfig(
        num_hidden_layers=8, head_dim=16, tie_word_embeddings=False, **_TEXT
    ),
    "mistral": lambda: transformers.MistralConfig(num_hidden_layers=4, head_dim=16, **_TEXT),
    "qwen2": lambda: transformers.Qwen2Config(num_hidden_layers=4, tie_word_embeddings=True, **_TEXT),
    "gemma2": lambda: transformers.Gemma2Config(num_hidden_layers=4, head_dim=16, **_TEXT),
    "granite": lambda: transformers.GraniteConfig(num_hidden_layers=4, **_TEXT),
    "mixtral": lambda: transformers.MixtralConfig(
        num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, head_dim=16, **_TEXT
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, **_OLD
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, **_OLD),
    "bert": lambda: transformers.BertConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
    ),
    "llava": _llava,
}
DEEP: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    name: lambda layers=layers: transformers.LlamaConfig(num_hidden_layers=layers, head_dim=16, **_TEXT)
    for name, layers in (("deep", 32), ("tall", 40))
}
"""Llama with as many layers as the models of published recipes."""
_CLASSES = {
    "bert": lambda config: transformers.BertForMaskedLM(config),
    "llava": lambda config: transformers.LlavaForConditionalGeneration(config),
}


def build(folder: Path, dtype: torch.dtype, *, deep: bool = False) -> None:
    """Write all models into a folder. The inputs of other types keep theirs. ``deep`` adds those of many layers."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for family, config in (FAMILIES | (DEEP if deep else {})).items():
        make = _CLASSES.get(family, transformers.AutoModelForCausalLM.from_config)
        model = make(config()).to(dtype)
        values = dict(_parameters(model))
        for seed, name in enumerate(("base", "a", "b", "c")):
            _set_values(values, seed)
            model.generation_config = getattr(model, "generation_config", None)
            _save(model, folder / (f"{family}-{name}" if family else name), "base" if seed == 0 else "tuned")
    _copies(folder)
    _with_added_tokens(folder)
    for seed, name in enumerate(("lora-a", "lora-b")):
        _save_adapter(folder / name, seed, dtype)


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in sorted(model.named_parameters()):
        yield name, parameter.data


def _set_values(values: dict[str, torch.Tensor], seed: int) -> None:
    """The base's values if ``seed`` is 0, else those of a fine-tune: noise of a tenth of their size is added."""
    of_base, of_tune = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for name, value in values.items():
        origin = torch.randn(value.shape, generator=of_base) * 0.05 + (1.0 if "norm" in name else 0.0)
        step = torch.randn(value.shape, generator=of_tune) * 0.005 if seed else 0.0
        value.copy_(origin.to(value.dtype) + step)


def _save(model: transformers.PreTrainedModel, folder: Path, template: str, **options: Any) -> None:
    model.save_pretrained(folder, **options)
    _save_tokenizer(folder, template)


def _save_tokenizer(folder: Path, template: str, added: tuple[str, ...] = ()) -> None:
    """A BPE tokenizer of 96 tokens: letters, a few merges, and the added tokens behind them."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, "▁", *string.ascii_letters, *string.digits))}
    merges = []
    for first in "▁ehortaind":
        for second in "aeiotns":
            if len(vocabulary) < VOCABULARY and first + second not in vocabulary:
                vocabulary[first + second] = len(vocabulary)
                merges.append((first, second))
    made = Tokenizer(BPE(vocabulary, merges, unk_token=SPECIAL[0]))
    made.pre_tokenizer, made.decoder = Metaspace(), MetaspaceDecoder()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    fast.add_tokens(list(added))
    fast.chat_template = TEMPLATES[template]
    fast.save_pretrained(folder)


def _load(folder: Path, dtype: torch.dtype | str = "auto") -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _copies(folder: Path) -> None:
    for name in ("base", "a"):
        _save(
            _load(folder / name),
            folder / f"{name}-sharded",
            "base" if name == "base" else "tuned",
            max_shard_size="100KB",
        )
    _save(_load(folder / "a", torch.float32), folder / "a-fp32", "tuned")
    mixed = _load(folder / "a")
    for name, value in _parameters(mixed):
        if "norm" in name:
            mixed.get_parameter(name).data = value.float()
    _save(mixed, folder / "a-mixed", "tuned")
    shutil.copytree(folder / "b", folder / "b-bin")
    (folder / "b-bin" / "model.safetensors").unlink()
    torch.save(_load(folder / "b").state_dict(), folder / "b-bin" / "pytorch_model.bin")


def _with_added_tokens(folder: Path) -> None:
    for seed, (name, own) in enumerate(OWN.items()):
        added = (SHARED, own)
        model = _load(folder / name.removeprefix("plus-"))
        model.resize_token_embeddings(VOCABULARY + len(added), mean_resizing=False)
        random = torch.Generator().manual_seed(seed + 100)
        for weights in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weights.data[VOCABULARY:] = torch.randn(len(added), HIDDEN, generator=random) * 0.05
        model.save_pretrained(folder / name)
        _save_tokenizer(folder / name, "tuned", added)


def _save_adapter(folder: Path, seed: int, dtype: torch.dtype) -> None:
    """A LoRA of rank 4 of two projections in each layer, as PEFT writes it."""
    random = torch.Generator().manual_seed(seed + 50)
    tensors = {}
    for layer in range(8):
        for projection, rows in (("q_proj", HIDDEN), ("v_proj", HIDDEN // 2)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            tensors[f"{at}.lora_A.weight"] = (torch.randn(4, HIDDEN, generator=random) * 0.1).to(dtype)
            tensors[f"{at}.lora_B.weight"] = (torch.randn(rows, 4, generator=random) * 0.02).to(dtype)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
