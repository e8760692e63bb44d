"""Tensor names and shapes of real models, and the config.json that goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family. Sizes are counts of elements, heads, layers or rows."""

    model_type: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    experts: int = 0

    @property
    def class_name(self) -> str:
        """The class that transformers loads it with."""
        return f"{self.model_type.capitalize()}ForCausalLM"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return sum(2 * prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        config: dict[str, Any] = {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }
        if self.experts:
            config |= {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        return config

    def _layer(self) -> dict[str, tuple[int, ...]]:
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if self.model_type == "qwen2":
            shapes["self_attn.q_proj.bias"] = (hidden,)
            shapes["self_attn.k_proj.bias"] = shapes["self_attn.v_proj.bias"] = (kv,)
        if self.experts:
            shapes["block_sparse_moe.gate.weight"] = (self.experts, hidden)
            for expert in range(self.experts):
                prefix = f"block_sparse_moe.experts.{expert}"
                shapes |= {
                    f"{prefix}.w1.weight": (self.ffn, hidden),
                    f"{prefix}.w3.weight": (self.ffn, hidden),
                }
                shapes[f"{prefix}.w2.weight"] = (hidden, self.ffn)
        else:
            shapes |= {"mlp.gate_proj.weight": (self.ffn, hidden), "mlp.up_proj.weight": (self.ffn, hidden)}
            shapes["mlp.down_proj.weight"] = (hidden, self.ffn)
        return shapes


ARCHITECTURES = {
    "tiny": Architecture("llama", hidden=64, ffn=176, layers=2, heads=4, kv_heads=2, vocabulary=1000),
    "tiny-moe": Architecture(
        "mixtral", hidden=16, ffn=16, layers=2, heads=2, kv_heads=2, vocabulary=100, experts=16
    ),
    # Qwen2.5-0.5B
    "0.5b": Architecture("qwen2", 896, 4864, layers=24, heads=14, kv_heads=2, vocabulary=151936, tied=True),
    # TinyLlama-1.1B
    "1.1b": Architecture("llama", 2048, 5632, layers=22, heads=32, kv_heads=4, vocabulary=32000),
    # Llama-3.2-3B
    "3b": Architecture("llama", 3072, 8192, layers=28, heads=24, kv_heads=8, vocabulary=128256, tied=True),
    # Mistral-7B
    "7b": Architecture("mistral", 4096, 14336, layers=32, heads=32, kv_heads=8, vocabulary=32000),
    # 10,000 tensors of a few kilobytes
    "moe": Architecture(
        "mixtral", hidden=64, ffn=64, layers=26, heads=4, kv_heads=2, vocabulary=1000, experts=127
    ),
    # 50,000 tensors of 64 elements
    "many": Architecture(
        "mixtral", hidden=8, ffn=8, layers=64, heads=2, kv_heads=1, vocabulary=100, experts=259
    ),
}
