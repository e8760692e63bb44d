"""A scorer that runs tasks of EleutherAI's lm-evaluation-harness on each merge. It needs the extra ``lm-eval``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from merge_engine.errors import OptionError, SearchError
from merge_engine.text import shown, some

if TYPE_CHECKING:
    from merge_engine.session import Merge

T = TypeVar("T")


class LmEval:
    """Scores merges with tasks of the harness: a metric for each task, with the standard error that the harness gives.

    The model is built once, and each merge is written into it. Use the object as ``evaluate`` of ``search``, with its
    ``directions``.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        model: str | Path,
        *,
        limit: int | None = None,
        batch_size: int = 8,
        device: str | None = None,
        include_path: str | Path | None = None,
    ):
        """``tasks``: names of tasks or groups, each with another metric than its first as ``arc_easy:acc_norm``.

        ``model``: a folder, or a name on the hub, with config, tokenizer and weights of the shape of the merges.
        ``limit``: items of each task, by default all. ``batch_size``: items in a batch. ``device``: that of the model,
        by default a GPU if there is one. ``include_path``: a folder with tasks of your own.

        Raises ``SearchError`` if the harness is not installed, or a task or the model cannot be loaded, and
        ``OptionError`` for tasks and metrics that do not exist.
        """
        try:
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SearchError(
                f'lm-evaluation-harness cannot be loaded ({error}); run: pip install "merge_engine[lm-eval]"'
            ) from None
        named = dict(_task_and_metric(task) for task in tasks)
        manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
        if unknown := [name for name in named if name not in manager.all_tasks]:
            raise OptionError(
                f"tasks: the harness has no task {some(unknown)}; `lm-eval ls tasks` lists them"
            )
        self._tasks: Any = _or_error("the tasks", lambda: manager.load(list(named)))
        self._metrics = {name: _metric(name, metric, self._tasks) for name, metric in named.items()}
        self.directions = {
            name: "maximize" if _first(name, self._tasks).higher_is_better()[metric] else "minimize"
            for name, metric in self._metrics.items()
        }
        for task in self._tasks["tasks"].values():  # what the harness's command does
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        self._model, tokenizer = _or_error(f"the model {model}", lambda: _model_and_tokenizer(model, device))
        self._harness = HFLM(pretrained=self._model, tokenizer=tokenizer, batch_size=batch_size)
        self._evaluate = evaluate
        self._limit = limit

    def __call__(self, merge: Merge) -> dict[str, tuple[float, float | None]]:
        """The metric and its standard error by task. Raises ``SearchError`` if the harness gives no such metric."""
        merge.into(self._model)
        found = self._evaluate(lm=self._harness, task_dict=self._tasks, limit=self._limit, log_samples=False)[
            "results"
        ]
        return {name: _score(found[name], name, metric) for name, metric in self._metrics.items()}


_SEED = 1234
"""The harness's own seed for the examples in a prompt."""


def _task_and_metric(text: str) -> tuple[str, str]:
    name, _, metric = text.strip().partition(":")
    return name, metric


def _first(name: str, tasks: Mapping[str, Any]) -> Any:
    """The task of this name, or the first of the group. Raises ``OptionError`` for a tag."""
    if name in tasks["tasks"]:
        return tasks["tasks"][name]
    if name not in tasks["groups"]:
        raise OptionError(f"tasks: {name} stands for several tasks without a common score; name one of them")
    return tasks["groups"][name].get_all_tasks()[0]


def _metric(name: str, metric: str, tasks: Mapping[str, Any]) -> str:
    """The metric of a task: the one that was asked for, or else the task's first."""
    known = list(_first(name, tasks).higher_is_better())
    if metric and metric not in known:
        raise OptionError(f"tasks: {name} has no metric {shown(metric)}; it has {some(known)}")
    return metric or known[0]


def _model_and_tokenizer(model: str | Path, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    built: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return built.to(place).eval(), AutoTokenizer.from_pretrained(model)


def _or_error(what: str, load: Callable[[], T]) -> T:
    """What ``load`` returns. It may look on the hub, and run code of tasks, so it may raise anything."""
    try:
        return load()
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise SearchError(f"{what} cannot be loaded: {type(error).__name__}: {said}") from error


def _score(found: Mapping[str, Any], name: str, metric: str) -> tuple[float, float | None]:
    """The harness's keys are ``METRIC,FILTER`` and ``METRIC_stderr,FILTER``; the first filter counts."""
    filters = [key.removeprefix(f"{metric},") for key in found if key.startswith(f"{metric},")]
    if not filters:
        raise SearchError(f"{name}: the harness gives no {metric} for it; it gives {some(list(found))}")
    error = found.get(f"{metric}_stderr,{filters[0]}")
    return found[f"{metric},{filters[0]}"], error if isinstance(error, float) else None
