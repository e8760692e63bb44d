"""The output of a run depends only on its inputs and its recipe."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import extreme_models, generator, quantised_models
from conftest import SaveCheckpoint
from safetensors import safe_open

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.engine.carrying import carry_out
from merge_engine.engine.sinks import MemorySink, Target
from merge_engine.operands import Access
from merge_engine.planning import Budget, Schedule
from merge_engine.storage import OpenFiles, Way

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = {
    "embed_tokens.weight": (40, 64),
    "layers.0.attention.weight": (48, 512),
    "layers.0.conv.weight": (3, 32, 128),
    "layers.0.norm.weight": (5003,),
    "layers.1.attention.weight": (9, 1000),
    "layers.1.conv.weight": (5, 7, 3, 11),
    "layers.1.norm.weight": (1,),
    "nothing.weight": (0, 4),
    "scale": (),
}
MODELS = 3
SMALL = "600KB"  # room for all of the smaller tensors, and for a piece of the larger
WAYS: tuple[dict[str, Any], ...] = (
    {"memory": SMALL, "threads": 1, "shard_size": "50KB"},
    {"memory": "2MB", "threads": 2},
    {"threads": 3, "shard_size": 1},
    {"memory": "701KB", "threads": 3},
    {"backend": "reference", "memory": SMALL},
)

SLACKS = {"trim_slack": 0.15, "sign_slack": 0.4}
RECIPES: dict[str, dict[str, Any]] = {
    f"ties {ties} {scope}": {"merge_method": "ties", "parameters": {"ties": ties, "trim_scope": scope}}
    for ties, scope in itertools.product(("spread", "index", "all"), ("tensor", "model"))
} | {
    "ties with slack": {"merge_method": "ties", "parameters": {**SLACKS, "sign_slack_mode": "retain"}},
    "ties rescaled": {"merge_method": "ties", "parameters": {"rescale": "true", "elect": "count"}},
    "ties as mergekit": {
        "merge_method": "ties",
        "arithmetic": "mergekit",
        "parameters": {"ties": "index", "rescale": "true"},
    },
    "breadcrumbs_ties with slack": {
        "merge_method": "breadcrumbs_ties",
        "parameters": {**SLACKS, "gamma": 0.1},
    },
    "breadcrumbs over the model": {
        "merge_method": "breadcrumbs",
        "parameters": {"gamma": 0.1, "ties": "index", "trim_scope": "model", "rescale": "true"},
    },
    "dare_ties": {"merge_method": "dare_ties", "parameters": {}},
    "dare_linear": {"merge_method": "dare_linear", "parameters": {"rescale": "density"}},
    "della": {"merge_method": "della", "parameters": {}},
    "della_linear": {"merge_method": "della_linear", "parameters": {"rescale": "density"}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"normalize": True}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "nuslerp by rows": {"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": False}},
    "nuslerp by columns": {
        "merge_method": "nuslerp",
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"merge_method": "multislerp", "parameters": {}},
    "karcher": {"merge_method": "karcher", "parameters": {"tol": 1e-8}},
    "model_stock by rows": {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
    "nearswap": {"merge_method": "nearswap", "parameters": {"t": 0.001}},
    "ram": {"merge_method": "ram", "parameters": {"epsilon": 0.001}},
    "ramplus_tl": {"merge_method": "ramplus_tl", "parameters": {"epsilon": 0.001, "r": 0.5}},
    "sce": {"merge_method": "sce", "parameters": {}},
    "sce selected": {"merge_method": "sce", "parameters": {"select_topk": 0.3}},
    "sce as mergekit": {
        "merge_method": "sce",
        "arithmetic": "mergekit",
        "parameters": {"select_topk": 0.3, "ties": "index"},
    },
    "arcee_fusion": {"merge_method": "arcee_fusion", "parameters": {}},
}
FEW = {"slerp": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1}
"""Methods that do not take all models."""

StateDict = dict[str, torch.Tensor]

# All recipes in bfloat16, and half of them in each of the other types.
PAIRS = [
    (title, dtype)
    for number, title in enumerate(RECIPES)
    for dtype in ("bfloat16", ("float32", "float16")[number % 2])
]


def checkpoints(dtypes: tuple[torch.dtype, ...]) -> list[StateDict]:
    """A base and models with awkward tensors: the last model lacks some, another has one that is unchanged."""
    results: list[StateDict] = [{} for _ in range(1 + MODELS)]
    for number, (name, shape) in enumerate(SHAPES.items()):
        base, tuned = quantised_models(torch.Size(shape).numel(), MODELS, torch.float32, seed=number)
        if name == "embed_tokens.weight":
            tuned = [base.clone() for _ in tuned]
        for result, tensor, dtype in zip(results, [base, *tuned], dtypes, strict=True):
            result[name] = tensor.to(dtype).view(shape)
    for result in results:
        result["position_ids"] = torch.arange(7000).view(7, 1000)
    results[0]["only.in.base"] = torch.randn(5000, generator=generator(1)).to(dtypes[0])
    for name in ("layers.0.conv.weight", "layers.1.norm.weight", "position_ids"):
        del results[-1][name]
    return results


def recipe_of(title: str, folders: list[Path], **keys: Any) -> dict[str, Any]:
    given = RECIPES[title]
    method = me.METHODS[given["merge_method"]]
    known = {parameter.name for parameter in method.parameters}
    common = {"lambda": 0.8, "density": 0.4} if title != "task_arithmetic" else {"lambda": 0.8}
    parameters = {key: value for key, value in common.items() if key in known} | given["parameters"]
    models = [
        {"model": str(folder), "parameters": {"weight": weight} if "weight" in known else {}}
        for folder, weight in zip(folders[1:], (0.6, -0.3, 0.9), strict=True)
    ][: FEW.get(method.name)]
    return {**given, "parameters": parameters, "base_model": str(folders[0]), "models": models, **keys}


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the type, shape and bytes of a tensor."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The digest of every tensor in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: digest(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    return found


def carried_out(
    recipe: dict[str, Any], way: Way, in_place: bool, budget: Budget, threads: int = 2
) -> tuple[dict[str, str], int]:
    """The digests of a merge into memory, read and divided in the given way, and the number of merged pieces."""
    plan = me.plan(recipe)
    schedule = Schedule(plan, budget)
    sink = MemorySink(plan)
    with OpenFiles() as files:
        carry_out(schedule, create_backend("cpu", threads), Access(files, way, in_place), [Target(sink)])
    pieces = sum(len(schedule.chunks(task)) for task in schedule.tasks)
    return {name: digest(tensor) for name, tensor in sink.tensors.items()}, pieces


@pytest.fixture
def digests_of(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Merges a recipe into a new folder, and digests the output."""
    numbers = itertools.count()

    def merge(recipe: dict[str, Any], **options: Any) -> dict[str, str]:
        out = tmp_path / f"out{next(numbers)}"
        me.run(recipe, out, **options)
        return digests(out)

    return merge


