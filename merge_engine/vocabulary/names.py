"""Which tensors have a row for each token, by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from merge_engine.operands import Operand
from merge_engine.recipe import layer_of

EMBEDDINGS = (
    ".embeddings.weight",  # Mamba, RWKV
    "embed_in.weight",  # GPT-NeoX
    "embed_tokens.weight",  # Llama and most others
    "tok_embeddings.weight",  # ModernBERT, Llama as Meta stores it
    "tokens_embed.weight",  # GPT
    "word_embedding.weight",  # XLNet
    "word_embeddings.weight",  # BERT, BLOOM, Falcon
    "wte.weight",  # GPT-2
)
SHARED = ("shared.weight",)
"""The embedding of encoder and decoder in T5 and BART; each of the two may be stored once more."""

HEADS = (
    "embed_out.weight",  # GPT-NeoX
    "generator_lm_head.weight",  # ELECTRA
    "lm_head.decoder.weight",  # RoBERTa
    "lm_head.weight",
    "lm_loss.weight",  # XLNet
    "output_projection.weight",  # BioGPT
    "predictions.decoder.weight",  # BERT
    "proj_out.weight",  # Whisper
    "vocab_projector.weight",  # DistilBERT
)
_BIASES = (
    "lm_head.bias",  # Phi, RoBERTa
    "lm_head.decoder.bias",
    "generator_lm_head.bias",
    "lm_loss.bias",
    "predictions.bias",
    "predictions.decoder.bias",
    "vocab_projector.bias",
)
_OTHERS = re.compile(
    r"output\.weight|(.*\.)?output_layer\.weight"  # InternLM 2, ChatGLM
    r"|(.*\.)?lm_head\.linear\.(weight|bias)|layers\.\d+\.(linear\.(weight|bias)|wte\.weight)"  # Phi of 2023
)


def is_vocabulary(name: str) -> bool:
    """Whether the first dimension of the tensor of this name is the vocabulary."""
    if _OTHERS.fullmatch(name):
        return True
    return name.endswith((*EMBEDDINGS, *SHARED, *HEADS, *_BIASES)) and layer_of(name) is None


def vocabulary_rows(tensors: Mapping[str, Operand]) -> int | None:
    """The number of rows of a model's embedding: the largest, if it has several; None if none can be found."""
    found = [
        operand.shape[0]
        for name, operand in tensors.items()
        if len(operand.shape) == 2 and is_vocabulary(name) and not name.endswith((*HEADS, *_BIASES))
    ]
    return max(found, default=None)


def may_be_vocabulary(name: str, operand: Operand, rows: int | None) -> bool:
    """Whether a tensor that is not known by its name may have a row for each of the ``rows`` tokens of its model.

    Inside layers only embeddings and heads may: the sizes of other tensors can be the same by accident.
    """
    if layer_of(name) is not None and not name.endswith((*EMBEDDINGS, *HEADS)):
        return False
    shape = operand.shape
    return shape in ((rows,), (1, rows)) or (len(shape) == 2 and shape[0] == rows != shape[1])
