"""mergekit's commands under their own names, with all of their options: scripts change one word.

What an option asks for is done, or a line says why it is not needed. An earlier output in the folder is replaced, as
mergekit does.
"""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from merge_engine.checkpoint import open_reference
from merge_engine.cli import terminal
from merge_engine.cli.merging import merge
from merge_engine.errors import CheckpointError, OptionError, PlanError
from merge_engine.integrations.mergekit.options import with_options
from merge_engine.methods import find_method
from merge_engine.recipe import Recipe, TensorNames, load_recipe, load_recipes
from merge_engine.text import some

_MOOT = "Accepted, not needed"

_NOT_NEEDED = {
    "async_write": "reading, merging and writing always overlap",
    "clone_tensors": "every tensor is written for itself",
    "gpu_rich": "the same as --cuda; tensors stream through the GPU in bounded memory",
    "lazy_unpickle": "weights are never loaded whole",
    "lora_merge_cache": "no merged copy of a model is stored",
    "lora_merge_dtype": "the dtype of the recipe decides",
    "low_cpu_memory": "memory is always bounded",
    "multi_gpu": "one GPU is used; the result is the same on every device",
    "no_copy_tokenizer": "an output is complete, so it gets the tokenizer of its base",
    "no_write_model_card": "an output is complete, so it gets a README.md",
    "read_to_gpu": "tensors go to the GPU as they are read",
    "trust_remote_code": "no code of a model is run",
    "verbosity": "a merge always says what it did; `merge-engine plan` says more",
    "write_threads": "the number of threads that write follows from the disk",
}
"""Options that change nothing, and why."""


def _moot(*names: str, key: str, **more: Any) -> Any:
    why = _NOT_NEEDED[key]
    return typer.Option(
        *names, help=f"{why[0].upper()}{why[1:]}.", show_default=False, rich_help_panel=_MOOT, **more
    )


@dataclass(frozen=True)
class Options:
    """The options that all of mergekit's commands take."""

    cuda: Annotated[
        bool, typer.Option("--cuda/--no-cuda", help="The same as --device cuda.", show_default=False)
    ] = False
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, or cuda:1.", show_default="auto")] = (
        None
    )
    num_threads: Annotated[int | None, typer.Option("--num-threads", "-j", help="Threads that compute.")] = (
        None
    )
    out_shard_size: Annotated[
        str, typer.Option(help="Bytes in an output file: 5B or 5GB, 500M, 100K.", metavar="SIZE")
    ] = "5B"
    random_seed: Annotated[int | None, typer.Option(help="The recipe's seed.")] = None
    allow_crimes: Annotated[
        bool,
        typer.Option(
            "--allow-crimes/--no-allow-crimes",
            help="Merge models of other architectures.",
            show_default=False,
        ),
    ] = False
    unsafe_truncate_embeddings: Annotated[
        bool,
        typer.Option(
            "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",
            help="Cut embeddings to the rows that all models have, whatever their tokens.",
            show_default=False,
        ),
    ] = False
    safe_serialization: Annotated[
        bool,
        typer.Option(
            "--safe-serialization/--no-safe-serialization",
            help="Only safetensors are written; no is refused.",
            show_default=False,
        ),
    ] = True
    transformers_cache: Annotated[
        Path | None, typer.Option(readable=False, help="The folder of models from the hub.")
    ] = None
    quiet: Annotated[
        bool, typer.Option("--quiet/--no-quiet", help="Print only warnings and errors.", show_default=False)
    ] = False
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Ours: ignore keys and parameters that do not exist.")
    ] = False
    copy_tokenizer: Annotated[
        bool, _moot("--copy-tokenizer/--no-copy-tokenizer", key="no_copy_tokenizer")
    ] = True
    write_model_card: Annotated[
        bool, _moot("--write-model-card/--no-write-model-card", key="no_write_model_card")
    ] = True
    async_write: Annotated[bool, _moot("--async-write/--no-async-write", key="async_write")] = False
    clone_tensors: Annotated[bool, _moot("--clone-tensors/--no-clone-tensors", key="clone_tensors")] = False
    gpu_rich: Annotated[bool, _moot("--gpu-rich", key="gpu_rich")] = False
    lazy_unpickle: Annotated[bool, _moot("--lazy-unpickle/--no-lazy-unpickle", key="lazy_unpickle")] = False
    lora_merge_cache: Annotated[str | None, _moot("--lora-merge-cache", key="lora_merge_cache")] = None
    lora_merge_dtype: Annotated[str | None, _moot("--lora-merge-dtype", key="lora_merge_dtype")] = None
    low_cpu_memory: Annotated[bool, _moot("--low-cpu-memory/--no-low-cpu-memory", key="low_cpu_memory")] = (
        False
    )
    multi_gpu: Annotated[bool, _moot("--multi-gpu/--no-multi-gpu", key="multi_gpu")] = False
    read_to_gpu: Annotated[bool, _moot("--read-to-gpu/--no-read-to-gpu", key="read_to_gpu")] = False
    trust_remote_code: Annotated[
        bool, _moot("--trust-remote-code/--no-trust-remote-code", key="trust_remote_code")
    ] = False
    verbosity: Annotated[int, _moot("-v", key="verbosity", count=True)] = 0
    write_threads: Annotated[int, _moot("--write-threads", key="write_threads")] = 1

    def not_needed(self) -> list[str]:
        """A line for each option that was given and changes nothing."""
        given = {each.name: getattr(self, each.name) != each.default for each in fields(self)}
        given |= {f"no_{key}": given[key] for key in ("copy_tokenizer", "write_model_card")}
        shown = {"verbosity": "-v"}
        return [
            f"{shown.get(key) or '--' + key.replace('_', '-')}: {why}"
            for key, why in _NOT_NEEDED.items()
            if given[key]
        ]


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer that takes mergekit's options beside its own, and gets them as its argument ``options``."""
    own = inspect.signature(command, eval_str=True).parameters
    hints = get_type_hints(Options, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(each.name, keyword, default=each.default, annotation=hints[each.name])
        for each in fields(Options)
    ]

    def wrapper(**given: Any) -> None:
        options = Options(**{each.name: given.pop(each.name) for each in fields(Options)})
        command(**given, options=options)

    wrapper.__doc__ = command.__doc__
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(each.replace(kind=keyword) for name, each in own.items() if name != "options"),
            *shared,
        ]
    )
    return wrapper