Digester = Callable[..., dict[str, str]]


@pytest.mark.parametrize("method", ["slerp", "nearswap", "task_arithmetic"])
def test_unchanged_tensors_do_not_depend_on_how_a_run_is_done(
    method: str, save_checkpoint: SaveCheckpoint, digests_of: Digester
) -> None:
    held = {
        "w": torch.randn(48, 512, generator=generator(1))
    }  # in float32, (1 - t) * w + t * w is often not w
    base, model = (str(save_checkpoint(name, held)) for name in ("base", "model"))
    parameters = {"weight": 0.3} if method == "task_arithmetic" else {"t": 0.3}
    recipe = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": model}],
        "parameters": parameters,
    }
    expected = digests_of(recipe)
    for way in WAYS:
        assert digests_of(recipe, **way) == expected, way
    if method != "slerp":
        assert expected == {"w": digest(held["w"])}


@pytest.mark.parametrize(("title", "dtype"), PAIRS)
def test_bytes_do_not_depend_on_how_a_run_is_done(
    title: str,
    dtype: str,
    save_checkpoint: SaveCheckpoint,
    digests_of: Digester,
) -> None:
    tensors = checkpoints((DTYPES[dtype],) * (1 + MODELS))
    folders = [save_checkpoint(f"m{i}", held) for i, held in enumerate(tensors)]
    sharded = [save_checkpoint(f"s{i}", held, shards=3) for i, held in enumerate(tensors)]
    expected = digests_of(recipe_of(title, folders))
    without_base = title == "karcher"
    assert expected.keys() == tensors[without_base].keys()
    for way in WAYS:
        assert digests_of(recipe_of(title, folders), **way) == expected, way
    assert digests_of(recipe_of(title, sharded), memory=SMALL) == expected
    for threads in (1, 3):  # what is in place is measured whole and merged by the piece
        budget = Budget(in_place=True, cached_piece=1)
        found, pieces = carried_out(recipe_of(title, folders), "cached", True, budget, threads)
        assert found == expected, threads
        assert pieces > len(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_do_not_depend_on_how_files_are_read(
    dtype: str, save_checkpoint: SaveCheckpoint, digests_of: Digester
) -> None:
    """Tensors begin anywhere in the files, and in memory too where they are used in place."""
    held = checkpoints((DTYPES[dtype],) * (1 + MODELS))
    folders = [save_checkpoint(f"m{i}", tensors, shards=2) for i, tensors in enumerate(held)]
    for title in ("ties spread tensor", "ties index model", "dare_linear", "della", "task_arithmetic"):
        recipe = recipe_of(title, folders)
        expected = digests_of(recipe)
        ways: tuple[Way, ...] = ("cached", "direct")
        for way, in_place, memory in itertools.product(ways, (False, True), (400_000, 384_000_000)):
            found, _ = carried_out(recipe, way, in_place, Budget(memory))
            assert found == expected, (title, way, in_place, memory)


def test_small_memory_takes_more_than_one_visit(save_checkpoint: SaveCheckpoint) -> None:
    """Otherwise the tests above would compare a run with itself."""
    folders = [
        save_checkpoint(f"m{i}", held) for i, held in enumerate(checkpoints((torch.bfloat16,) * (1 + MODELS)))
    ]
    for title in ("ties index tensor", "della"):
        pieces = {}
        plan = me.plan(recipe_of(title, folders))
        for memory in (400_000, 384_000_000):
            schedule = Schedule(plan, Budget(memory))
            pieces[memory] = max(len(schedule.chunks(task)) for task in schedule.tasks)
        assert pieces[400_000] > 1 == pieces[384_000_000]


@pytest.mark.parametrize("title", ("ties spread tensor", "ties index model", "dare_ties", "della"))
def test_inputs_of_several_types(title: str, save_checkpoint: SaveCheckpoint, digests_of: Digester) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    folders = [save_checkpoint(f"m{i}", held) for i, held in enumerate(checkpoints(dtypes))]
    for keys in ({"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "float16"}):
        recipe = recipe_of(title, folders, **keys)
        expected = digests_of(recipe)
        for way in WAYS[::3]:
            assert digests_of(recipe, **way) == expected, way


def test_types_are_promoted_tensor_by_tensor(save_checkpoint: SaveCheckpoint, digests_of: Digester) -> None:
    dtypes = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16)
    tensors = checkpoints(dtypes)
    folders = [save_checkpoint(f"m{i}", held) for i, held in enumerate(tensors)]
    recipe = recipe_of("ties spread tensor", folders)
    merged = me.run(recipe).tensors
    assert merged is not None
    floats = {name: tensor.dtype for name, tensor in merged.items() if tensor.is_floating_point()}
    for name, dtype in floats.items():
        assert dtype == (torch.float32 if name in tensors[-1] else torch.bfloat16), name
    expected = digests_of(recipe)
    for way in WAYS:
        assert digests_of(recipe, **way) == expected, way


def test_memory_and_folder_and_tensors_give_the_same(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    tensors = checkpoints((torch.bfloat16,) * (1 + MODELS))
    folders = [save_checkpoint(f"m{i}", held) for i, held in enumerate(tensors)]
    for title in ("ties spread tensor", "ties index model", "della"):
        recipe = recipe_of(title, folders)
        in_memory = me.run(recipe, memory=SMALL).tensors
        assert in_memory is not None
        direct = me.merge_state_dicts(
            tensors[0], tensors[1:], recipe["merge_method"], weight=[0.6, -0.3, 0.9], **recipe["parameters"]
        )
        assert in_memory.keys() == direct.keys()
        for name in direct:
            ours, theirs = in_memory[name].reshape(-1), direct[name].reshape(-1)
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


@pytest.mark.parametrize("zeros", ("positive", "negative"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unchanged_tensor_is_merged_as_any_other(
    dtype: str, zeros: str, save_checkpoint: SaveCheckpoint, digests_of: Digester
) -> None:
    """A tensor that no model changed may be copied, if computing it would have given the same bytes."""
    base, _ = extreme_models(9000, 1, DTYPES[dtype])
    base[base == 0] = 0.0 if zeros == "positive" else -0.0
    assert (base == 0).sum() > 100
    folders = [save_checkpoint(f"m{i}", {"x": base}) for i in range(1 + MODELS)]
    for title in ("ties spread tensor", "dare_ties", "task_arithmetic"):
        recipe = recipe_of(title, folders)
        at_once = digests_of(recipe)
        assert digests_of(recipe, memory=SMALL) == at_once
        assert digests_of(recipe, memory="100KB") == at_once
        computed = me.merge_tensors(base, [base] * MODELS, recipe["merge_method"], name="x")
        merged = me.run(recipe).tensors
        assert merged is not None
        assert torch.equal(merged["x"].view(torch.uint8), computed.view(torch.uint8))


def test_a_tensor_missing_from_a_model_is_merged_from_the_others(save_checkpoint: SaveCheckpoint) -> None:
    tensors = checkpoints((torch.float32,) * (1 + MODELS))
    folders = [save_checkpoint(f"m{i}", held) for i, held in enumerate(tensors)]
    result = me.run(recipe_of("task_arithmetic", folders))
    assert result.tensors is not None
    name = "layers.0.conv.weight"
    two = me.merge_tensors(
        tensors[0][name],
        [tensors[1][name], tensors[2][name]],
        "task_arithmetic",
        weight=[0.6, -0.3],
        normalize=True,
        **{"lambda": 0.8},
    )
    assert torch.equal(result.tensors[name], two)
    assert torch.equal(result.tensors["only.in.base"], tensors[0]["only.in.base"])
    assert any(name in note and str(folders[-1]) in note for note in result.notes)


def test_integer_buffers_are_copied_and_must_agree(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    tensors = checkpoints((torch.bfloat16,) * (1 + MODELS))
    folders = [save_checkpoint(f"m{i}", held) for i, held in enumerate(tensors)]
    merged = me.run(recipe_of("ties spread tensor", folders), memory=SMALL).tensors
    assert merged is not None and torch.equal(merged["position_ids"], tensors[0]["position_ids"])
    tensors[2]["position_ids"][6, 999] += 1
    folders[2] = save_checkpoint("other", tensors[2])
    for memory in (SMALL, "384MB"):
        with pytest.raises(me.PlanError, match=r"position_ids: int64 .* must be the same") as caught:
            me.run(recipe_of("ties spread tensor", folders), tmp_path / "out", memory=memory)
        assert str(folders[2]) in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_head_that_one_model_has_untied_is_merged_and_written(
    save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    g = generator(3)
    base = {embedding: torch.randn(20, 8, generator=g)}
    tied = {embedding: base[embedding] + 1}
    untied = {embedding: base[embedding] + 2, head: base[embedding] - 3}
    config = {"tie_word_embeddings": True}
    folders = [
        save_checkpoint("base", base, config),
        save_checkpoint("tied", tied, config),
        save_checkpoint("untied", untied, {"tie_word_embeddings": False}),
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders[1:]],
    }
    me.run(recipe, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert set(opened.keys()) == {embedding, head}
        assert torch.allclose(opened.get_tensor(embedding), base[embedding] + 1.5)
        assert torch.allclose(opened.get_tensor(head), base[embedding] + 0.5 - 1.5, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    recipe["models"] = recipe["models"][:1]
    me.run(recipe, tmp_path / "still tied")
    with safe_open(tmp_path / "still tied" / "model.safetensors", "pt") as opened:
        assert set(opened.keys()) == {embedding}
    assert json.loads((tmp_path / "still tied" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("title", ("ties spread tensor", "ties index model", "dare_ties", "della"))
def test_nothing_but_empty_tensors_and_scalars(
    title: str, save_checkpoint: SaveCheckpoint, digests_of: Digester
) -> None:
    held = [{"empty": torch.zeros(0, 3), "scalar": torch.tensor(float(i))} for i in range(1 + MODELS)]
    folders = [save_checkpoint(f"m{i}", tensors) for i, tensors in enumerate(held)]
    expected = digests_of(recipe_of(title, folders))
    assert expected.keys() == {"empty", "scalar"}
    assert digests_of(recipe_of(title, folders), backend="reference") == expected
    empty = [save_checkpoint(f"e{i}", {"empty": torch.zeros(0, 3)}) for i in range(1 + MODELS)]
    assert digests_of(recipe_of(title, empty)).keys() == {"empty"}
