"""Operands that are torch tensors in memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_engine.dtypes import DType, of_torch
from merge_engine.errors import PlanError
from merge_engine.operands.base import Access, Operand
from merge_engine.storage import ByteRange
from merge_engine.tensors import plain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class InMemory(Operand):
    """A torch tensor with any strides, on any device. ``owner`` names the model that it belongs to.

    ``origin`` names what it was read from, if that was a file.
    """

    name: str
    tensor: torch.Tensor
    dtype: DType
    shape: tuple[int, ...]
    owner: str
    origin: str = ""

    @classmethod
    def of(cls, name: str, given: object, owner: str) -> InMemory:
        """The operand for a tensor, without its autograd graph.

        Raises ``PlanError`` for what is no tensor with values in memory, or has a dtype that no checkpoint holds.
        """
        try:
            tensor = plain(given)
        except ValueError as error:
            raise PlanError(f"{name}: {owner} has it {error}") from None
        dtype = of_torch(tensor.dtype)
        if dtype is None:
            raise PlanError(
                f"{name}: {owner} has it as {tensor.dtype}, which no checkpoint can hold; convert it first"
            )
        return cls(name, tensor, dtype, tuple(tensor.shape), owner)

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return self.origin or f"{self.name}: {self.owner}"

    @property
    def stored_bytes(self) -> int:
        """Nothing is read."""
        return 0

    def flat(self) -> torch.Tensor:
        """The elements in row-major order, of shape [count]: a view, or a copy of a tensor with another layout."""
        return self.tensor.contiguous().view(-1)

    def same_bytes(self, other: InMemory) -> bool:
        """Whether two tensors of one dtype and shape hold the same bytes."""
        import torch

        if not self.count:
            return True
        return torch.equal(self.flat().view(torch.uint8), other.flat().view(torch.uint8))

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``. Elements on a device are copied to the host's memory."""
        return _Resident(self.flat()[start : start + count].cpu())

    def maps(self, access: Access) -> bool:
        """See ``Operand.maps``."""
        return access.in_place


class _Resident(ByteRange):
    """The bytes of elements in host memory, used in place."""

    length = room = 0

    def __init__(self, elements: torch.Tensor):
        self._elements = elements  # keeps them alive

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        nbytes = self._elements.numel() * self._elements.element_size()
        if not nbytes:
            return memoryview(b"")
        there = (ctypes.c_char * nbytes).from_address(self._elements.data_ptr())
        there.elements = self._elements  # type: ignore[attr-defined]  # which the view so keeps alive
        return memoryview(there).cast("B")

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
