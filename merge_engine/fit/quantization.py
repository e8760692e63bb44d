"""Quantised models: packed integers with scales are no numbers that can be averaged or rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.checkpoint import Checkpoint
from merge_engine.fit.candidate import Candidate, labels
from merge_engine.fit.findings import Findings
from merge_engine.recipe import Recipe, layer_of

_KEYS = ("quantization_config", "quantization", "compression_config")
_PACKED = frozenset(("U8", "I8", "U16", "I16", "U32", "I32", "F4"))
_FORMATS = {
    "SCB": "bitsandbytes 8-bit",
    "weight_packed": "compressed-tensors",
    "W_q": "hqq",
    "weight_scale_2": "nvfp4",
    "weight_scale_inv": "fp8",
    "q_weight": "exl2",
    "trellis": "exl3",
    "codebooks": "aqlm",
    "Qidxs": "quip",
    "dense_weights": "spqr",
    "weight:int_data": "torchao",
}
"""Formats by the last part of the name of a tensor that no other format has."""

_INDICES = ("position_ids", "token_type_ids", "relative_position_index")


def check_quantization(recipe: Recipe, inputs: Sequence[Candidate], findings: Findings) -> None:
    """Refuse quantised models, except to copy them as they are.

    Keys in the config of the donor, the first, that call it quantised are stale if the output is not.
    """
    schemes: dict[str, list[Candidate]] = {}
    for each in inputs:
        if scheme := quantization_of(each.checkpoint):
            schemes.setdefault(scheme, []).append(each)
    for scheme, those in schemes.items():
        line = f"{labels(those)}: quantised ({scheme})"
        if _copies(recipe):
            findings.misfit("quantization", f"{line}, so its tensors can only be copied as they are")
        else:
            findings.problems.append(
                f"{line}, which cannot be merged or rounded; dequantise it to bfloat16 first"
            )
            findings.explain_tensors = True
    donor = inputs[0]
    stale = [] if schemes else [key for key in _KEYS if donor.config.get(key)]
    if stale:
        findings.stale_keys = stale
        scheme = _declared(donor.config) or "unknown scheme"
        findings.warnings.append(
            f"{donor.label}: config.json has {', '.join(stale)} ({scheme}), but the output is not quantised; left out "
            "of its config"
        )


def quantization_of(checkpoint: Checkpoint) -> str | None:
    """The scheme in which the tensors are quantised, in words; None if they are not, whatever the config says."""
    shown = _shown_by_tensors(checkpoint)
    declared = _declared(checkpoint.config)
    if shown is None or declared is None or shown.startswith("bitsandbytes"):  # which names say more of
        return shown
    return declared


def _copies(recipe: Recipe) -> bool:
    """Whether the output has the bytes of the input."""
    given = any(scope.settings for scope in recipe.stacks.scopes)
    return recipe.merge_method == "passthrough" and recipe.output_dtype is None and not given


def _declared(config: Mapping[str, Any]) -> str | None:
    """The scheme that the config names, such as ``gptq 4-bit``."""
    for key in _KEYS:
        section = config.get(key)
        if not isinstance(section, dict):
            continue
        method = section.get("quant_method") or ("mlx" if key == "quantization" else None)
        bits = section.get("bits")
        if section.get("load_in_4bit") is True:
            method, bits = method or "bitsandbytes", 4
        elif section.get("load_in_8bit") is True:
            method, bits = method or "bitsandbytes", 8
        return f"{method or 'unknown scheme'}" + (f" {bits}-bit" if isinstance(bits, int) else "")
    return None


def _shown_by_tensors(checkpoint: Checkpoint) -> str | None:
    """The scheme that the names of the tensors show: what each format calls its packed weights and scales."""
    tensors = checkpoint.tensors
    last = {name.rpartition(".")[2] for name in tensors}
    codes = {operand.dtype.code for operand in tensors.values()}
    if "absmax" in last or any(name.startswith("bitsandbytes__") for name in last):
        kinds = sorted(
            name.removeprefix("bitsandbytes__") for name in last if name.startswith("bitsandbytes__")
        )
        return "bitsandbytes 4-bit" + (f" {', '.join(kinds)}" if kinds else "")
    if "qweight" in last:
        return "gptq" if "g_idx" in last else "awq" if "qzeros" in last else "packed qweight"
    if formats := sorted(last & _FORMATS.keys()):
        return _FORMATS[formats[0]]
    if "scales" in last and "U32" in codes:
        return "mlx"
    if "_data" in last and "_scale" in last:
        return "quanto"
    if "U8" in codes and any(name.endswith("_blocks") for name in last):
        return "mxfp4"
    weights = {operand.dtype.code for name, operand in tensors.items() if name.endswith(".weight")}
    if any(code.startswith("F8_") for code in weights):
        return "fp8"
    return "weights of integers" if weights & _PACKED or _is_packed(checkpoint) else None


def _is_packed(checkpoint: Checkpoint) -> bool:
    """Whether most bytes of the layers are integers with scales beside them, in the same module.

    Masks, [1, 1, n, n], and indices of positions do not count.
    """
    if all(operand.dtype.mergeable for operand in checkpoint.tensors.values()):
        return False
    floats: Counter[str] = Counter()
    packed: Counter[str] = Counter()
    for name, operand in checkpoint.tensors.items():
        if layer_of(name) is None:
            continue
        module, _, last = name.rpartition(".")
        if operand.dtype.mergeable or operand.dtype.code == "BOOL":
            floats[module] += operand.stored_bytes
        elif operand.shape[:2] != (1, 1) and last not in _INDICES:
            packed[module] += operand.stored_bytes
    return sum(count for module, count in packed.items() if module in floats) > floats.total()
