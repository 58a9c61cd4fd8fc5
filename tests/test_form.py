"""The form of the code: small functions outside the command line, and a place for every module."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

MOST_PARAMETERS, MOST_LINES = 8, 60
ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for package in ("toolchain", "serving", "export"):
        for file in sorted((ROOT / package).rglob("*.py")):
            path = file.relative_to(ROOT)
            if path.parts[:2] == ("toolchain", "cli"):
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, Function):
                    yield f"{path.as_posix()}:{node.name}", node


def num_parameters(function: Function) -> int:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + bool(given.vararg) + bool(given.kwarg)


def num_lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_functions_stay_small() -> None:
    found = {
        name: (num_parameters(function), num_lines(function))
        for name, function in functions()
        if num_parameters(function) > MOST_PARAMETERS or num_lines(function) > MOST_LINES
    }
    assert found == {}


def test_each_folder_says_who_may_import_whom() -> None:
    """Else a new folder would be without order. That a module has a place in its folder's list, lint-imports checks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    ordered = {
        container
        for contract in settings["contracts"]
        if contract["type"] == "layers" and contract["exhaustive"]
        for container in contract["containers"]
    }
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in settings["root_packages"]
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert folders == ordered


def test_what_the_vllm_plugin_stands_on_needs_the_standard_library_alone() -> None:
    """It runs inside a user's server: what it imports must not bring another version of anything."""
    modules = [f"toolchain.architecture.{file.stem}" for file in (ROOT / "toolchain/architecture").glob("[!_]*.py")]
    modules += [f"toolchain.{name}" for name in ("errors", "json_files", "lifetime", "safetensors_files")]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"
    # -S: without site-packages.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
