"""mergekit's own entry points, served by the engine.

Three places of mergekit are replaced, and put back by ``uninstall``:

- ``mergekit.merge.run_merge``, wherever it was imported to: checkpoints are merged by the engine's own run;
- ``MergeMethod._execute_resolved``, through which every merge of tensors goes: ``merge_tensors``,
  ``merge_state_dicts``, a method that is called, and the task graph behind mergekit's other commands. mergekit has
  checked and bound the arguments by then, so its errors stay its own;
- the kernels of the methods that mergekit packs into batches, for those who call them directly.

What the engine does not do, such as methods that users registered in mergekit, is left to mergekit's code, with a
warning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from merge_engine.dtypes import MERGEABLE
from merge_engine.errors import BackendError, RecipeError
from merge_engine.integrations.mergekit.gradients import NoGradientsError
from merge_engine.integrations.mergekit.merging import merge_one
from merge_engine.integrations.mergekit.running import run_merge
from merge_engine.integrations.mergekit.tally import Tally
from merge_engine.methods import find_method

_FLOATS = frozenset(getattr(torch, dtype.name) for dtype in MERGEABLE)
_DEVICES = ("cpu", "cuda")
_undo: list[Callable[[], None]] = []
_tally = Tally()


def install() -> Tally:
    """Have mergekit's entry points served by the engine, and return what is counted from now on.

    Raises ``BackendError`` if mergekit is not installed or has another interface than 0.1.5. If it is served already,
    nothing changes.
    """
    global _tally
    if _undo:
        return _tally
    try:
        import mergekit.merge
        from mergekit.merge_methods import BatchedMergeMethod, MergeMethod, registered_methods
    except ImportError as error:
        raise BackendError(
            f"mergekit cannot be served: {error}; install mergekit 0.1.5, or call the functions of this module"
        ) from error
    _tally = tally = Tally()
    own = {id(method): method for method in registered_methods() if _is_of_mergekit(method)}
    for method in own.values():
        if isinstance(method, BatchedMergeMethod) and _is_known(method.spec.name):
            _replace(method, "implementation", partial(_merge_batch, tally, method, method.implementation))
    kernels = {key: getattr(method, "implementation", None) for key, method in own.items()}

    def execute(method: Any, groups: Any, parameters: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        groups = tuple(groups)
        reason = (
            _not_ours(method, groups, options)
            if id(method) in own and kernels[id(method)] is getattr(method, "implementation", None)
            else f"{method.spec.name} with a kernel of the user"
        )
        if reason is None:
            try:
                return _merge_groups(tally, method, groups, parameters, options)
            except NoGradientsError:
                reason = f"gradients of {method.spec.name}"
        if reason:
            tally.hand_over(reason)
        return tuple(originals(method, groups, parameters, **options))

    originals = MergeMethod._execute_resolved
    _replace(MergeMethod, "_execute_resolved", execute)
    runs = mergekit.merge.run_merge
    serve = partial(_run_merge, tally, runs)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mergekit" and getattr(module, "run_merge", None) is runs:
            _replace(module, "run_merge", serve)
    return tally


def uninstall() -> None:
    """Put mergekit's own code back. Names that were imported from mergekit while it was served stay as they are."""
    while _undo:
        _undo.pop()()


@contextmanager
def installed() -> Iterator[Tally]:
    """``install`` for the length of a ``with`` block. Yields what is counted."""
    before = bool(_undo)
    try:
        yield install()
    finally:
        if not before:
            uninstall()


def _replace(owner: Any, name: str, value: object) -> None:
    before = getattr(owner, name)
    _undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def _is_of_mergekit(method: Any) -> bool:
    code = getattr(method, "implementation", None) or type(method)
    return str(code.__module__).partition(".")[0] == "mergekit"


def _is_known(name: str) -> bool:
    try:
        find_method(name)
    except RecipeError:
        return False
    return True


def _not_ours(method: Any, groups: Sequence[Any], options: Any) -> str | None:
    """The reason why mergekit computes these groups; "" if nothing is computed, and None if the engine does."""
    name = method.spec.name
    if not _is_known(name):
        return f"merge_engine has no method {name}"
    tensors = [tensor for group in groups for tensor in group.tensors]
    asked = {dtype for dtype in (options.get("dtype"), options.get("out_dtype")) if dtype is not None}
    for dtype in (*(tensor.dtype for tensor in tensors), *asked):
        if dtype not in _FLOATS:
            return f"tensors of {dtype}"
    for tensor in tensors:
        if tensor.device.type not in _DEVICES:
            return f"tensors on the device {tensor.device.type}"
    return None if all(group.entries for group in groups) else ""


def _merge_groups(
    tally: Tally, method: Any, groups: Sequence[Any], parameters: Sequence[Any], options: Any
) -> tuple[torch.Tensor, ...]:
    merged = []
    for group, values in zip(groups, parameters, strict=True):
        base = group.base if find_method(method.spec.name).uses_base else None
        models = group.entries if base is None else group.non_base
        given = {
            each.name: [values[each.name][entry.id] for entry in models]
            if each.scope.value != "shared"
            else values[each.name]
            for each in method.spec.parameters
        }
        merged.append(
            _counted(
                tally,
                method.spec.name,
                None if base is None else base.tensor,
                [entry.tensor for entry in models],
                given,
                group.metadata.name,
                options.get("dtype"),
                options.get("out_dtype"),
            )
        )
    return tuple(merged)


def _merge_batch(tally: Tally, method: Any, kernel: Any, batch: Any, **given: Any) -> torch.Tensor:
    """Serve a kernel: ``batch.tensors`` has, for each input, tensors of one shape along a new first dimension."""
    name = method.spec.name
    first = batch.tensors[0]
    if first.dtype not in _FLOATS or first.device.type not in _DEVICES:
        tally.hand_over(f"tensors of {first.dtype} on the device {first.device.type}")
        merged: torch.Tensor = kernel(batch, **given)
        return merged
    base = batch.base_index if find_method(name).uses_base else None
    rows = []
    for row in range(len(first)):
        tensors = [tensor[row] for tensor in batch.tensors]
        origin = None if base is None else tensors.pop(base)
        values = {
            key: value[row].tolist() if isinstance(value, torch.Tensor) else value
            for key, value in given.items()
        }
        rows.append(_counted(tally, name, origin, tensors, values, None, None, None))
    return torch.stack(rows)


def _counted(
    tally: Tally,
    name: str,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    given: dict[str, Any],
    tensor: str | None,
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if name == "passthrough" and given.get("scale") == [None]:
        [same] = models  # mergekit's callers rely on getting the tensor itself
        return same.to(dtype or same.dtype).to(out_dtype or dtype or same.dtype)
    merged = merge_one(name, base, models, given, name=tensor, dtype=dtype, out_dtype=out_dtype)
    tally.add(tally.tensors, name)
    return merged


def _run_merge(
    tally: Tally,
    theirs: Any,
    merge_config: Any,
    out_path: Any,
    options: Any,
    config_source: str | None = None,
) -> None:
    method = merge_config.merge_method
    reason = "" if _is_known(method) else f"merge_engine has no method {method}"
    if not getattr(options, "safe_serialization", True):
        reason = "output as .bin files"
    if getattr(options, "unsafe_truncate_embeddings", False):
        reason = "unsafe_truncate_embeddings"
    if reason:
        tally.hand_over(f"a merge of checkpoints: {reason}")
        theirs(merge_config, out_path, options, config_source)
        return
    run_merge(merge_config, out_path, options, config_source)
    tally.add(tally.runs, method)
