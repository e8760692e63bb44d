"""Adapters named as models: their tensors are factors of a change, and merge to nothing by themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_engine.fit.candidate import Candidate, labels
from merge_engine.fit.findings import Findings

_FACTOR = re.compile(
    r"(^|[._])(lora_(A|B|E|up|down|embedding_A|embedding_B|magnitude_vector)|hada_(w\d_[ab]|t\d)"
    r"|lokr_(w\d(_[ab])?|t2)|vera_lambda_[bd]|ia3_l|b?oft_[rRsS]|prompt_embeddings)([._]|$)"
)
_LORA = ("lora_", "hada_", "lokr_")
_MARKS = (*_LORA, "vera_", "ia3_", "oft_", "prompt_")
_SETTINGS = "adapter_config.json"
_LORA_NAME = "a LoRA adapter"
_REMEDY = "merge it into its base first (PEFT: merge_and_unload) and name the result"
_PUT_IN = 'name it behind its model, as "model: model+adapter"'


def check_adapters(inputs: Sequence[Candidate], findings: Findings) -> None:
    """Refuse adapters, and models that hold the factors of a LoRA which is not merged into them."""
    alone: dict[str, list[Candidate]] = {}
    beside = []
    for each in inputs:
        factors = sum(map(is_factor, each.checkpoint.tensors))
        if _is_adapter_file(each) or (factors and 2 * factors >= len(each.checkpoint.tensors)):
            alone.setdefault(_described(each), []).append(each)
        elif factors:
            beside.append(each)
    findings.problems += [
        f"{labels(those)}: {what}, no whole model; {_PUT_IN if what.startswith(_LORA_NAME) else _REMEDY}"
        for what, those in alone.items()
    ]
    if beside:
        findings.problems.append(
            f"{labels(beside)}: holds the factors of a LoRA adapter that is not merged into the weights; {_REMEDY}"
        )
    findings.explain_tensors |= bool(alone or beside)


def is_factor(name: str) -> bool:
    """Whether a tensor of this name is part of an adapter."""
    # The look for marks saves most of the time: few models hold any.
    return any(mark in name for mark in _MARKS) and _FACTOR.search(name) is not None


def _is_adapter_file(candidate: Candidate) -> bool:
    return all(file.path.name.startswith("adapter_model.") for file, _ in candidate.checkpoint.contents)


def _described(candidate: Candidate) -> str:
    """Such as ``a LoRA adapter of org/base``: the base is as the adapter names it."""
    settings = candidate.settings(_SETTINGS) or {}
    kind = settings.get("peft_type")
    base = settings.get("base_model_name_or_path")
    if not isinstance(kind, str):
        kind = (
            "LORA" if any(mark in name for name in candidate.checkpoint.tensors for mark in _LORA) else None
        )
    name = _LORA_NAME if kind == "LORA" else f"a {kind} adapter" if kind else "an adapter"
    return name + (f" of {base}" if base and isinstance(base, str) else "")
