"""Merge methods: each says what it needs to know of a tensor, and which operation follows."""

from merge_engine.methods.base import Answers, Method, Operation
from merge_engine.methods.needs import Gram, KeyRanks, MaskedL1, Need, Place, TiePlaces, Together
from merge_engine.methods.registry import METHODS, find_method, register
from merge_engine.methods.task import Action, Task

__all__ = [
    "METHODS",
    "Action",
    "Answers",
    "Gram",
    "KeyRanks",
    "MaskedL1",
    "Method",
    "Need",
    "Operation",
    "Place",
    "Task",
    "TiePlaces",
    "Together",
    "find_method",
    "register",
]
