"""A scorer that runs tasks of EleutherAI's lm-evaluation-harness on each merge. It needs the extra ``lm-eval``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.errors import OptionError, SearchError
from merge_engine.text import shown, some

if TYPE_CHECKING:
    from merge_engine.session import Merge


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

        Raises ``SearchError`` if the harness is not installed, and ``OptionError`` for tasks and metrics that do not
        exist.
        """
        try:
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager, get_task_dict
        except ImportError as error:
            raise SearchError(
                f'lm-evaluation-harness cannot be loaded ({error}); run: pip install "merge_engine[lm-eval]"'
            ) from None
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        named = dict(_task_and_metric(task) for task in tasks)
        manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
        if unknown := [name for name in named if name not in manager.all_tasks]:
            raise OptionError(
                f"tasks: the harness has no task {some(unknown)}; `lm-eval ls tasks` lists them"
            )
        self._tasks = get_task_dict(list(named), manager)
        self._metrics, self.directions = {}, {}
        loaded = {_name_of(key): list(_leaves({key: value})) for key, value in self._tasks.items()}
        for name, metric in named.items():
            if name not in loaded:
                raise OptionError(
                    f"tasks: {name} stands for several tasks without a common score; name one of them"
                )
            better: Mapping[str, bool] = loaded[name][0].higher_is_better()
            chosen = metric or next(iter(better))
            if chosen not in better:
                raise OptionError(f"tasks: {name} has no metric {shown(chosen)}; it has {some(list(better))}")
            self._metrics[name] = chosen
            self.directions[name] = "maximize" if better[chosen] else "minimize"
        for task in (task for leaves in loaded.values() for task in leaves):
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        built: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self._model = built.to(place).eval()
        self._harness = HFLM(
            pretrained=self._model, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=batch_size
        )
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


def _name_of(key: Any) -> str:
    """The name of a task or a group: a key of the harness's map of tasks."""
    return key if isinstance(key, str) else str(key.group_name)


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    """The tasks in a map of tasks and groups of them."""
    for value in tasks.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value


def _score(found: Mapping[str, Any], name: str, metric: str) -> tuple[float, float | None]:
    """The harness's keys are ``METRIC,FILTER`` and ``METRIC_stderr,FILTER``; the first filter counts."""
    filters = [key.removeprefix(f"{metric},") for key in found if key.startswith(f"{metric},")]
    if not filters:
        raise SearchError(f"{name}: the harness gives no {metric} for it; it gives {some(list(found))}")
    error = found.get(f"{metric}_stderr,{filters[0]}")
    return found[f"{metric},{filters[0]}"], error if isinstance(error, float) else None
