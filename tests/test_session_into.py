"""A merge written into a module: names, ties and memory as transformers has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda.backend import EmulatedCudaBackend
from test_session import assert_same, raw, state_dicts

import merge_engine as me

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 30}


def llama(tied: bool, layers: int = 2, bare: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, tie_word_embeddings=tied)
    return (transformers.LlamaModel if bare else transformers.LlamaForCausalLM)(config)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A merge of tiny Llamas, its tensors from ``run``, and whether their heads are tied."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = llama(request.param)
    paths = []
    for name in "abc":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) / 64
        model.save_pretrained(folder / name)
        paths.append(folder / name)
    with me.load(paths[0], paths[1:]) as session:
        merge = session.merge("dare_ties", density=0.5)
        yield merge, me.run(merge.recipe).tensors, request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_gets_the_bytes_of_a_run(merged: Any, dtype: torch.dtype) -> None:
    merge, expected, tied = merged
    model = llama(tied).to(dtype)
    versions = {name: tensor._version for name, tensor in model.named_parameters()}
    pointers = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    result = merge.into(model)
    state = model.state_dict()
    for name, tensor in expected.items():
        assert raw(state[name]) == raw(tensor.to(dtype)), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.data_ptr() == pointers[name]
        assert parameter._version > versions[name], name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert result.counts == me.run(merge.recipe).counts
    model(torch.tensor([[1, 2, 3]])).logits.float().sum().backward()


def test_a_saved_merge_is_the_same_model(merged: Any, tmp_path: Path) -> None:
    merge, _, tied = merged
    merge.save(tmp_path / "out")
    assert me.verify(tmp_path / "out").complete
    model = llama(tied)
    merge.into(model)
    assert_same(type(model).from_pretrained(tmp_path / "out").state_dict(), model.state_dict())


def test_a_prefix_may_be_on_one_side_only(merged: Any, tmp_path: Path) -> None:
    merge, expected, tied = merged
    bare = llama(tied, bare=True)
    result = merge.into(bare)
    for name, tensor in bare.state_dict().items():
        assert raw(tensor) == raw(expected[f"model.{name}"])
    assert ("the target has no place for lm_head.weight" in "".join(result.notes)) != tied
    for name in ("base", "tuned"):
        torch.manual_seed(len(name))
        llama(tied, bare=True).save_pretrained(tmp_path / name)
    with me.load(tmp_path / "base", [tmp_path / "tuned"]) as session:
        merge = session.merge("ties", density=0.5)
        model = llama(tied)
        if not tied:
            with pytest.raises(me.PlanError, match=r"lm_head\.weight: the merge has no tensor of its own"):
                merge.into(model)
            return
        merge.into(model)
        for name, tensor in (me.run(merge.recipe).tensors or {}).items():
            assert raw(model.state_dict()[f"model.{name}"]) == raw(tensor)


def test_what_only_one_side_has_is_said_in_one_line(merged: Any) -> None:
    merge, _, tied = merged
    model, other = llama(tied, layers=3), llama(not tied)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(me.PlanError) as error:
        merge.into(model)
    (line,) = error.value.problems
    assert line.startswith("the merge has no model.layers.2.") and line.endswith("which the target has")
    with pytest.raises(me.PlanError) as error:
        merge.into(other)
    (line,) = error.value.problems
    assert ("lm_head.weight: the merge has no tensor of its own" in line) == tied
    assert ("ties it to" in line) != tied
    assert_same(other.state_dict(), before)
    with pytest.raises(me.PlanError, match=r"the target has no model\.layers\.1.*which the merge has"):
        merge.into(llama(tied, layers=1))


def test_copies_are_written_once_into_a_tied_module() -> None:
    """State dicts hold both names of a tied tensor; random draws are the same for both."""
    models = [llama(True) for _ in range(3)]
    with me.load(models[0].state_dict(), [model.state_dict() for model in models[1:]]) as session:
        merge = session.merge("dare_ties", density=0.5)
        target = llama(True)
        merge.into(target)
        tensors = merge.tensors()
        assert raw(tensors[EMBEDDING]) == raw(tensors[HEAD]) == raw(target.lm_head.weight.detach())
        with pytest.raises(me.PlanError, match="the target is the memory of an input"):
            merge.into(models[1])


@pytest.mark.parametrize("backend", ["cpu", "device"])
def test_targets_of_any_layout(backend: str) -> None:
    base, *models = state_dicts()
    with me.load(base, models, backend="cpu" if backend == "cpu" else EmulatedCudaBackend()) as session:
        merge = session.merge("ties", density=0.3)
        expected = merge.tensors()
        room = torch.zeros(101, 31, dtype=torch.bfloat16)
        target = {
            "a.weight": room[1:, 1:].T,
            "b.weight": torch.nn.Parameter(torch.zeros(70, dtype=torch.float64)),
        }
        merge.into(target)
        assert raw(target["a.weight"]) == raw(expected["a.weight"])
        assert raw(target["b.weight"].detach()) == raw(expected["b.weight"].double())
        assert not room[0].any() and not room[:, 0].any()
        with torch.inference_mode():
            frozen = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            merge.into(frozen)
        assert_same(frozen, expected)


def test_buffers_of_a_target_stay_as_they_are() -> None:
    """Those that loaders compute anew: a module may have them, or the merge, or both."""
    base, *models = state_dicts()
    positions = torch.arange(4).view(1, 4)
    for state in (base, *models):
        state["embeddings.position_ids"] = positions
    with me.load(base, models) as session:
        merge = session.merge("ties", density=0.3)
        expected = merge.tensors()
        target = {f"bert.{name}": torch.zeros_like(base[name]) for name in ("a.weight", "b.weight")}
        merge.into({**target, "bert.other.inv_freq": torch.ones(2)})
        assert all(raw(target[f"bert.{name}"]) == raw(expected[name]) for name in ("a.weight", "b.weight"))
        with pytest.raises(me.PlanError, match=r"the merge has no c, which the target has"):
            merge.into({**{n: torch.zeros_like(t) for n, t in base.items()}, "c": torch.ones(2)})


def test_wrong_targets_are_refused_before_anything_is_written() -> None:
    base, *models = state_dicts()
    with me.load(base, models) as session:
        merge = session.merge("ties", density=0.3)
        a, b = torch.zeros(30, 100), torch.zeros(70)
        memory = torch.zeros(3070)
        for target, message in (
            (
                {"a.weight": a.T, "b.weight": b},
                r"other shapes: a\.weight \(\[100, 30\], the merge \[30, 100\]\)",
            ),
            (
                {"a.weight": a, "b.weight": b.int()},
                r"types that cannot take .*: b\.weight \(torch\.int32, the merge bfloat16\)",
            ),
            ({"a.weight": a, "b.weight": b.to("meta")}, r"b\.weight: the target has it on the meta device"),
            (
                {"a.weight": a, "b.weight": b[:1].expand(70)},
                r"b\.weight: several elements of the target are one",
            ),
            (
                {"a.weight": memory[:3000].view(30, 100), "b.weight": memory[2999:3069]},
                r"b\.weight: shares a part of its memory with a\.weight",
            ),
            (
                {"a.weight": a, "b.weight": base["b.weight"]},
                r"b\.weight: the target is the memory of an input",
            ),
            ({"a.weight": a}, r"the target has no b\.weight, which the merge has"),
            (
                {"a.base_layer.weight": a, "a.lora_A.weight": a + 1, "b.weight": b},
                r"^a\.base_layer\.weight: the target has adapters of peft in it; merge into it before",
            ),
            (
                {"a.weight": a, "b.weight": b.to("meta"), "c": b.to("meta")},
                r"b\.weight, c: the target has them on the meta device",
            ),
            ({"a.weight": a, "b.weight": b, "c": b + 1}, "the merge has no c, which the target has"),
        ):
            with pytest.raises(me.PlanError, match=message) as error:
                merge.into(target)
            assert len(error.value.problems) == 1
            assert not a.any() and not b.any() and not memory.any()
        with pytest.raises(me.OptionError, match="target: must be a module of torch or a mapping"):
            merge.into([a, b])  # type: ignore[arg-type]


def test_not_finite() -> None:
    base, *models = state_dicts()
    models[0]["a.weight"][2, 3] = float("nan")
    with me.load(base, models) as session:
        for merge in (session.merge("ties", density=0.3), session.merge("linear")):
            with pytest.raises(me.NonFiniteError, match=r"a\.weight: model 0 holds 1 NaN"):
                merge.tensors()
        session.merge("ties", density=0.3, allow_nonfinite=True).tensors()
