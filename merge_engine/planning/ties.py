"""Tensors that a model uses as one: its embedding, copies of it, and a head that is tied to it.

A tie is decided by the config, or by the bytes where the config says nothing. If all inputs tie two tensors, they are
one tensor of the merge: the output stores it once. Where the output's config does not say that they are tied, and the
reference stores both, the output stores both, with the same random draws and so with the same bytes. The embedding is
of the first slice and the head of the last: they are one only if both slices give them the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from merge_engine.fit import Remarks
from merge_engine.operands import same_bytes
from merge_engine.planning.inputs import Catalogue, Inputs, examples
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

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
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
BIASES = {"predictions.decoder.bias": "predictions.bias", "lm_head.decoder.bias": "lm_head.bias"}
"""The bias of a head in BERT and RoBERTa is stored under two names."""

_TIED = (*COPIES, *HEADS, *BIASES)
_FAMILY = (*EMBEDDINGS, *SHARED, *_TIED)


def may_be_tied(name: str) -> bool:
    """Whether the tensor of this name may be another one in some models."""
    return name.endswith(_TIED) and layer_of(name) is None


def is_vocabulary(name: str) -> bool:
    """Whether the first dimension of the tensor of this name is the vocabulary."""
    return name.endswith((*EMBEDDINGS, *SHARED, *HEADS)) and layer_of(name) is None


@dataclass
class Ties:
    """The ties of a merge.

    ``sources`` has the tensors of an input that stand for others, by the id of its catalogue and the name of the
    other. ``once`` are names that are not written, because another tensor is the same in all inputs. ``twins`` are
    written although another tensor is the same in all inputs, by name, with the name of the other. ``untied`` says
    that the output has a head of its own.
    """

    sources: dict[int, dict[str, str]]
    once: set[str] = field(default_factory=set)
    twins: dict[str, str] = field(default_factory=dict)
    untied: bool = False


def find_ties(slices: Sequence[Inputs], giver: Callable[[str], int], remarks: Remarks) -> Ties:
    """Decide which tensors of the inputs are the same.

    ``slices`` are the inputs of each slice with all their tensors; ``giver`` gives the number of the slice that a
    tensor outside of the layers comes from. Of a head and its embedding bytes are read if no config decides. Raises
    ``CheckpointError`` if that fails.
    """
    given = {id(catalogue): catalogue for inputs in slices for catalogue in inputs.merged()}
    ties = Ties({key: {} for key in given})
    vocabularies = {key: _Vocabulary(catalogue) for key, catalogue in given.items()}
    names = dict.fromkeys(name for each in vocabularies.values() for name in each.aliases)
    stored_once = []
    for name in names:
        inputs = slices[giver(name)]
        merged = inputs.merged()
        shape = next((c.tensors[name].shape for c in merged if name in c.tensors), None)
        partners = [vocabularies[id(c)].partner(name, shape) for c in merged]
        same = next((partner for partner in partners if partner is not None), None)
        if same is None or any(partner not in (None, same) for partner in partners):
            continue
        _warn_of_unused(name, same, merged, remarks)
        others = slices[giver(same)].merged()
        tied = [_is_tied(name, same, catalogue) for catalogue in merged]
        own = [c for c, one in zip(merged, tied, strict=True) if not one and name in c.tensors]
        alike = _are_alike(same, merged, others) or (
            all(tied) and all(_is_tied(name, same, catalogue) for catalogue in others)
        )
        if alike and all(same in c.tensors and same_bytes(c.tensors[name], c.tensors[same]) for c in own):
            if _is_written(name, inputs.reference):
                ties.twins[name] = same
            else:
                ties.once.add(name)
                stored_once.append(f"{name} as {same}")
        else:
            for catalogue, one in zip(merged, tied, strict=True):
                if one:
                    ties.sources[id(catalogue)][name] = same
            if name.endswith(HEADS):
                ties.untied |= any(tied) or not alike or any(c.tied is False for c in merged)
    if stored_once:
        remarks.notes.append(f"the same tensor in all inputs, so written once: {examples(stored_once)}")
    _note_head(slices, giver, list(given.values()), remarks)
    return ties


def _are_alike(name: str, some: Sequence[Catalogue], others: Sequence[Catalogue]) -> bool:
    """Whether the tensor of this name is merged from the same inputs, or copied from one with the same bytes."""
    if list(map(id, some)) == list(map(id, others)):
        return True
    held = [catalogue.tensors.get(name) for catalogue in (*some, *others)]
    if len(held) != 2 or held[0] is None or held[1] is None:
        return False
    return held[0].shape == held[1].shape and same_bytes(held[0], held[1])


def _note_head(
    slices: Sequence[Inputs], giver: Callable[[str], int], given: Sequence[Catalogue], remarks: Remarks
) -> None:
    """Say whose embedding is the head, if all models tie theirs and the last slice is not made as the first is."""
    if not all(catalogue.tied for catalogue in given):
        return
    names = [n for n in given[0].tensors if n.endswith((*EMBEDDINGS, *SHARED)) and layer_of(n) is None]
    first, last = slices[giver(names[0]) if names else 0].merged(), slices[giver(HEADS[0])].merged()
    if names and not _are_alike(names[0], first, last):
        remarks.notes.append(
            f"the models use their embedding as the head, so the output's head is the embedding of the first slice "
            f"({', '.join(catalogue.label for catalogue in first)}), although its last layers are of another"
        )


class _Vocabulary:
    """The tensors of one input that may be the same: its embeddings, and by name those that may be tied to one."""

    def __init__(self, catalogue: Catalogue):
        names = [name for name in catalogue.tensors if name.endswith(_FAMILY) and layer_of(name) is None]
        self.aliases = [name for name in names if name.endswith(_TIED)]
        self._tensors = catalogue.tensors
        self._shared = [name for name in names if name.endswith(SHARED)]
        self._embeddings = self._shared or [name for name in names if name.endswith(EMBEDDINGS)]

    def partner(self, name: str, shape: tuple[int, ...] | None) -> str | None:
        """The tensor that ``name``, of this shape if it is known, may be tied to.

        None if this input has none, or several.
        """
        siblings = [name.removesuffix(end) + other for end, other in BIASES.items() if name.endswith(end)]
        embeddings = self._embeddings if name.endswith(HEADS) else self._shared
        candidates = [
            other
            for other in siblings or embeddings
            if other in self._tensors and shape in (None, self._tensors[other].shape)
        ]
        near = [_in_common(name, other) for other in candidates]
        nearest = [other for other, parts in zip(candidates, near, strict=True) if parts == max(near)]
        return nearest[0] if len(nearest) == 1 else None


def _in_common(one: str, other: str) -> int:
    """How many parts two names have in common at their start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)


def _is_tied(name: str, same: str, catalogue: Catalogue) -> bool:
    """Whether this input uses the tensor ``same`` as ``name``, as its config says or for want of the other."""
    if same not in catalogue.tensors:
        return False
    if name.endswith(HEADS) and catalogue.tied is not None:
        return catalogue.tied
    return name not in catalogue.tensors


def _is_written(name: str, reference: Catalogue | None) -> bool:
    """Whether the output stores a tensor that is the same as another in all inputs."""
    if reference is None or name not in reference.tensors:
        return False
    return not (name.endswith(HEADS) and reference.tied is True)


def _warn_of_unused(name: str, same: str, merged: Sequence[Catalogue], remarks: Remarks) -> None:
    """Warn of heads that a config ties away although they differ from the embedding."""
    for catalogue in merged:
        tensors = catalogue.tensors
        if not (catalogue.tied and name.endswith(HEADS) and name in tensors and same in tensors):
            continue
        if not same_bytes(tensors[name], tensors[same], sampled=True):
            remarks.warnings.append(
                f"{catalogue.label}: its config ties {name} to {same}, so the stored {name} is not used, although it "
                "differs; set tie_word_embeddings to false in its config.json if it has a head of its own"
            )
