"""Tensors of torch that have their values in memory: which ones can be read, and how to make one.

Native code gets the address of a tensor. At that address must be the values that torch would show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merge_engine.errors import BackendError

if TYPE_CHECKING:
    import torch


def plain(given: object) -> torch.Tensor:
    """The tensor of class ``torch.Tensor``, with any strides, whose memory holds the values of ``given``.

    It shares the memory of ``given``, unless that is a negated or conjugated view. Autograd does not see it. Raises
    ``ValueError`` for what is no tensor or has no such memory: "as ...", and after ``;`` the way out.
    """
    import torch

    kind: Any = type(given)
    if not isinstance(given, torch.Tensor):
        name = "None" if given is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        raise ValueError(
            f"as {name}, not as a tensor of torch; convert it with torch.as_tensor, or leave it out"
        )
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueError(f"as {kind.__qualname__}, which has no memory of its own; give a plain torch.Tensor")
    if torch.nn.parameter.is_lazy(given):
        raise ValueError(f"as {kind.__qualname__}, without values; initialise it first")
    with torch._C.DisableTorchFunctionSubclass():  # a subclass may answer anything
        if given.is_nested:
            raise ValueError("as a nested tensor; give each of its parts a name of its own")
        if given.layout != torch.strided:
            layout = str(given.layout).removeprefix("torch.").strip("_")
            raise ValueError(f"as a {layout} tensor; call its to_dense() first")
        if given.is_quantized:
            raise ValueError(f"as {given.dtype}; call its dequantize() first")
        if given.is_meta:
            raise ValueError("on the meta device, without values; load it first")
        tensor = given.as_subclass(torch.Tensor).detach()
    try:
        there = _is_in_memory(tensor)
    except RuntimeError:
        raise ValueError(
            "inside a transform of torch, such as vmap or grad, without values; merge outside of it"
        ) from None
    if not there:
        raise ValueError("with memory that was freed or is too small for it; load it again")
    return tensor.resolve_conj().resolve_neg()


def _is_in_memory(tensor: torch.Tensor) -> bool:
    """Whether all elements lie within the tensor's storage."""
    if not tensor.numel():
        return True
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.data_ptr() != 0 and needed <= tensor.untyped_storage().nbytes()


def demand_values() -> None:
    """Raise ``BackendError`` in a mode of torch whose tensors have no values, such as ``FakeTensorMode``."""
    import torch

    new_tensor((1,), torch.uint8, "cpu")


def new_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A contiguous tensor with memory, on the device that is named and no default one. Its values are undefined.

    Raises ``BackendError`` where torch makes none: out of memory, or in a mode of torch whose tensors have no
    values.
    """
    import torch

    try:
        made = torch.empty(tuple(shape), dtype=dtype, device=device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(f"torch makes no tensor of shape {tuple(shape)} on {device}: {reason}") from error
    if type(made) is not torch.Tensor:
        kind = type(made).__name__
        raise BackendError(f"torch makes tensors without values here ({kind}); merge outside of that mode")
    return made
