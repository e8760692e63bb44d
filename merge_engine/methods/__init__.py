"""Merge methods: each names the needs of a tensor, and turns the answers into an operation."""

from merge_engine.methods.base import Answers, Method, Operation
from merge_engine.methods.needs import Gram, KeyRanks, MaskedL1, Need, Place, TiePlaces, Together
from merge_engine.methods.registry import METHODS, find_method, parameter_names, register
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
    "parameter_names",
    "register",
]