Config = Annotated[Path, typer.Argument(readable=False, help="The recipe, a YAML file in mergekit's format.")]
OutPath = Annotated[Path, typer.Argument(readable=False, help="The folder to write the merged model to.")]


@_with_options
def mergekit_yaml(config_file: Config, out_path: OutPath, options: Options) -> None:
    """Merge as mergekit-yaml does, with its options."""
    _merge(_recipes(config_file, options), out_path, options)


@_with_options
def mergekit_multi(
    config_file: Config,
    intermediate_dir: Annotated[
        Path,
        typer.Option("--intermediate-dir", "-I", readable=False, help="The folder of outputs with a name."),
    ],
    options: Options,
    out_path: Annotated[
        Path | None, typer.Option(readable=False, help="The folder of the output without a name.")
    ] = None,
    lazy: Annotated[
        bool, typer.Option("--lazy/--no-lazy", help="Take over what the same recipe has made before.")
    ] = True,
) -> None:
    """Merge several recipes of one file as mergekit-multi does, with its options."""
    recipes = _recipes(config_file, options)
    name = recipes[-1].name
    if name is None and out_path is None:
        raise OptionError("--out-path: required, because a recipe in the file has no name")
    if name is not None and out_path is not None:
        terminal.say("note", ["--out-path: not used, because all recipes in the file have a name"])
    output = intermediate_dir / name if name is not None else out_path
    assert output is not None
    _merge(recipes, output, options, intermediate_dir=intermediate_dir, lazy=lazy)


@_with_options
def mergekit_pytorch(
    config_path: Config,
    out_path: OutPath,
    options: Options,
    tensor_intersection: Annotated[
        bool, typer.Option("--tensor-intersection", "-i", help="Merge only tensors that all models have.")
    ] = False,
    tensor_union: Annotated[
        bool, typer.Option("--tensor-union", "-u", help="Merge tensors that any model has.")
    ] = False,
) -> None:
    """Merge weight files as mergekit-pytorch does, with its options."""
    recipes = _recipes(config_path, options)
    if len(recipes) > 1:
        load_recipe(config_path, lenient=options.lenient)  # raises
    if tensor_intersection or not tensor_union:
        recipes = (_of_common_tensors(recipes[0], tensor_intersection),)
    _merge(recipes, out_path, options)


def _recipes(file: Path, options: Options) -> tuple[Recipe, ...]:
    """The recipes of a file, with what options set in them."""
    return tuple(
        with_options(
            recipe,
            random_seed=options.random_seed,
            allow_crimes=options.allow_crimes,
            unsafe_truncate_embeddings=options.unsafe_truncate_embeddings,
        )
        for recipe in load_recipes(file, lenient=options.lenient, check_method=find_method)
    )


def _merge(recipes: tuple[Recipe, ...], output: Path, options: Options, **more: object) -> None:
    if not options.safe_serialization:
        raise OptionError("--no-safe-serialization: only safetensors are written; leave it out")
    if not options.quiet:
        terminal.say("note", options.not_needed())
    if options.transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = str(
            options.transformers_cache
        )  # read when the hub's library is imported
    merge(
        recipes,
        output,
        device=options.device or ("cuda" if options.cuda or options.gpu_rich else "auto"),
        threads=options.num_threads,
        shard_size=options.out_shard_size,
        overwrite=True,
        lenient=options.lenient,
        quiet=options.quiet,
        **more,
    )


def _of_common_tensors(recipe: Recipe, leave_out: bool) -> Recipe:
    """The recipe for the tensors that all models have. Without ``leave_out`` others are refused, with ``PlanError``."""
    names: dict[str, set[str]] = {}
    problems: list[str] = []
    for model in recipe.references:
        try:
            names[str(model)] = set(open_reference(model).tensors)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    common = set.intersection(*names.values())
    if leave_out:
        others = sorted(set.union(*names.values()) - common)
        exclude = (*recipe.tensors.exclude, *map(glob.escape, others))
        tensors = TensorNames(exclude=exclude, rename=recipe.tensors.rename)
        return recipe.model_copy(update={"tensors": tensors})
    only = {model: sorted(having - common) for model, having in names.items() if having != common}
    if only:
        raise PlanError(
            [
                f"{model}: {some(others, 3)}: not in every model; -u merges what any model has, -i what all have"
                for model, others in only.items()
            ]
        )
    return recipe
