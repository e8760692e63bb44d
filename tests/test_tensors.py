"""Tensors in memory, of every kind that torch has: the values that torch shows, or an error that names the tensor."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

import merge_engine as me
from merge_engine import dtypes
from merge_engine.backends import create_backend
from merge_engine.errors import BackendChoiceError
from merge_engine.tensors import plain

VALUES = torch.tensor([[0.0, -1.0, 2.0], [3.0, -4.0, 5.5]])
COMPLEX = torch.complex(VALUES, VALUES + 1)


class Subclass(torch.Tensor):
    """Adds nothing."""


class Overriding(torch.Tensor):
    """Gets every function of torch, and returns nonsense."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("called")


def freed(nbytes: int) -> torch.Tensor:
    tensor = VALUES.clone()
    tensor.untyped_storage().resize_(nbytes)
    return tensor


GOOD: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: VALUES,
    "negated": lambda: torch._neg_view(VALUES),
    "negated and cut": lambda: torch._neg_view(VALUES)[:, ::2],
    "imaginary part of a conjugate": lambda: COMPLEX.conj().imag,
    "one element of it": lambda: COMPLEX.conj().imag[1, 1],
    "real part of a conjugate": lambda: COMPLEX.conj().real,
    "transposed": lambda: VALUES.T,
    "expanded": lambda: VALUES[:, :1].expand(2, 5),
    "no elements": lambda: torch.empty(0, 3),
    "parameter": lambda: torch.nn.Parameter(VALUES),
    "buffer": lambda: torch.nn.Buffer(VALUES),
    "with a graph": lambda: torch.nn.Parameter(VALUES) * 2,
    "subclass": lambda: VALUES.as_subclass(Subclass),
    "overriding subclass": lambda: VALUES.as_subclass(Overriding),
}
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "none": (lambda: None, "as None, not as a tensor of torch"),
    "number": (lambda: 3.0, "as float, not"),
    "list": (lambda: [1.0], "as list, not"),
    "array": (
        lambda: numpy.ones(3),
        "as numpy.ndarray, not as a tensor of torch; convert it with torch.as_tensor",
    ),
    "module": (lambda: torch.nn.Linear(1, 1), "as torch.nn.modules.linear.Linear, not"),
    "fake": (lambda: FakeTensorMode().from_tensor(VALUES), "as FakeTensor, which has no memory of its own"),
    "meta": (lambda: VALUES.to("meta"), "on the meta device, without values; load it first"),
    "lazy": (torch.nn.UninitializedParameter, "as UninitializedParameter, without values"),
    "nested": (lambda: torch.nested.nested_tensor([VALUES, VALUES]), "as a nested tensor"),
    "jagged": (lambda: torch.nested.nested_tensor([VALUES], layout=torch.jagged), "as NestedTensor"),
    "coo": (VALUES.to_sparse, "as a sparse_coo tensor; call its to_dense() first"),
    "csr": (VALUES.to_sparse_csr, "as a sparse_csr tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(VALUES, 0.1, 0, torch.quint8), "call its dequantize()"),
    "freed": (lambda: freed(0), "with memory that was freed or is too small for it"),
    "cut off": (lambda: freed(8), "with memory that was freed or is too small for it"),
    "complex128": (lambda: COMPLEX.to(torch.complex128), "as torch.complex128, which no checkpoint can hold"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", GOOD)
def test_the_values_are_those_that_torch_shows(kind: str, backend: str) -> None:
    given = GOOD[kind]()
    expected = torch.tensor(plain(given).tolist()).reshape(plain(given).shape)
    merged = me.merge_tensors(None, [given, given], "linear", backend=backend)
    assert torch.equal(merged, expected) and merged.is_contiguous() and not merged.is_neg()
    assert not merged.requires_grad and type(merged) is torch.Tensor


def test_signs_are_as_torch_computes_them() -> None:
    """With torch's own arithmetic as the oracle, which ``plain`` has no part in."""
    assert torch.equal(me.merge_tensors(None, [torch._neg_view(VALUES)] * 2, "linear"), 0 - VALUES)
    assert torch.equal(me.merge_tensors(None, [COMPLEX.conj().imag] * 2, "linear"), 0 - (VALUES + 1))


def test_conjugates_are_copied_as_they_are() -> None:
    merged = me.merge_tensors(None, [COMPLEX.conj(), COMPLEX.conj().resolve_conj()], "linear")
    assert merged.tolist() == COMPLEX.conj().tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD)
def test_what_has_no_values_is_refused_by_name(kind: str) -> None:
    made, message = BAD[kind]
    with pytest.raises(me.PlanError) as error:
        me.merge_state_dicts({"w": VALUES}, [{"w": VALUES}, {"w": made()}], "task_arithmetic")  # type: ignore[dict-item]
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith("w: model 1 has it ") and message in error.value.problems[0]


def test_all_such_tensors_of_a_model_are_named() -> None:
    with pytest.raises(me.PlanError) as error:
        me.merge_state_dicts(None, [{"a": None, "b": VALUES, "c": [1]}], "linear")  # type: ignore[dict-item]
    assert [line[:2] for line in error.value.problems] == ["a:", "c:"]


def test_a_base_that_no_method_reads_may_be_anything() -> None:
    assert torch.equal(me.merge_tensors(VALUES.to("meta"), [VALUES], "linear"), VALUES)


def test_transforms_of_torch_are_refused() -> None:
    def merge(row: torch.Tensor) -> torch.Tensor:
        return me.merge_tensors(None, [row, row], "linear")

    for transform in (torch.vmap(merge), torch.func.grad(lambda row: merge(row).sum())):
        with pytest.raises(me.PlanError, match="inside a transform of torch"):
            transform(VALUES)


@given(st.data())
def test_views_of_one_memory(data: st.DataObject) -> None:
    """Random chains of views over one tensor, conjugated and negated ones among them."""
    view = torch.complex(*torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)))
    for step in data.draw(st.lists(st.sampled_from(["conj", "t", "step", "first", "flip sign"]), max_size=4)):
        view = {
            "conj": lambda v: v.conj(),
            "t": lambda v: v.transpose(0, 1),
            "step": lambda v: v[::2],
            "first": lambda v: v[1:],
            "flip sign": lambda v: torch._neg_view(v),
        }[step](view)
    for part in (view.real, view.imag):
        assert me.merge_tensors(None, [part, part], "linear").tolist() == part.tolist()


