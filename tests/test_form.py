"""No function outside the command line has more than 8 parameters or 60 lines."""

import ast
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
