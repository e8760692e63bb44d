"""Inputs with the same tensors, byte for byte: a model that adds nothing, or that counts twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_engine.checkpoint import Checkpoint
from merge_engine.fit.candidate import Candidate
from merge_engine.fit.findings import Findings
from merge_engine.operands import Operand
from merge_engine.storage import OpenFiles

_SMALL = 16 << 20
"""Models of at most so many bytes are compared whole."""

_PLACES = 256
"""Larger ones are compared in so many tensors, in one place each."""

_PLACE_BITS = 8 * 4096
_GROUP = 64  # elements: those of any type fill whole bytes


def check_identical(
    base: Candidate | None, merged: Sequence[Candidate], findings: Findings
) -> list[Candidate]:
    """Warn of models that have the same tensors as the base or as a model before them.

    Returns those whose tensors are certainly the base's.
    """
    copies = []
    with OpenFiles() as files:
        distinct: list[Candidate] = []
        for each in merged:
            for other in distinct:
                if (places := _compare(each.checkpoint, other.checkpoint, files)) is not None:
                    what = "adds nothing" if other is base else "counts twice"
                    findings.warnings.append(f"{each.label}: {_equal(other.label, places)}; it {what}")
                    if other is base and not places:
                        copies.append(each)
                    break
            else:
                distinct.append(each)
    return copies


def idle_models(models: Mapping[int, str], kept: Mapping[int, int]) -> list[str]:
    """Warnings after a merge of task vectors: the models of which no entry was kept, in any tensor.

    ``models`` are names and ``kept`` numbers of entries, by recipe position.
    """
    return [
        f"{models[i]}: no entry of its task vector was kept, so it adds nothing; its weights are those of the base, "
        "or its density is too low"
        for i, entries in kept.items()
        if not entries
    ]


def _equal(label: str, places: int) -> str:
    where = f" in all {places} places that were compared" if places else ", byte for byte"
    return f"its tensors are those of {label}{where}"


def _compare(one: Checkpoint, other: Checkpoint, files: OpenFiles) -> int | None:
    """The number of places in which the tensors were compared, 0 for all bytes; None if they differ."""
    if not _alike(one, other):
        return None
    names = [name for name, operand in one.tensors.items() if operand.count]
    whole = sum(_nbytes(one.tensors[name]) for name in names) <= _SMALL
    chosen = names if whole else [names[i * (len(names) - 1) // (_PLACES - 1)] for i in range(_PLACES)]
    for name in dict.fromkeys(chosen):
        pair = one.tensors[name], other.tensors[name]
        start, count = (0, pair[0].count) if whole else _place(pair[0])
        if not all(each.reads_parts for each in pair):
            return None
        if _bytes(pair[0], start, count, files) != _bytes(pair[1], start, count, files):
            return None
    return 0 if whole else len(set(chosen))


def _nbytes(operand: Operand) -> int:
    return operand.count * operand.dtype.bits // 8


def _alike(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether names, types and shapes of all tensors are the same."""
    if [digest for _, digest in one.contents] == [digest for _, digest in other.contents]:
        return True
    return one.tensors.keys() == other.tensors.keys() and all(
        (operand.dtype, operand.shape) == (other.tensors[name].dtype, other.tensors[name].shape)
        for name, operand in one.tensors.items()
    )


def _place(operand: Operand) -> tuple[int, int]:
    """First element and number of elements of a place in the middle of a tensor."""
    start = operand.count // 2 // _GROUP * _GROUP
    count = _PLACE_BITS // operand.dtype.bits // _GROUP * _GROUP
    return start, min(count, operand.count - start)


def _bytes(operand: Operand, start: int, count: int, files: OpenFiles) -> bytearray:
    data = bytearray(count * operand.dtype.bits // 8)
    operand.read_into(memoryview(data), start, files)
    return data
