"""The inputs of a merge with their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_engine.checkpoint import Checkpoint
from merge_engine.errors import CheckpointError
from merge_engine.fit import Remarks
from merge_engine.recipe import ModelReference
from merge_engine.vocabulary.names import vocabulary_rows
from merge_engine.vocabulary.settings import stated_size
from merge_engine.vocabulary.tokenizer import TOKENIZER_JSON, Tokenizer, read_tokenizer, some_tokens


@dataclass(frozen=True, eq=False)
class Input:
    """A model with its tokenizer: as it is in the files, and without tokens for which the model has no row."""

    label: str
    checkpoint: Checkpoint
    rows: int
    in_files: Tokenizer
    tokenizer: Tokenizer

    @property
    def rows_tell(self) -> bool:
        """Whether a tensor with so many rows has one for each token: not if the hidden states have that size too."""
        tensors = self.checkpoint.tensors.values()
        return all(operand.shape[1] != self.rows for operand in tensors if len(operand.shape) == 2)


def read_inputs(
    opened: Mapping[ModelReference, Checkpoint], donor: ModelReference, remarks: Remarks
) -> dict[str, Input]:
    """The inputs by their labels, the donor first. Raises ``CheckpointError`` with all problems at once."""
    found: dict[str, Input] = {}
    seen: set[str] = set()
    problems: list[str] = []
    for reference in dict.fromkeys([donor, *opened]):
        checkpoint = opened[reference]
        if checkpoint.label in seen:
            continue
        seen.add(checkpoint.label)
        first = next(iter(found.values()), None)
        try:
            found[checkpoint.label] = _read_input(str(reference), checkpoint, first, remarks)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    return found


def _read_input(label: str, checkpoint: Checkpoint, donor: Input | None, remarks: Remarks) -> Input:
    rows = vocabulary_rows(checkpoint.tensors) or stated_size(checkpoint.config)
    if rows is None:
        raise CheckpointError(
            f"{checkpoint.path}: none of its tensors has the name of an embedding, and its config.json has no "
            "vocab_size, so rows cannot be brought together by tokens"
        )
    try:
        tokenizer = read_tokenizer(checkpoint.folder)
    except CheckpointError as error:
        if donor is None or donor.rows != rows or (checkpoint.folder / TOKENIZER_JSON).exists():
            raise
        remarks.warnings.append(
            f"{error}; it has as many rows as {donor.label}, whose tokenizer is taken for its own"
        )
        tokenizer = donor.in_files
    stripped = tokenizer.without(rows)
    if stripped is not tokenizer:
        beyond = [token for token, i in tokenizer.ids.items() if i >= rows]
        remarks.warnings.append(
            f"tokenizer: {label} has {rows:,} rows, so these tokens of its tokenizer have none and are left out: "
            f"{some_tokens(beyond)}"
        )
    return Input(label, checkpoint, rows, tokenizer, stripped)


def compare(donor: Input, inputs: Sequence[Input], remarks: Remarks) -> None:
    """Refuse tokenizers of different kinds, unless they are allowed: few of their tokens mean the same."""
    for each in inputs:
        one, other = donor.tokenizer, each.tokenizer
        shared = len(one.ids.keys() & other.ids.keys())
        smaller = min(len(one.ids), len(other.ids))
        if one.kind != other.kind:
            line = (
                f"those of {donor.label} and {each.label} are of different kinds, {one.kind} and {other.kind}"
            )
        elif 2 * shared < smaller:
            line = f"{donor.label} and {each.label} share only {shared:,} of {smaller:,} tokens"
        else:
            continue
        remarks.misfit("tokenizer", f"tokenizer: {line}, so few rows of their embeddings belong together")
