"""The tensors of a module that a merge is written into: names, ties and memory must fit before anything is written."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from merge_engine.dtypes import of_torch
from merge_engine.errors import OptionError, PlanError
from merge_engine.methods import Task
from merge_engine.operands import InMemory
from merge_engine.planning import MergePlan, is_buffer, may_be_tied
from merge_engine.tensors import plain
from merge_engine.text import some

if TYPE_CHECKING:
    import torch

    Given: TypeAlias = "torch.nn.Module | Mapping[str, torch.Tensor]"


def match(given: Given, plan: MergePlan, inputs: set[int]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensor that each merged tensor is written to, by its name in the merge, and notes for the user.

    ``inputs`` are the addresses of the inputs' memory. A tensor that the module knows under several names is written
    once. Raises ``OptionError`` for what is neither module nor mapping, and ``PlanError`` with everything that does not
    fit.
    """
    found = _Match(_tensors_of(given), {task.name: task for task in plan.tasks})
    found.rename()
    found.find_shared()
    found.compare_names()
    found.compare_tensors(inputs)
    if found.problems:
        raise PlanError(found.problems)
    return {name: found.tensors[found.place[name]] for name in found.written}, found.notes


def _tensors_of(given: Given) -> dict[str, Any]:
    import torch

    if isinstance(given, torch.nn.Module):
        return dict(given.state_dict(keep_vars=True))
    if isinstance(given, Mapping):
        return dict(given)
    raise OptionError(
        f"target: must be a module of torch or a mapping of names to tensors, not {reprlib.repr(given)}"
    )


@dataclass
class _Match:
    """Tensors that are given, tasks by name, and what is found: ``place`` has the given name for each merged one.

    ``written`` are the names of the merged tensors that are written.
    """

    given: dict[str, Any]
    tasks: Mapping[str, Task]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    _same_as: dict[str, str] = field(default_factory=dict)  # the first given name of the same memory

    def __post_init__(self) -> None:
        without_values: dict[str, list[str]] = {}
        for name, value in self.given.items():
            try:
                self.tensors[name] = plain(value)
            except ValueError as error:
                without_values.setdefault(str(error), []).append(name)
        for reason, names in without_values.items():
            them = "it" if len(names) == 1 else "them"
            self.problems.append(f"{some(names)}: the target has {them} {reason}")

    def rename(self) -> None:
        """Match names: as they are, or by one prefix that only one side has, such as ``model.``."""
        needed = [name for name, tensor in self.tensors.items() if not _computed_anew(name, tensor)]
        prefix = _prefix(needed, self.tasks)
        if prefix is not None:  # the target is the model without its head
            self.place = {name: name.removeprefix(prefix) for name in self.tasks if name.startswith(prefix)}
            outside = [name for name in self.tasks if not name.startswith(prefix)]
            if outside:
                self.notes.append(
                    f"the target has no place for {some(outside)}, which the merge has beside it"
                )
            return
        self.place = {name: name for name in self.tasks}
        prefix = _prefix(
            [name for name, task in self.tasks.items() if not is_buffer(name, task.inputs[0])], self.tensors
        )
        if prefix is not None:
            self.place = {name: prefix + name for name in self.tasks}

    def find_shared(self) -> None:
        """Find names of the same memory, and tensors that share only a part of it."""
        seen: dict[object, str] = {}
        spans: list[tuple[int, int, str]] = []
        for name, tensor in self.tensors.items():
            if not tensor.numel():
                continue
            memory = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            first = seen.setdefault(memory, name)
            if first != name:
                self._same_as[name] = first
                continue
            start, end, overlaps = _span(tensor)
            if overlaps:
                self.problems.append(
                    f"{name}: several elements of the target are one; give it memory of its own"
                )
            spans.append((start, end, name))
        spans.sort()
        for (_, end, name), (start, _, following) in pairwise(spans):  # addresses of devices differ
            if start < end:
                self.problems.append(f"{following}: shares a part of its memory with {name}; give it its own")

    def compare_names(self) -> None:
        """Collect the names that only one side has, and ties that only one side has."""
        unexpected: list[str] = []
        by_memory: dict[str, str] = {}
        for name, place in self.place.items():
            task = self.tasks[name]
            if place not in self.tensors:
                if not is_buffer(name, task.inputs[0]) and place not in self.given:
                    unexpected.append(name)
                continue
            memory = self._same_as.get(place, place)
            before = by_memory.setdefault(memory, name)
            if before == name:
                self.written.append(name)
            elif before not in (task.drawn_as, name) and self.tasks[before].drawn_as != name:
                self.problems.append(
                    f"{place}: the target ties it to {self.place[before]}, but in the merge they differ; untie them, "
                    "such as by tie_word_embeddings: false in its config"
                )
        filled = {self._same_as.get(place, place) for place in self.place.values()}
        missing = [
            name
            for name, tensor in self.tensors.items()
            if self._same_as.get(name, name) not in filled and not _computed_anew(name, tensor)
        ]
        if wrapped := [name for name in missing if ".base_layer." in name]:
            self.problems.append(
                f"{some(wrapped)}: the target has adapters of peft in it; merge into it before they are added, or "
                "after its unload()"
            )
            return
        tied = [name for name in missing if may_be_tied(name) and not unexpected]
        if tied:
            self.problems.append(
                f"{some(tied)}: the merge has no tensor of its own for it, since all inputs tie it to another; tie it "
                "in the target as well, such as by tie_word_embeddings: true in its config"
            )
        if untied := [name for name in missing if name not in tied]:
            self.problems.append(f"the merge has no {some(untied)}, which the target has")
        if unexpected:
            self.problems.append(f"the target has no {some(unexpected)}, which the merge has")

    def compare_tensors(self, inputs: Collection[int]) -> None:
        """Collect tensors that cannot take the values, or that are inputs."""
        shapes, dtypes, aliases = [], [], []
        for name in self.written:
            task, place = self.tasks[name], self.place[name]
            tensor = self.tensors[place]
            same = f"torch.{task.out.name}" == str(tensor.dtype)
            if tuple(tensor.shape) != task.shape:
                shapes.append(f"{place} ({list(tensor.shape)}, the merge {list(task.shape)})")
            elif not same and not (task.out.mergeable and tensor.is_floating_point()):
                dtypes.append(f"{place} ({tensor.dtype}, the merge {task.out})")
            if tensor.numel() and tensor.untyped_storage().data_ptr() in inputs:
                aliases.append(place)
        if shapes:
            self.problems.append(f"the target has other shapes: {some(shapes)}")
        if dtypes:
            self.problems.append(f"the target has types that cannot take the values: {some(dtypes)}")
        if aliases:
            self.problems.append(
                f"{some(aliases)}: the target is the memory of an input, which the next merge needs; give a copy of it"
            )


def _computed_anew(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a buffer that its module computes from its config."""
    dtype = of_torch(tensor.dtype)
    return dtype is not None and is_buffer(name, InMemory(name, tensor, dtype, tuple(tensor.shape), ""))


def _prefix(shorter: Collection[str], longer: Collection[str]) -> str | None:
    """What all of the shorter names lack to be among the longer ones, as whole parts; None without it."""
    if not shorter or all(name in longer for name in shorter):
        return None
    first = next(iter(shorter))
    for name in longer:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            if all(prefix + each in longer for each in shorter):
                return prefix
    return None


def _span(tensor: torch.Tensor) -> tuple[int, int, bool]:
    """The first address of a tensor, the one behind its last, and whether elements share one."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    overlaps = any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size(), overlaps