@contextmanager
def default(switch: Callable[[Any], None], value: object, usual: object) -> Iterator[None]:
    switch(value)
    try:
        yield
    finally:
        switch(usual)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta device": lambda: torch.device("meta"),
    "default device": lambda: default(torch.set_default_device, "meta", None),
    "default dtype": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "narrow default dtype": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference mode": torch.inference_mode,
}


@pytest.fixture
def models(save_checkpoint: SaveCheckpoint) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: save_checkpoint(name, {"w": torch.randn(64, 33, generator=generator), "n": torch.arange(5)})
        for name in ("base", "a", "b")
    }


def recipe(models: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "merge_method": "dare_ties",
        "base_model": str(models["base"]),
        "models": [{"model": str(models[name])} for name in ("a", "b")],
        "parameters": {"density": 0.5, "weight": 0.5},
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_defaults_of_torch_change_nothing(
    surrounding: str, backend: str, models: dict[str, Path], tmp_path: Path
) -> None:
    expected = me.run(recipe(models), backend="cpu").tensors
    assert expected is not None
    base, a, b = (load_file(models[name] / "model.safetensors") for name in ("base", "a", "b"))
    with SURROUNDINGS[surrounding]():
        in_memory = me.run(recipe(models), backend=backend).tensors
        me.run(recipe(models), tmp_path / "out", backend=backend)
        given = me.merge_state_dicts(base, [a, b], "dare_ties", density=0.5, weight=0.5, backend=backend)
    for found in (in_memory, given, load_file(tmp_path / "out" / "model.safetensors")):
        assert found is not None and all(torch.equal(found[name], expected[name]) for name in expected)


def test_where_torch_makes_no_values_nothing_is_merged_in_memory(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with FakeTensorMode():
        for merge in (
            lambda: me.run(recipe(models)),
            lambda: me.run(recipe(models), backend="reference"),
            lambda: me.merge_tensors(None, [VALUES, VALUES], "linear"),
        ):
            with pytest.raises(me.BackendError, match="makes tensors without values here"):
                merge()
        me.run(recipe(models), tmp_path / "out")  # files to files: torch has no part in it
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].shape == (64, 33)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [object(), VALUES, torch.nn.Linear(1, 1), numpy.float32(0.5), me.MergeError, torch.float16]
    ),
)
OPTIONS = (
    "weight",
    "density",
    "dtype",
    "out_dtype",
    "seed",
    "arithmetic",
    "allow_nonfinite",
    "lambda",
    "normalize",
    "x",
)


