"""Configs that differ: what the tensors mean, and what the models compute with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_engine.checkpoint import is_about_layers
from merge_engine.fit.candidate import Candidate, by_value, shown
from merge_engine.fit.findings import Findings
from merge_engine.recipe import layer_of
from merge_engine.text import some

_ARCHITECTURE = (
    *("model_type", "is_encoder_decoder"),
    *("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"),
    *(
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    *("num_key_value_heads", "num_kv_heads", "multi_query", "head_dim", "d_kv", "rotary_dim", "rotary_pct"),
    *(
        "partial_rotary_factor",
        "position_embedding_type",
        "alibi",
        "parallel_attn",
        "new_decoder_architecture",
    ),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner", "hidden_dim"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "attention_bias", "mlp_bias"),
    *("num_local_experts", "num_experts", "n_routed_experts", "n_shared_experts", "moe_intermediate_size"),
    *("state_size", "conv_kernel", "patch_size", "image_size", "num_channels"),
)
"""Keys that say what the tensors mean, in the order in which they are named."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")

_COMPUTATION = (
    "architectures",
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "max_position_embeddings"),
    *("n_positions", "sliding_window", "layer_types", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *(
        "norm_eps",
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "ffn_act_fn",
    ),
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "attn_logit_softcapping"),
    *("final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "scale_attn_weights", "vocab_size"),
)
"""Keys that change what a model computes with the same tensors. Each that differs gets a line."""

_TIED = "tie_word_embeddings"
_TEXT = "text_config"
_NULLS = ("attn_logit_softcapping", "final_logit_softcapping")
"""Keys of which null is a value of its own. Elsewhere it stands for the default, as if the key were not given."""

