"""Sessions: any sequence of merges gives the bytes and the counts of single runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import quantised_models
from emulated_cuda.backend import EmulatedCudaBackend
from families import state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora import save_adapter
from safetensors.torch import load_file, save_file
from vocabularies import save_llama, tokenizer_json, words

import merge_engine as me
from merge_engine.backends import Backend
from merge_engine.backends.cpu import CpuBackend
from merge_engine.operands import InMemory

SHAPES = {
    "model.embed_tokens.weight": (40, 64),
    "model.layers.0.mlp.up_proj.weight": (48, 512),
    "model.layers.0.norm.weight": (5003,),
    "model.layers.1.mlp.up_proj.weight": (9, 100),
    "model.layers.1.norm.weight": (),
    "nothing.weight": (0, 4),
}
MODELS = 3
SESSIONS: dict[str, tuple[Backend, int | None]] = {
    "cpu": (CpuBackend(threads=2), None),
    "device": (EmulatedCudaBackend(), None),
    "device with little memory": (EmulatedCudaBackend(), 50_000),
}
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The base and its fine-tunes, in each dtype."""
    made: dict[str, list[Path]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        states: list[dict[str, torch.Tensor]] = [{} for _ in range(MODELS + 1)]
        for i, (name, shape) in enumerate(SHAPES.items()):
            base, tuned = quantised_models(torch.Size(shape).numel(), MODELS, dtype, seed=i)
            for state, values in zip(states, (base, *tuned), strict=True):
                state[name] = values.view(shape)
        folder = tmp_path_factory.mktemp(str(dtype))
        made[str(dtype)] = [save(folder / f"m{i}", state) for i, state in enumerate(states)]
    return made


def save(folder: Path, state: Tensors, **config: object) -> Path:
    folder.mkdir()
    save_file({**state, "count": torch.arange(5)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "test", **config}))
    return folder


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(found: Tensors, expected: Tensors | None) -> None:
    assert expected is not None and list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def assert_equals_a_run(merge: me.Merge) -> None:
    expected = me.run(merge.recipe, backend="cpu", threads=1)
    assert_same(merge.tensors(), expected.tensors)
    assert expected.tensors is not None
    given_ones = {name: torch.empty_like(tensor) for name, tensor in expected.tensors.items()}
    result = merge.into(given_ones)
    assert_same(given_ones, expected.tensors)
    assert result.per_tensor == expected.per_tensor and result.counts == expected.counts
    assert result.warnings == expected.warnings and result.notes == expected.notes


numbers = st.sampled_from([0.0, 0.1, 0.35, 0.6, 1.0])
densities = st.one_of(
    numbers,
    st.lists(numbers, min_size=MODELS, max_size=MODELS),
    st.just([{"filter": "mlp", "value": 0.2}, {"value": [0.3, 0.7]}]),
)
slacks = st.sampled_from([0.0, 0.2, [0.0, 0.4, 0.1]])
common = {
    "weight": st.sampled_from([1.0, 0.3, [0.5, 0.2, -0.4]]),
    "dtype": st.sampled_from([None, "float32", "bfloat16"]),
    "arithmetic": st.sampled_from(["exact", "exact", "mergekit"]),
}
ranked = {"ties": st.sampled_from(["spread", "index", "all"]), "rescale": st.booleans()}
whole = st.fixed_dictionaries(
    {"trim_scope": st.just("model"), "density": numbers, "dtype": st.just("float32")}
)


def changes(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={**common, **options})


STEPS = st.one_of(
    st.tuples(st.just("ties"), changes(density=densities, trim_slack=slacks, sign_slack=slacks, **ranked)),
    st.tuples(st.sampled_from(["ties", "breadcrumbs"]), whole),
    st.tuples(st.just("breadcrumbs"), changes(density=numbers, gamma=numbers, **ranked)),
    st.tuples(st.just("dare_ties"), changes(density=densities, seed=st.integers(0, 2))),
    st.tuples(st.just("della"), changes(density=st.sampled_from([0.4, 0.5]), rescale=st.booleans())),
    st.tuples(st.just("sce"), st.fixed_dictionaries({"select_topk": numbers})),
    st.tuples(
        st.sampled_from(["linear", "task_arithmetic", "model_stock", "karcher", "multislerp", "ram"]),
        changes(),
    ),
)


