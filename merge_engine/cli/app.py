"""The commands of ``merge-engine``."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

import merge_engine
from merge_engine.backends import backend_or_kind
from merge_engine.cli import show, terminal
from merge_engine.cli.bench import bench
from merge_engine.cli.diff import diff
from merge_engine.cli.doctor import examine
from merge_engine.cli.mergekit import mergekit_multi, mergekit_pytorch, mergekit_yaml
from merge_engine.cli.merging import merge
from merge_engine.cli.options import (
    SHARD_SIZE,
    BackendName,
    Device,
    IntermediateDir,
    Lenient,
    Memory,
    Overwrite,
    Quiet,
    Ray,
    RayPath,
    RecipeFile,
    ShardSize,
    Threads,
)
from merge_engine.cli.searching import search
from merge_engine.cli.sweeping import sweep
from merge_engine.cli.terminal import console
from merge_engine.cli.verify import verify
from merge_engine.distributed.options import RayOptions, parse_paths
from merge_engine.engine.choosing import choose_device
from merge_engine.engine.run import parse_memory, plans
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.errors import MergeError, OptionError, OutputError, way_out
from merge_engine.observe.versions import versions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TRACEBACK = "MERGE_ENGINE_TRACEBACK"
"""The environment variable that shows the traceback of an internal error."""


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(versions()["merge_engine"])
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Merge models: exactly, at the speed of the disk, in bounded memory."""


@app.command()
def run(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Argument(readable=False, help="The folder to write the merged model to.")],
    device: Device = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    memory: Memory = None,
    shard_size: ShardSize = SHARD_SIZE,
    overwrite: Overwrite = False,
    lenient: Lenient = False,
    intermediate_dir: IntermediateDir = None,
    ray: Ray = None,
    ray_path: RayPath = None,
    quiet: Quiet = False,
) -> None:
    """Merge checkpoints as a recipe says."""
    merge(
        recipe,
        output,
        device=device,
        backend=backend,
        threads=threads,
        memory=memory,
        shard_size=shard_size,
        overwrite=overwrite,
        lenient=lenient,
        intermediate_dir=intermediate_dir,
        quiet=quiet,
        **_engine(ray, ray_path or []),
    )


def _engine(ray: str | None, paths: list[str]) -> dict[str, Any]:
    """The arguments of ``run`` that say where to merge."""
    if ray is None:
        if paths:
            raise OptionError("--ray-path: needs --ray")
        return {}
    return {"engine": "ray", "ray": RayOptions(ray, parse_paths(paths))}


@app.command()
def plan(
    recipe: RecipeFile,
    output: Annotated[
        Path | None, typer.Argument(readable=False, help="The folder that the merge would be written to.")
    ] = None,
    device: Device = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    memory: Memory = None,
    shard_size: ShardSize = SHARD_SIZE,
    overwrite: Overwrite = False,
    lenient: Lenient = False,
) -> None:
    """Check a merge: show what it would read and write, and report all problems."""
    with plans(recipe, output, shard_size=shard_size, overwrite=overwrite, lenient=lenient) as planned:
        show.warnings(planned[-1].warnings)
        for each in planned:
            notes: list[str] = []
            folder = output if each is planned[-1] else None
            device_of = choose_device(each, folder, backend, threads, device, notes)
            chosen = backend_or_kind(backend, threads, device_of, notes)
            with open_access(each, chosen) as access:
                schedule = schedule_for(each, access, chosen, parse_memory(memory))
                show.plan(console, schedule, folder, access.way, chosen, notes)


@app.command()
def report(
    output: Annotated[Path, typer.Argument(readable=False, help="The output folder of a merge.")],
) -> None:
    """Write a report into an output folder: losses to the election, norms and angles, as a page and as JSON."""
    with show.Progress(console, "reading") as progress:
        page, numbers = merge_engine.write_report(
            output, on_schedule=progress.start, progress=progress.advance
        )
    terminal.result_is_on_disk()
    for path in (page, numbers):
        console.print(terminal.cell(f"wrote {path}"), soft_wrap=True)


@app.command()
def doctor(
    measure: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Measure memory, the disk of this folder and the link to a GPU, and keep the limits for plan.",
        ),
    ] = None,
) -> None:
    """Show which backends work on this machine, and why others do not."""
    show.pairs(console, examine())
    if measure is not None:
        from merge_engine.bench.probe import measure_limits

        show.limits(console, measure, measure_limits(measure))


app.command()(verify)
app.command()(diff)
app.command()(bench)
app.command()(search)
app.command()(sweep)
app.command("mergekit-yaml")(mergekit_yaml)
app.command("mergekit-multi")(mergekit_multi)
app.command("mergekit-pytorch")(mergekit_pytorch)


def call() -> int:
    """Run the command line and return its exit code: 2 for a wrong option, 1 for other errors, one line each."""
    try:
        code = app(standalone_mode=False)
        if lost := terminal.lost_output():
            raise OutputError(f"stdout: cannot be written: {lost.strerror}; write it to another place")
        return code if isinstance(code, int) else 0
    except MergeError as error:
        terminal.say("error", error.problems)
        return 2 if isinstance(error, OptionError) else 1
    except typer.TyperException as error:
        terminal.say("error", _wrong_use(error))
        return error.exit_code
    except OSError as error:  # no permission, no space for a temporary file, a disk that fails
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        terminal.say("error", [f"{place}{error.strerror or error}{way_out(error)}"])
    except ImportError as error:  # damaged, or more than the memory holds
        terminal.say("error", [f"a module cannot be loaded: {error}; install merge_engine again"])
    except MemoryError:
        terminal.say("error", ["this machine has too little free memory; a smaller --memory needs less"])
    except Exception as error:  # a fault of this program
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
        terminal.say("error", [f"internal error: {said}; {TRACEBACK}=1 shows where: please report it"])
    return 1


def _wrong_use(error: typer.TyperException) -> list[str]:
    """The line for options and arguments that do not fit a command. None where typer has printed the help instead."""
    message = error.format_message().rstrip(".")
    if not message:
        return []
    message = message.replace("Input should be", "must be").partition(", unable to parse")[0]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "merge-engine"
    return [f"{message[0].lower()}{message[1:]}; `{command} --help` shows what it takes"]
