"""The interface of what makes the vocabularies of all inputs one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.fit import Remarks
from merge_engine.operands import Operand


class Alignment(ABC):
    """What a merge does with vocabularies that differ.

    ``written`` are files of the output by name, ``dropped`` those of the donor that the output lacks. ``remarks`` are
    complete when all tensors are aligned.
    """

    remarks: Remarks
    written: Mapping[str, bytes]
    dropped: frozenset[str] = frozenset()

    @abstractmethod
    def align(
        self, name: str, operands: Sequence[Operand], labels: Sequence[str], has_base: bool
    ) -> list[Operand]:
        """The operands of a tensor with the rows of the output, the base's first if ``has_base``.

        ``labels`` are those of the checkpoints that they are of.
        """

    @abstractmethod
    def finish(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the output, from the donor's, when all tensors are aligned; completes the remarks."""


def alignable(operands: Sequence[Operand]) -> bool:
    """Whether tensors differ at most in the number of rows, and can be merged."""
    first = operands[0]
    return (
        bool(first.shape)
        and all(
            operand.dtype.mergeable and operand.shape[1:] == first.shape[1:] and operand.shape[:1] != (0,)
            for operand in operands
            if operand.shape
        )
        and all(operand.shape for operand in operands)
    )
