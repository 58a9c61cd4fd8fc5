"""Writes docs/structure.md, one line per module: the first sentence of its docstring.

``python docs/structure.py`` writes the file, ``python docs/structure.py --check`` fails if it is not up to date.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "structure.md"
FOLDERS = ("toolchain", "export", "serving")
HEAD = "# Every module in one line\n\nWritten by `make structure` from the first lines of the modules' docstrings.\n"


def main() -> None:
    """Writes the page, or compares it with what would be written."""
    text = HEAD + "".join(_section(package) for folder in FOLDERS for package in _packages(ROOT / folder))
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/structure.md is not up to date. Run 'make structure'.")


def _packages(folder: Path) -> list[Path]:
    """The folder and the packages below it, each before those that it contains."""
    return sorted(file.parent for file in folder.rglob("__init__.py"))


def _section(package: Path) -> str:
    """A package's own line, and a table of its modules."""
    name = package.relative_to(ROOT).as_posix()
    modules = [file for file in sorted(package.glob("*.py")) if file.name != "__init__.py"]
    lines = [f"\n## {name}/\n", f"{_first_line(package / '__init__.py')}\n"]
    if modules:
        lines += ["| module | what it is |", "|---|---|"]
        lines += [f"| [{file.stem}](../{name}/{file.name}) | {_cell(_first_line(file))} |" for file in modules]
        lines.append("")
    return "\n".join(lines)


def _first_line(file: Path) -> str:
    """The first line of a module's docstring.

    Raises:
        SystemExit: There is none.
    """
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not docstring:
        sys.exit(f"{file.relative_to(ROOT)} has no docstring.")
    return docstring.splitlines()[0].replace("``", "`")


def _cell(text: str) -> str:
    """The text as Markdown that does not end the table's cell; roles of Sphinx become plain code."""
    for role in (":func:", ":mod:", ":class:"):
        text = text.replace(role, "")
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
