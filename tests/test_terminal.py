"""What is printed: nothing of it moves the cursor, hides, or makes a line of its own, whoever chose the names.

And no print, or the lack of a place to print to, makes a command fail.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import merge_engine as me
from merge_engine.cli import app, show, terminal
from merge_engine.cli.app import call as command_line
from merge_engine.errors import BackendChoiceError, MergeError, NotBuiltError
from merge_engine.text import cut

ATTACKS = (
    "\x1b[2J",
    "\x1b]52;c;cm0gLXJmIH4=\x07",
    "\x1b]8;;http://nowhere\x1b\\click",
    "\x9b2J\x90q\x9c",
    "\rerror: all is well",
    "\nerror: all is well",
    "\x85error: all is well",
    "\u2028error: all is well\u2029",
    "\x0b\x0c\x1c\x1d\x1eerror: all is well",
    "\b\b\b\b\b\bok",
    "\u202egpj.exe",
    "\u2066a\u2069\u200f\u200e",
    "a\u200bb\u200d\ufeff\u00ad",
    "\U000e0041\ue000",
    "[red]x[/red]",
    "[link=file:///x]x[/link]",
    "[/]",
    ":warning:",
    "{0}%s%n\\x1b",
)
"""Texts for which a terminal, rich, or a reader of lines would do more than show them."""

TEXTS = st.one_of(
    st.sampled_from(ATTACKS),
    st.text(st.sampled_from("".join(ATTACKS)), min_size=1, max_size=20),
    st.text(min_size=1, max_size=20),
)


class Said(NamedTuple):
    """The end of a command: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Said:
    """Runs the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["merge-engine", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = command_line()
    return Said(code, out.getvalue(), err.getvalue())


def assert_harmless(said: Said) -> None:
    for text in (said.out, said.err):
        assert all(one.isprintable() or one == "\n" for one in text), repr(text)
    for line in said.err.split("\n")[:-1]:
        assert line.startswith(("error: ", "warning: ")), repr(line)
        assert len(line) < 1100
    assert "Traceback" not in said.err and "internal error" not in said.err, said.err
    assert bool(said.code) == ("error: " in said.err)


def save(folder: Path, name: str = "w", shard: str = "") -> Path:
    """A checkpoint with one tensor; with a shard, an index that names it and no weights."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if shard:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: shard}}))
    else:
        # Models with the same tensors would get a warning.
        start = float(len(folder.name))
        save_file({name: torch.arange(start, start + 4)}, folder / "model.safetensors")
    return folder


def recipe(folder: Path, *models: Path, **keys: object) -> str:
    """The path of a recipe."""
    file = folder / "recipe.yaml"
    content = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models],
    }
    file.write_text(yaml.safe_dump(content | keys))
    return str(file)


Place = Callable[[Path, str], list[str]]


def in_tensor(folder: Path, text: str) -> list[str]:
    base = save(folder / "a")
    keys = {"merge_method": "task_arithmetic", "base_model": str(base)}
    return ["run", recipe(folder, base, save(folder / "b", "w" + text), **keys), str(folder / "out")]


def in_tensor_with_nan(folder: Path, text: str) -> list[str]:
    (folder / "a").mkdir()
    save_file({text: torch.tensor([float("nan")])}, folder / "a" / "model.safetensors")
    return ["run", recipe(folder, folder / "a", folder / "a"), str(folder / "out")]


def in_shard(folder: Path, text: str) -> list[str]:
    return ["plan", recipe(folder, save(folder / "a", shard=f"{text}.safetensors"), folder / "a")]


def in_folder(folder: Path, text: str) -> list[str]:
    named = folder / ("m" + text.replace("/", "").replace("\0", ""))
    return ["plan", recipe(folder, save(folder / "a"), save(named)), str(named) + "/out"]


def in_output(folder: Path, text: str) -> list[str]:
    models = save(folder / "a"), save(folder / "b")
    return ["run", recipe(folder, *models), str(folder / ("o" + text.replace("/", "").replace("\0", "")))]