@given(st.sampled_from(OPTIONS), ANYTHING)
def test_options_of_any_kind(option: str, value: object) -> None:
    try:
        merged = me.merge_tensors(VALUES, [VALUES, VALUES], "dare_ties", **{"density": 0.5, option: value})
    except me.NonFiniteError:
        assert isinstance(value, float)  # so large that no float32 holds the sum
    except me.MergeError as error:
        assert option in str(error)
    else:
        assert merged.shape == VALUES.shape


@given(ANYTHING)
def test_arguments_of_any_kind(value: Any) -> None:
    for call in (
        lambda: me.merge_tensors(VALUES, [VALUES], value),
        lambda: me.merge_tensors(None, value, "linear"),
        lambda: me.merge_state_dicts(None, value, "linear"),
        lambda: me.merge_state_dicts(None, [value], "linear"),
        lambda: me.merge_state_dicts(value, [{"w": VALUES}], "ties", density=0.5),
        lambda: me.merge_tensors(None, [VALUES], "linear", backend=value),
    ):
        with suppress(me.MergeError):
            call()


@pytest.mark.parametrize("name", [None, 3, b"w", "\ud800"])
def test_names_are_text(name: Any) -> None:
    for merge in (
        lambda: me.merge_state_dicts(None, [{name: VALUES}], "linear"),
        lambda: me.merge_tensors(VALUES, [VALUES], "dare_linear", density=0.5, name=name),
    ):
        with pytest.raises(me.PlanError, match="names of tensors must be text in UTF-8"):
            merge()


@pytest.mark.parametrize("models", [None, 3, VALUES, {"w": VALUES}, "w", b"w"])
def test_models_are_a_list(models: Any) -> None:
    with pytest.raises(me.OptionError, match="models: must be a list of tensors"):
        me.merge_tensors(None, models, "linear")
    with pytest.raises(me.OptionError, match="models: must be a list of state dicts"):
        me.merge_state_dicts(None, models, "linear")


def test_a_module_is_no_state_dict() -> None:
    with pytest.raises(
        me.PlanError, match=r"model 0: is no state dict, but .* Linear; give its state_dict\(\)"
    ):
        me.merge_state_dicts(None, [torch.nn.Linear(1, 1)], "linear")  # type: ignore[list-item]


@pytest.mark.parametrize("method", [None, 3, me.METHODS["ties"], type(me.METHODS["ties"])])
def test_a_method_is_named(method: Any) -> None:
    with pytest.raises(me.RecipeError, match="merge_method: must be the name of a method, not "):
        me.merge_tensors(VALUES, [VALUES], method)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "4", 1025, 2**31, 2**40, 10**30, float("nan")])
def test_threads_have_a_limit(threads: Any) -> None:
    nowhere = {"merge_method": "linear", "models": [{"model": "nowhere"}]}
    with pytest.raises(me.OptionError, match="threads: must be a whole number from 1 to 1,024, not "):
        create_backend(threads=threads)
    with pytest.raises(me.OptionError, match="threads: "):
        me.run(nowhere, threads=threads)


@pytest.mark.parametrize("output", [b"x", 3, None, object(), "a\0b", "\ud800", "", []])
def test_an_output_is_a_path(output: Any, models: dict[str, Path]) -> None:
    for call in (me.run, me.plan):
        if output is not None:  # None merges into memory
            with pytest.raises(me.OptionError, match="output: must be a path, not "):
                call(recipe(models), output)
    for read in (me.write_report, me.verify):
        with pytest.raises(me.OptionError, match="output: must be a path, not "):
            read(output)


@pytest.mark.parametrize("option", ["backend", "device"])
@given(ANYTHING)
def test_backends_and_devices_are_named(option: str, value: object) -> None:
    with pytest.raises(BackendChoiceError, match=f"there is no {option}"):
        create_backend(**{{"backend": "name"}.get(option, option): value})  # type: ignore[arg-type]


def test_an_overwrite_is_meant(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(me.OptionError, match="overwrite: must be True or False, not 'no'"):
        me.run(recipe(models), tmp_path / "out", overwrite="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_a_type_stays_one_object(dtype: dtypes.DType) -> None:
    """Types are compared by identity, also those that were copied, or came from another process."""
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert copy.deepcopy(dtype) is dtype
    assert len({each.code for each in dtypes.ALL}) == len(dtypes.ALL)