def fits(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that a method knows."""
    declared = {parameter.name for parameter in me.METHODS[method].parameters}
    return {name: v for name, v in given.items() if name in declared | {"dtype", "arithmetic", "seed"}}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(SESSIONS)),
    st.sampled_from(["torch.bfloat16", "torch.float16", "torch.float32"]),
    st.lists(STEPS, min_size=1, max_size=4),
)
def test_any_sequence_of_merges_equals_single_runs(
    checkpoints: dict[str, list[Path]], on: str, dtype: str, steps: list[tuple[str, dict[str, Any]]]
) -> None:
    backend, memory = SESSIONS[on]
    base, *models = checkpoints[dtype]
    with me.load(base, models, backend=backend, memory=memory) as session:
        for method, changed in steps:
            assert_equals_a_run(session.merge(method, **fits(method, changed)))


@pytest.mark.parametrize("on", ["cpu", "device"])
def test_nothing_is_measured_twice(checkpoints: dict[str, list[Path]], on: str) -> None:
    """A second merge is the apply alone: the backend is asked for nothing else."""

    class Counting(type(SESSIONS[on][0])):  # type: ignore[misc]
        measured = 0

        def count(self, *arguments: Any) -> None:
            self.measured += 1
            super().count(*arguments)

        def find_all(self, *arguments: Any) -> Any:
            self.measured += 1
            return super().find_all(*arguments)

        def l1_norms(self, *arguments: Any) -> Any:
            self.measured += 1
            return super().l1_norms(*arguments)

        def gram(self, *arguments: Any) -> Any:
            self.measured += 1
            return super().gram(*arguments)

    backend = Counting()
    base, *models = checkpoints["torch.bfloat16"]
    with me.load(base, models, backend=backend) as session:
        for first, second in (
            ({"method": "ties", "density": 0.3}, {"method": "ties", "density": 0.6, "sign_slack": 1}),
            ({"method": "ties", "density": 0.2}, {"method": "breadcrumbs", "density": 0.5, "gamma": 0.1}),
            ({"method": "ties", "density": 0.2}, {"method": "ties", "density": 0.4, "trim_scope": "model"}),
            (
                {"method": "ties", "density": 0.3, "rescale": True},
                {"method": "ties", "density": 0.3, "rescale": True, "weight": 0.7},
            ),
            ({"method": "model_stock"}, {"method": "model_stock"}),
        ):
            for given_ones in (first, second):
                before = backend.measured
                given_ones = dict(given_ones)
                session.merge(given_ones.pop("method"), **given_ones).tensors()
            assert backend.measured == before, second


def recipes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes whose operands are composed of others."""
    vocabulary = words(40)
    save_llama(folder / "base", tokenizer_json(vocabulary), seed=0)
    save_llama(folder / "same", tokenizer_json(vocabulary), seed=1)
    save_llama(folder / "other", tokenizer_json([*words(30), "new", "newer"]), seed=2)
    save_llama(folder / "longer", tokenizer_json(vocabulary), 48, seed=3)
    base, same, other, longer = (str(folder / name) for name in ("base", "same", "other", "longer"))
    models = [{"model": base}, {"model": other}]
    yield "union", {"merge_method": "linear", "models": models, "tokenizer": {"source": "union"}}
    yield (
        "tokens",
        {
            "merge_method": "ties",
            "base_model": base,
            "models": [{"model": other}, {"model": same}],
            "parameters": {"density": 0.5},
            "tokenizer": {"source": "union", "tokens": {"w5": {"source": other, "force": True}}},
        },
    )
    yield (
        "truncated",
        {
            "merge_method": "ties",
            "base_model": base,
            "models": [{"model": longer}],
            "unsafe_truncate_embeddings": True,
            "parameters": {"density": 0.5},
        },
    )
    layers = [
        {"sources": [{"model": base, "layer_range": [i, i + 1]}, {"model": same, "layer_range": [0, 1]}]}
        for i in (0, 1)
    ]
    yield "slices", {"merge_method": "slerp", "base_model": base, "slices": layers, "parameters": {"t": 0.3}}
    yield "passthrough", {"merge_method": "passthrough", "slices": [{"sources": [layers[0]["sources"][1]]}]}


@pytest.mark.parametrize("on", sorted(SESSIONS))
def test_recipes_with_composed_operands(tmp_path: Path, on: str) -> None:
    backend, memory = SESSIONS[on]
    for name, recipe in recipes(tmp_path):
        if "weight" in {p.name for p in me.METHODS[recipe["merge_method"]].parameters}:
            recipe = recipe | {"parameters": {**recipe.get("parameters", {}), "weight": 1.0}}
        with me.load(recipe, backend=backend, memory=memory) as session:
            for _ in range(2):
                merge = session.merge()
                assert_equals_a_run(merge)
            merge.save(tmp_path / f"{name} {on}")
        assert_same(
            dict(sorted(load_file(tmp_path / f"{name} {on}" / "model.safetensors").items())),
            dict(sorted((me.run(recipe).tensors or {}).items())),
        )


def test_a_lora_is_put_in_once(tmp_path: Path) -> None:
    base = save(tmp_path / "base", state_dict(0))
    tuned = save(tmp_path / "tuned", state_dict(1))
    save_adapter(tmp_path / "adapter")
    with me.load(base, [f"{base}+{tmp_path / 'adapter'}", tuned]) as session:
        held = session.memory["cpu"]
        assert_equals_a_run(session.merge("ties", density=0.5))
    bytes_of_one = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    assert held < 2.5 * bytes_of_one  # what the adapter does not change is the base's


def test_files_are_not_needed_any_more(checkpoints: dict[str, list[Path]], tmp_path: Path) -> None:
    paths = [tmp_path / path.name for path in checkpoints["torch.float32"]]
    for path, original in zip(paths, checkpoints["torch.float32"], strict=True):
        save(path, {k: v for k, v in load_file(original / "model.safetensors").items() if k != "count"})
    with me.load(paths[0], paths[1:]) as session:
        expected = me.run(session.merge("ties", density=0.3).recipe).tensors
        for path in paths:
            (path / "model.safetensors").unlink()
        assert_same(session.merge("ties", density=0.3).tensors(), expected)


def test_models_may_be_named_by_another_path(
    checkpoints: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = checkpoints["torch.bfloat16"]
    monkeypatch.chdir(base.parent)
    with me.load(base, models) as session:
        merge = session.merge(
            {
                "merge_method": "linear",
                "models": [{"model": f"./{m.name}", "parameters": {"weight": 1}} for m in models],
            }
        )
        assert_equals_a_run(merge)
        assert str(models[0]) in merge.recipe.to_yaml()


def test_threads_share_a_session(checkpoints: dict[str, list[Path]]) -> None:
    base, *models = checkpoints["torch.bfloat16"]
    found: dict[float, Tensors] = {}
    with me.load(base, models) as session:

        def merge(density: float) -> None:
            found[density] = session.merge("ties", density=density).tensors()

        threads = [threading.Thread(target=merge, args=(i / 10,)) for i in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for density, tensors in found.items():
            assert_same(tensors, me.run(session.merge("ties", density=density).recipe).tensors)
    assert len(found) == len(threads)


def test_memory_is_stated_and_released(checkpoints: dict[str, list[Path]]) -> None:
    base, *models = checkpoints["torch.float32"]
    session = me.load(base, models)
    stored = sum(t.nbytes for p in (base, *models) for t in load_file(p / "model.safetensors").values())
    assert session.memory == {"cpu": stored, "answers": 0}
    merge = session.merge("ties", density=0.5)
    merge.tensors()
    assert session.memory["answers"] > 0
    operand = merge.plan.tasks[0].inputs[0]
    assert isinstance(operand, InMemory)
    session.close()
    session.close()
    assert session.memory == {"cpu": 0, "answers": 0}
    assert operand.tensor.untyped_storage().nbytes() == 0  # although somebody has the merge
    for use in (merge.tensors, lambda: session.merge("ties"), lambda: merge.into({})):
        with pytest.raises(me.OptionError, match="the session is closed; load the models again"):
            use()


def test_the_system_gets_its_memory_back(tmp_path: Path) -> None:
    state = {f"w{i}": torch.ones(1 << 18) for i in range(48)}
    paths = [save(tmp_path / name, state) for name in ("base", "a")]
    torch.empty(
        31 << 20, dtype=torch.uint8
    )  # from now on the C library takes smaller blocks from its own memory
    session = me.load(paths[0], paths[1:])
    behind = torch.ones(1 << 18)  # and what lies before this one cannot be cut off at the end
    before = resident()
    session.close()
    assert before - resident() > 80_000_000 and behind.all()


def resident() -> int:
    """Bytes of this process's own that are in memory."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    ]
    return 1024 * int(line.split()[1])


def test_too_little_memory_is_said_before_anything_is_read(
    checkpoints: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = checkpoints["torch.float32"]
    monkeypatch.setattr("merge_engine.session.places.available_memory", lambda: 200_000)
    with pytest.raises(
        me.BackendError, match=r"take 0\.5 MB of the host's memory, but 0\.2 MB are available"
    ):
        me.load(base, models)


def state_dicts(count: int = 3) -> list[dict[str, torch.Tensor]]:
    base, tuned = quantised_models(3000, count - 1, torch.bfloat16)
    return [{"a.weight": values.view(30, 100), "b.weight": values[:70].clone()} for values in (base, *tuned)]


def test_state_dicts_are_used_where_they_are() -> None:
    base, *models = state_dicts()
    with me.load(base, models) as session:
        merge = session.merge("ties", density=0.3, weight=[1.0, 0.5])
        assert_same(
            merge.tensors(), me.merge_state_dicts(base, models, "ties", density=0.3, weight=[1.0, 0.5])
        )
        assert session.memory["cpu"] == sum(t.nbytes for state in (base, *models) for t in state.values())
        with pytest.raises(me.OptionError, match="state dicts have neither config nor tokenizer"):
            merge.save("out")


@pytest.mark.parametrize("change", ["in place", "optimizer", "another tensor", "another shape"])
def test_changed_inputs_are_noticed(change: str) -> None:
    base, *models = state_dicts()
    with me.load(base, models) as session:
        early = session.merge("ties", density=0.3)
        early.tensors()
        if change == "in place":
            models[0]["a.weight"][3] += 1
        elif change == "optimizer":
            parameter = torch.nn.Parameter(models[0]["a.weight"])
            parameter.grad = torch.ones_like(parameter)
            torch.optim.SGD([parameter], lr=0.5).step()
        elif change == "another tensor":
            models[0]["a.weight"] = models[0]["a.weight"] * 2
        else:
            for state in (base, *models):
                state["a.weight"] = state["a.weight"][:7].clone()
        expected = me.merge_state_dicts(base, models, "ties", density=0.3)
        assert_same(early.tensors(), expected)
        assert_same(session.merge("ties", density=0.3).tensors(), expected)


def test_wrong_arguments(checkpoints: dict[str, list[Path]]) -> None:
    base, *models = checkpoints["torch.float32"]
    session = me.load(base, models[:1])
    recipe = {"merge_method": "linear", "models": [{"model": str(models[1])}]}
    for use, message in (
        (lambda: session.merge(), "loaded without a recipe; name a method"),
        (lambda: session.merge("tis"), 'there is no method "tis"; did you mean "ties"'),
        (lambda: session.merge("ties", desity=0.5), 'desity.*did you mean "density"'),
        (lambda: session.merge("ties", density=2), "density"),
        (lambda: session.merge("ties", density=[0.1, 0.2]), "2 values for 1 model"),
        (lambda: session.merge(recipe), "the recipe names .*m2, but loaded are"),
        (lambda: me.load(base, models[0]), r"models: must be a list of models, not .*; write \[model\]"),
        (lambda: me.load(base, []), "models: at least one is needed"),
        (lambda: me.load(base, [{"a": torch.ones(1)}]), "give paths alone, or state dicts alone"),
        (lambda: me.load(base, [3]), "models: must be paths"),
        (lambda: me.load(base, models, device=[]), "device: must be a device or a list"),
        (lambda: me.load(base, models, device=["cpu", "cpu"]), "device: names one twice"),
        (lambda: me.load(base, models, device=3), "device: must be a device or a list"),  # type: ignore[arg-type]
        (lambda: me.load(base, [torch.nn.Linear(1, 1)]), r"give its state_dict\(\)"),  # type: ignore[list-item]
        (lambda: session.merge("ties", models=[]), "models: cannot be changed; write another recipe"),
        (
            lambda: me.load({"a": torch.ones(1)}, [{"a": torch.ones(1).to_sparse()}]),
            "a: model 0 has it as a sparse_coo tensor",
        ),
        (lambda: me.load(base, models, memory="much"), "memory: "),
        (
            lambda: me.load({"a": torch.ones(1)}, [{"a": torch.ones(1)}], device="cuda"),
            "are on cpu, not on cuda",
        ),
        (lambda: me.load(base / "nothing", models), "there is no such folder or file"),
        (lambda: me.load({"a": torch.ones(1)}, [{"a": None}]), "a: model 0 has it as None"),
    ):
        with pytest.raises(me.MergeError, match=message):
            use()
