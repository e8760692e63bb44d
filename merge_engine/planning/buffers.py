"""Buffers: tensors that loaders compute anew from the config, whatever a checkpoint holds.

Their names alone do not tell: ``h.0.attn.bias`` is the causal mask of GPT-2 if it has the shape [1, 1, n, n], and a
weight otherwise. So a rule looks at the last part of the name and at shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable

from merge_engine.operands import Operand
from merge_engine.planning.inputs import Inputs, examples

_Rule = Callable[[str, Operand], bool]


def _any_shape(name: str, operand: Operand) -> bool:
    return True


def _line_of_integers(name: str, operand: Operand) -> bool:
    """0, 1, 2, ... for each position: [n] or [1, n]."""
    return not operand.dtype.mergeable and operand.shape[:-1] in ((), (1,)) and len(operand.shape) > 0


def _integers(name: str, operand: Operand) -> bool:
    return not operand.dtype.mergeable


def _mask(name: str, operand: Operand) -> bool:
    """[1, 1, n, n]: which positions see which."""
    shape = operand.shape
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _mask_of_attention(name: str, operand: Operand) -> bool:
    return name.endswith(("attn.bias", "attention.bias")) and _mask(name, operand)


def _causal_mask(name: str, operand: Operand) -> bool:
    return _mask(name, operand) or (not operand.dtype.mergeable and len(set(operand.shape)) == 1)


def _scalar(name: str, operand: Operand) -> bool:
    return operand.shape in ((), (1,))


def _after(*owners: str) -> _Rule:
    """The parts of the name before the last end so."""
    return lambda name, operand: name.rpartition(".")[0].endswith(owners)


_RULES: dict[str, _Rule] = {
    "inv_freq": _any_shape,  # rotary embeddings
    "original_inv_freq": _any_shape,
    "ref_inv_freq": _any_shape,
    "cos_cached": _any_shape,
    "sin_cached": _any_shape,
    "freqs_cis": _any_shape,
    "cos": _after("rotary_emb"),
    "sin": _after("rotary_emb"),
    "freqs": _after("rotary_emb", "rope"),  # Llama as Meta stores it
    "position_ids": _line_of_integers,  # BERT, CLIP
    "token_type_ids": _line_of_integers,
    "bias": _mask_of_attention,  # GPT-2, GPT-Neo, GPT-NeoX
    "causal_mask": _causal_mask,  # GPT-J, CodeGen; Llama in transformers 4.38
    "masked_bias": _scalar,
    "relative_position_index": _integers,  # Swin, BEiT
    "embed_positions": _after("attn", "attention"),  # GPT-J, CodeGen
    "weights": _after("embed_positions"),  # M2M100, speech models
    "_float_tensor": _scalar,  # M2M100 in fairseq
    "num_batches_tracked": _integers,  # batch normalisation: no loader needs it, and it counts another training
}
"""By the last part of the name. docs/recipes.md has this list in words."""


def is_buffer(name: str, operand: Operand) -> bool:
    """Whether loaders compute this tensor anew, so that the value in a checkpoint does not matter."""
    rule = _RULES.get(name[name.rfind(".") + 1 :])
    return rule is not None and rule(name, operand)


class Buffers:
    """The buffers of a merge. The output has those of the reference; others are left out."""

    def __init__(self) -> None:
        self._differing: dict[str, list[str]] = {}

    def has(self, name: str, inputs: Inputs) -> bool:
        """Whether the tensor of this name is a buffer in all inputs of a slice that have it."""
        if name[name.rfind(".") + 1 :] not in _RULES:
            return False
        merged = inputs.merged()
        held = [catalogue.tensors[name] for catalogue in merged if name in catalogue.tensors]
        if not all(is_buffer(name, operand) for operand in held):
            return False
        alike = len(held) == len(merged) and len({(operand.shape, operand.dtype) for operand in held}) == 1
        if not alike and inputs.reference is not None:
            self._differing.setdefault(inputs.reference.label, []).append(name)
        return True

    def notes(self) -> list[str]:
        """A note for each reference whose buffers the output has because the inputs do not have the same."""
        return [
            f"buffers that loaders compute anew are those of {reference}, or left out if it has none: {examples(names)}"
            for reference, names in self._differing.items()
        ]
