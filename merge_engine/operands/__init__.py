"""Operands, the inputs of a method: tensors in files or in memory."""

from merge_engine.operands.base import Access, Operand
from merge_engine.operands.comparing import same_bytes
from merge_engine.operands.in_memory import InMemory
from merge_engine.operands.low_rank import LowRank
from merge_engine.operands.pieces import Joined, Part
from merge_engine.operands.stored import Stored, Unwritten

__all__ = ["Access", "InMemory", "Joined", "LowRank", "Operand", "Part", "Stored", "Unwritten", "same_bytes"]
