"""The stubs of the native modules say what is there: every class, function and argument, by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from emulated_cuda.backend import load

import merge_engine._native as native

STUBS = Path(native.__file__).parent
Signatures = dict[str, set[tuple[str, ...]]]


def arguments_of(function: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(argument.arg for argument in function.args.args if argument.arg != "self")


def stub_of(body: list[ast.stmt]) -> tuple[dict[str, Signatures | None], Signatures]:
    """Classes with the arguments of their methods (() for properties), and functions."""
    classes: dict[str, Signatures | None] = {}
    functions: Signatures = {}
    for statement in body:
        match statement:
            case ast.ClassDef(name=name):
                inner_classes, methods = stub_of(statement.body)
                assert not inner_classes
                classes[name] = methods
            case ast.FunctionDef(name=name):
                functions.setdefault(name, set()).add(arguments_of(statement))
            case ast.AnnAssign(target=ast.Name(id=name)):
                functions[name] = {()}
    return classes, functions


def split(arguments: str) -> list[str]:
    """Arguments of a signature, with their types."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "[(") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def signatures_of(function: Any) -> set[tuple[str, ...]]:
    """Of all overloads, from what pybind11 says in the docstring."""
    found = re.findall(rf"^(?:\d+\. )?{function.__name__}\((.*)\) -> ", function.__doc__, re.MULTILINE)
    overloads = {
        tuple(name for part in split(arguments) if (name := part.split(":")[0]) != "self")
        for arguments in found
        if arguments != "*args, **kwargs"
    }
    assert overloads, function.__doc__
    return overloads


def module_of(module: ModuleType) -> tuple[dict[str, Signatures], Signatures]:
    """The same as a stub says, from the module itself."""
    classes: dict[str, Signatures] = {}
    functions: Signatures = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if not isinstance(value, type):
            functions[name] = signatures_of(value) if callable(value) else {()}
            continue
        members: Signatures = {}
        for member, own in vars(value).items():
            constructs = member == "__init__" and own.__doc__.startswith("__init__(")  # not object's
            if constructs or not member.startswith("_"):
                function = own.__func__ if isinstance(own, staticmethod) else own
                members[member] = signatures_of(function) if callable(function) else {()}
        classes[name] = members
    return classes, functions


def is_enumeration(value: type) -> bool:
    return hasattr(value, "__members__")


@pytest.mark.parametrize("name", ("_native", "_cuda"))
def test_stubs(name: str) -> None:
    module = native if name == "_native" else load()
    shared, _ = stub_of(ast.parse((STUBS / "_native_types.pyi").read_text()).body)
    classes, functions = stub_of(ast.parse((STUBS / f"{name}.pyi").read_text()).body)
    del shared["NativeTypes"]  # a protocol
    if name == "_cuda":
        functions = classes.pop("Native") or {}
        assert all(functions.pop(each) == {()} for each in classes), "properties of the protocol"
    expected = {**shared, **classes}
    found, found_functions = module_of(module)
    assert found_functions == functions
    assert found.keys() == expected.keys()
    for each, members in found.items():
        value = getattr(module, each)
        if is_enumeration(value):
            assert value.__members__.keys() == expected[each].keys()
        else:
            assert members == expected[each], each
    names = {
        argument for members in found.values() for one in members.values() for a in one for argument in a
    }
    assert not any(argument.startswith("arg") for argument in names), "every argument has a name"
