"""The memory that a merge takes beside inputs and outputs: for masks, and for sums over the lines of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from merge_engine.backends.operations import Line
from merge_engine.backends.statistics import lines_of_block, sum_block
from merge_engine.methods import Action, Gram, Method, Task
from merge_engine.planning.joint import JointTask


class Scratch:
    """Bytes that backends and answers need for the tensors of some recipes, whose methods these are, in order."""

    def __init__(self, methods: Sequence[Method]):
        self._methods = methods
        self._sums_lines = any(method.sums_lines for method in methods)

    def masks(self, task: JointTask, count: int) -> int:
        """Bytes of the masks of so many elements."""
        result = 0
        for recipe, each, _ in task.parts:
            if each.action is Action.MERGE:
                result += self._methods[recipe].scratch_bytes(len(each.models))
        return result * count

    def sums(self, task: JointTask, count: int) -> int:
        """Bytes of the sums of lines over the blocks of so many elements."""
        return sum(
            -(-8 * _pairs(each, need) * lines_of_block(line) * count // sum_block(line))
            for each, need, line in self.line_grams(task)
        )

    def lines(self, task: JointTask, count: int) -> int:
        """Bytes of the totals and coefficients of the lines of so many elements."""
        result = 0
        for each, need, line in self.line_grams(task):
            pairs, vectors = _pairs(each, need), _vectors(each, need)
            if line.stride > 1:
                result += 8 * (pairs + vectors) * line.stride
            else:  # a chunk has a copy of its coefficients
                result += 8 * (pairs + 2 * vectors) * -(-count // line.length)
        return result

    def line_grams(self, task: JointTask) -> Sequence[tuple[Task, Gram, Line]]:
        """The needs that each line of a tensor answers, the tasks that have them, and the lines."""
        result: list[tuple[Task, Gram, Line]] = []
        if not self._sums_lines:
            return result
        for recipe, each, _ in task.parts:
            method = self._methods[recipe]
            if method.sums_lines and each.action is Action.MERGE and each.count:
                needs = (need for need in method.needs(each) if isinstance(need, Gram))
                result += [(each, need, need.line) for need in needs if need.line is not None]
        return result


def _vectors(task: Task, need: Gram) -> int:
    return len(task.models) if need.of_deltas else len(task.inputs)


def _pairs(task: Task, need: Gram) -> int:
    vectors = _vectors(task, need)
    return vectors * (vectors + 1) // 2