def in_method(folder: Path, text: str) -> list[str]:
    return ["plan", recipe(folder, save(folder / "a"), merge_method=text)]


def in_key(folder: Path, text: str) -> list[str]:
    keys: dict[str, object] = {"x" + text: 1, "parameters": {text: 1}}
    return ["plan", recipe(folder, save(folder / "a"), **keys)]


def in_dtype(folder: Path, text: str) -> list[str]:
    return ["plan", recipe(folder, save(folder / "a"), dtype=text)]


def in_filter(folder: Path, text: str) -> list[str]:
    models = [{"model": str(save(folder / "a")), "parameters": {"weight": [{"filter": text, "value": 1}]}}]
    return ["plan", recipe(folder, models=models)]


def in_model(folder: Path, text: str) -> list[str]:
    return ["plan", recipe(folder, folder / text)]


def in_recipe_path(folder: Path, text: str) -> list[str]:
    return ["plan", str(folder / ("r" + text.replace("\0", "")))]


def in_option(option: str) -> Place:
    def place(folder: Path, text: str) -> list[str]:
        return [
            "run",
            recipe(folder, save(folder / "a"), folder / "a"),
            str(folder / "out"),
            option,
            "x" + text,
        ]

    return place


def in_option_name(folder: Path, text: str) -> list[str]:
    return ["plan", f"--x{text}"]


def in_command(folder: Path, text: str) -> list[str]:
    return ["x" + text]


def in_bench(folder: Path, text: str) -> list[str]:
    return ["bench", "--sizes", "x" + text]


def in_doctor(folder: Path, text: str) -> list[str]:
    return ["doctor", "--measure", str(folder / ("x" + text))]


def in_report(folder: Path, text: str) -> list[str]:
    return ["report", str(folder / ("x" + text.replace("\0", "")))]


