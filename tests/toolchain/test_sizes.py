"""Functions that one can take in: at most 60 lines and 8 parameters outside the command line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import toolchain

MOST_LINES, MOST_PARAMETERS = 60, 8


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    root = Path(toolchain.__file__).parent
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if place.parts[0] == "cli":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{place}: {node.name}", node


def test_no_function_is_too_long_or_has_too_many_parameters():
    too_large = []
    for name, node in functions():
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        num_parameters = sum(each.arg not in ("self", "cls") for each in given)
        if lines > MOST_LINES or num_parameters > MOST_PARAMETERS:
            too_large.append(f"{name}: {lines} lines, {num_parameters} parameters")
    assert too_large == []