_SILENT = frozenset(
    (
        *(
            "transformers_version",
            "unsloth_version",
            "unsloth_fixed",
            "model_name",
            "torchscript",
            "use_cache",
        ),
        *("dtype", "torch_dtype", "return_dict", "output_attentions", "output_hidden_states", "auto_map"),
        *("attn_implementation", "use_flash_attention_2", "gradient_checkpointing", "pretraining_tp"),
        *("initializer_range", "initializer_factor", "init_std", "attention_dropout", "hidden_dropout"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "resid_pdrop"),
        *("embd_pdrop", "attn_pdrop", "dropout", "dropout_rate", "activation_dropout", "resid_dropout"),
        *("embd_dropout", "summary_first_dropout", "router_aux_loss_coef", "output_router_logits"),
        *("aux_loss_alpha", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "tokenizer_class", "prefix"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id"),
        *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "max_length", "min_length"),
        *("do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "task_specific_params"),
        *("finetuning_task", "problem_type", "quantization_config", "quantization", "compression_config"),
    )
)
"""Keys without a meaning for the merged tensors, or looked at elsewhere; so are those that begin with ``_``."""

_SHOWN = 3


def check_configs(inputs: Sequence[Candidate], findings: Findings, stacked: bool) -> None:
    """Compare config.json of all inputs that have one. The donor is the first.

    If the output is ``stacked`` of layers, what configs say of single layers may differ.
    """
    donor = inputs[0]
    having = [each for each in inputs if each.config]
    if having and not donor.config:
        findings.warnings.append(
            f"{donor.label}: it has no config.json, so the output has none; copy that of {having[0].label}"
        )
    differences = {
        key: values
        for key, values in _differences(having)
        if not (stacked and is_about_layers(key.rpartition(".")[2], [value for _, value in values]))
    }
    by_kind: dict[str, list[str]] = {}
    for key in differences:
        by_kind.setdefault(_kind_of(key.rpartition(".")[2]), []).append(key)
    _refuse_architecture(by_kind.get("architecture", []), differences, findings)
    if (layers := by_kind.get("layers")) and _same_layers(having):
        findings.misfit(
            "layers",
            f"config.json: {_said(layers[:1], differences)}, but their tensors are of equally many layers",
        )
    for key in by_kind.get("computation", []):
        gets = next((shown(value) for owner, value in differences[key] if owner is donor), None)
        findings.warnings.append(
            f"config.json: {_said([key], differences)}" + (f"; the output gets {gets}" if gets else "")
        )
    for key in by_kind.get("tied", []):
        findings.warnings.append(f"config.json: {_said([key], differences)}")
    if others := by_kind.get("other"):
        findings.warnings.append(
            f"config.json: other keys differ: {some(others)}; the output gets those of {donor.label}"
        )


def _refuse_architecture(
    keys: list[str], differences: Mapping[str, list[tuple[Candidate, Any]]], findings: Findings
) -> None:
    if not keys:
        return
    keys = sorted(keys, key=lambda key: (key.count("."), _ARCHITECTURE.index(key.rpartition(".")[2])))
    rest = f"; also different: {', '.join(keys[_SHOWN:])}" if keys[_SHOWN:] else ""
    line = f"config.json: the architectures differ: {_said(keys[:_SHOWN], differences)}{rest}"
    findings.explain_tensors |= findings.misfit("architecture", line)


def _said(keys: Sequence[str], differences: Mapping[str, list[tuple[Candidate, Any]]]) -> str:
    return "; ".join(f"{key} is {by_value(differences[key])}" for key in keys)


def _kind_of(key: str) -> str:
    if key in _ARCHITECTURE:
        return "architecture"
    if key in _LAYERS:
        return "layers"
    if key in _COMPUTATION:
        return "computation"
    return "tied" if key == _TIED else "other"


def _differences(inputs: Sequence[Candidate]) -> Iterator[tuple[str, list[tuple[Candidate, Any]]]]:
    """The keys that differ, ``text_config.hidden_size`` for a nested one, with the value in each input.

    A key that some inputs lack has its default there. Where that is not known, only those that have the key are
    compared: newer versions of transformers write more keys than older ones.
    """
    sections: dict[str, list[tuple[Candidate, dict[str, Any]]]] = {}
    flat = any(each.config and not isinstance(each.config.get(_TEXT), dict) for each in inputs)
    for each in inputs:
        for path, section in _sections(_flattened(each.config) if flat else each.config):
            sections.setdefault(path, []).append((each, section))
    for path, those in sections.items():
        for key in dict.fromkeys(key for _, section in those for key in section):
            if key in _SILENT or key.startswith("_"):
                continue
            values = [
                (owner, section.get(key, _default(key, section)))
                for owner, section in those
                if key in section or _has_default(key, section)
            ]
            if any(value != values[0][1] for _, value in values):
                yield f"{path}.{key}" if path else key, values


def _flattened(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the section of its language model at the top, where older versions of transformers wrote it."""
    text = config.get(_TEXT)
    return {**text, **config, _TEXT: None} if isinstance(text, dict) else config


def _sections(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The config and its nested ones, such as ``text_config``, each with its path."""
    plain = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in _SILENT:
            yield from _sections(value, f"{path}.{key}" if path else key)
        elif value is not None or key in _NULLS:
            plain[key] = value
    yield path, _as_written_by_all(plain)


def _as_written_by_all(section: dict[str, Any]) -> dict[str, Any]:
    """The keys as older versions of transformers wrote them, without those that have no effect."""
    rope = section.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        del section["rope_parameters"]
        section["rope_theta"] = rope["rope_theta"]
        section["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaling = section.get("rope_scaling")
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type"))
        section["rope_scaling"] = {key: value for key, value in scaling.items() if key != "type"} | {
            "rope_type": kind
        }
        if kind == "default" and len(section["rope_scaling"]) == 1:
            del section["rope_scaling"]
    if section.get("use_sliding_window") is False:
        for key in ("sliding_window", "max_window_layers"):
            section.pop(key, None)
    return section


def _default(key: str, section: Mapping[str, Any]) -> Any:
    """The meaning of a key that is not given."""
    if key == "num_key_value_heads":
        return section.get("num_attention_heads")
    return {"rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False}.get(key)


def _has_default(key: str, section: Mapping[str, Any]) -> bool:
    return key in ("rope_scaling", "sliding_window") or _default(key, section) is not None


def _same_layers(inputs: Sequence[Candidate]) -> bool:
    """Whether the names of the tensors show equally many layers in all inputs."""
    counts = []
    for each in inputs:
        layers = (layer_of(name) for name in each.checkpoint.tensors)
        counts.append({layer[:2] for layer in layers if layer is not None})
    return all(found == counts[0] for found in counts)