PLACES: dict[str, Place] = {
    "tensor": in_tensor,
    "tensor with nan": in_tensor_with_nan,
    "shard": in_shard,
    "folder": in_folder,
    "output": in_output,
    "method": in_method,
    "key": in_key,
    "dtype": in_dtype,
    "filter": in_filter,
    "model": in_model,
    "recipe's path": in_recipe_path,
    **{
        option: in_option(option)
        for option in ("--backend", "--device", "--memory", "--shard-size", "--threads")
    },
    "option": in_option_name,
    "command": in_command,
    "bench": in_bench,
    "doctor": in_doctor,
    "report": in_report,
}


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=25)
@given(TEXTS)
def test_nothing_printed_does_more_than_show(place: str, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_harmless(call(*PLACES[place](Path(folder), text)))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_in_the_corpus_does_more_than_show(place: str, tmp_path: Path) -> None:
    for number, text in enumerate(ATTACKS):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_harmless(call(*PLACES[place](folder, text)))


@pytest.mark.parametrize("place", ["output", "recipe's path", "report"])
def test_bytes_that_are_no_text_are_escaped(place: str, tmp_path: Path) -> None:
    said = call(*PLACES[place](tmp_path, "a\udcffb"))
    assert_harmless(said)
    assert r"a\udcffb" in "".join(f"{said.out}{said.err}".split())  # which joins the lines of a table


def test_markup_is_text(tmp_path: Path) -> None:
    said = call("plan", recipe(tmp_path, save(tmp_path / "[red]x[-red]"), save(tmp_path / "b")))
    assert "[red]x[-red]" in "".join(said.out.split())


def test_a_name_makes_no_line_of_its_own() -> None:
    error = me.PlanError(["a\nerror: b", "c"])
    assert error.problems == [r"a\nerror: b", "c"]
    assert str(error) == "a\\nerror: b\nc"


@pytest.mark.parametrize(
    "kind", [MergeError, *MergeError.__subclasses__(), BackendChoiceError, NotBuiltError]
)
@given(st.lists(st.text(), min_size=1))
def test_copies_of_an_error_keep_its_problems_apart(kind: type[MergeError], problems: list[str]) -> None:
    error = kind(problems)
    error.__cause__ = ValueError()
    for made in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (type(made), made.problems, str(made), made.args) == (
            kind,
            error.problems,
            str(error),
            error.args,
        )
    assert kind("one").problems == ["one"]


def test_long_lines_are_cut_in_the_middle_and_floods_counted() -> None:
    err = io.StringIO()
    with redirect_stderr(err):
        terminal.say("error", [f"begin{'x' * 9_000_000}end"] + ["short"] * 5_000)
    lines = err.getvalue().splitlines()
    assert len(lines) == 101 and max(map(len, lines)) < 1_010
    assert lines[0].startswith("error: begin") and lines[0].endswith("end")
    assert lines[-1] == "error: and 4,901 more"


@given(st.text(max_size=300), st.integers(100, 200))
def test_a_cut_text_has_its_length_or_less(text: str, longest: int) -> None:
    short = cut(text, longest)
    assert short == text if len(text) <= longest else len(short) <= longest
    assert short[:10] == text[:10] and short[-10:] == text[-10:]


def test_models_are_told_apart_in_a_narrow_table(tmp_path: Path) -> None:
    deep = tmp_path / ("a-long-name" * 10)
    deep.mkdir()
    base, one, other = (save(deep / name) for name in ("base", "one", "other"))
    file = recipe(tmp_path, one, other, merge_method="ties", base_model=str(base), parameters={"density": 1})
    said = call("run", file, str(tmp_path / "out"))
    assert {line.split()[0] for line in said.out.splitlines()} >= {"one", "other"}


def test_warnings_of_a_plan_are_escaped() -> None:
    err = io.StringIO()
    with redirect_stderr(err):
        show.warnings(["a\x1b[2J\rerror: b"])
    assert err.getvalue() == "warning: a\\x1b[2J\\rerror: b\n"


class Setting(NamedTuple):
    """A merge to be started by a shell."""

    folder: Path
    environment: dict[str, str]

    def shell(
        self, arguments: str, redirected: str = "", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        command = f'"$0" -m merge_engine {arguments} {redirected}'
        return subprocess.run(
            ["bash", "-c", command, sys.executable],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
        )

    @property
    def merged(self) -> bool:
        return (self.folder / "out" / "model.safetensors").exists()


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    recipe(tmp_path, save(tmp_path / ("a" * 90)), save(tmp_path / ("b" * 92)))
    return Setting(tmp_path, dict(os.environ))


REDIRECTED = (
    ">&-",
    "2>&-",
    "<&- >&- 2>&-",
    ">/dev/full",
    "2>/dev/full",
    ">/dev/full 2>&1",
    "| head -c 0; exit ${PIPESTATUS[0]}",
    "| true; exit ${PIPESTATUS[0]}",
)


@pytest.mark.parametrize("redirected", REDIRECTED)
def test_nobody_need_listen(setting: Setting, redirected: str) -> None:
    done = setting.shell("run recipe.yaml out --threads 1", redirected)
    assert (done.returncode, done.stderr) == (0, b"") and setting.merged
    done = setting.shell("run recipe.yaml out", redirected)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert ("2>" in redirected) or done.stderr.startswith(b"error: out: ")


def test_what_is_only_printed_must_be_printed(setting: Setting) -> None:
    done = setting.shell("plan recipe.yaml", ">/dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        b"error: stdout: cannot be written: No space left on device; write it to another place\n",
    )
    assert setting.shell("plan recipe.yaml", "| true; exit ${PIPESTATUS[0]}").returncode == 0


def test_files_of_a_merge_do_not_take_the_place_of_closed_streams(setting: Setting) -> None:
    assert setting.shell("run recipe.yaml out", "<&- >&- 2>&-").returncode == 0
    assert load_file(setting.folder / "out" / "model.safetensors")["w"].tolist() == [91, 92, 93, 94]


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_any_encoding_will_do(setting: Setting, environment: dict[str, str]) -> None:
    for arguments in ("plan recipe.yaml 合并", "run recipe.yaml 合并"):
        done = setting.shell(arguments, COLUMNS="40", **environment)
        assert (done.returncode, done.stderr) == (0, b"") and done.stdout.isascii()
    done = setting.shell("plan 模.yaml", **environment)
    assert done.returncode == 1 and done.stderr.startswith(b"error: ") and done.stderr.isascii()


@pytest.mark.parametrize("columns", ["0", "1", "10"])
def test_a_table_needs_some_width(setting: Setting, columns: str) -> None:
    shown = setting.shell("plan recipe.yaml", COLUMNS=columns).stdout.decode()
    assert "merge_method" in shown or "linear" in shown


def test_nothing_beside_the_models_is_imported(setting: Setting) -> None:
    for name in ("yaml", "rich", "typer", "pydantic", "torch", "evil"):
        (setting.folder / f"{name}.py").write_text("open('pwned', 'w')")
    package = setting.folder / "evil-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[merge_engine.methods]\nevil = evil:Method\n")
    assert setting.shell("run recipe.yaml out").returncode == 0 and setting.merged
    (setting.folder / "evil.yaml").write_text("merge_method: evil\nmodels: [{model: a}]\n")
    assert b"there is no method" in setting.shell("plan evil.yaml").stderr
    assert not (setting.folder / "pwned").exists()


def test_no_home_and_no_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    file = recipe(tmp_path, save(tmp_path / "a"), save(tmp_path / "b"))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert call("plan", file).code == call("run", file, str(tmp_path / "out")).code == 0
    said = call("doctor", "--measure", str(tmp_path / "a"))
    assert_harmless(said)
    assert "set XDG_CACHE_HOME" in said.err


def test_an_interrupt_ends_quietly_whatever_is_being_imported(setting: Setting) -> None:
    """Also where a module that is being imported would swallow it, or make another error of it."""
    command = [
        sys.executable,
        "-c",
        "import merge_engine.cli as c; print(flush=True); c.main()",
        "plan",
        "recipe.yaml",
    ]
    for wait in (0, 0.01, 0.03, 0.06, 0.1, 0.15):
        with subprocess.Popen(
            command, cwd=setting.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.read(1)
            time.sleep(0.003 + wait)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == b""
        assert process.returncode in (0, 130)


def test_an_interrupt_of_a_merge_is_130(setting: Setting) -> None:
    file = str(setting.folder / "recipe.yaml")
    with mock.patch("merge_engine.run", side_effect=KeyboardInterrupt):
        assert call("run", file, "out") == Said(130, "", "error: interrupted\n")


def test_a_fault_of_the_program_is_one_line(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = ZeroDivisionError("a\x1b\nb")
    with mock.patch("merge_engine.cli.app.plans", side_effect=fault):
        said = call("plan", "recipe.yaml")
        assert said.code == 1 and said.err.startswith(r"error: internal error: ZeroDivisionError: a\x1b\nb; ")
        assert said.err.count("\n") == 1
        monkeypatch.setenv(app.TRACEBACK, "1")
        assert "Traceback" in call("plan", "recipe.yaml").err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(13, "Permission denied", "x\r"),
            r"error: x\r: Permission denied; check its permissions",
        ),
        (
            OSError(12, "Cannot allocate memory"),
            "error: Cannot allocate memory; a smaller --memory needs less",
        ),
        (ImportError("no\x1b"), r"error: a module cannot be loaded: no\x1b; install merge_engine again"),
        (OSError("said by nobody"), "error: said by nobody"),
        (MemoryError(), "error: this machine has too little free memory; a smaller --memory needs less"),
    ],
)
def test_errors_of_the_system_are_one_line(error: Exception, line: str) -> None:
    with mock.patch("merge_engine.cli.app.plans", side_effect=error):
        assert call("plan", "recipe.yaml") == Said(1, "", f"{line}\n")
