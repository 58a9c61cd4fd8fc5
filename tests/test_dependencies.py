"""What everybody installs is enough to prune: nothing that only an extra brings is needed."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Runs a command in which our own code cannot import the modules that are named before it; what libraries do is theirs.
WITHOUT = """
import builtins, sys
names, real = set(sys.argv[1].split(",")), builtins.__import__
def refuse(name, globals=None, *more, **named):
    importer = (globals or {}).get("__name__", "")
    if name.partition(".")[0] in names and importer.startswith(("toolchain.", "serving.", "export.")):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *more, **named)
builtins.__import__ = refuse
sys.argv[:] = ["sentei", *sys.argv[2:]]
from toolchain.cli.app import main
main()
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(asked: list[str]) -> set[str]:
    """All distributions that pip installs with these, by name."""
    found: set[str] = set()
    open_ends = [Requirement(each) for each in asked]
    while open_ends:
        each = open_ends.pop()
        if canonical(each.name) in found or (each.marker and not each.marker.evaluate({"extra": ""})):
            continue
        found.add(canonical(each.name))
        try:
            open_ends += [Requirement(line) for line in requires(each.name) or ()]
        except PackageNotFoundError:
            continue
    return found


def test_no_extra_is_needed_to_prune(pico_model: Path, text: Path, tmp_path: Path):
    always = brought_by(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]) | {"sentei"}
    extras = [
        module
        for module, distributions in packages_distributions().items()
        if not any(canonical(each) in always for each in distributions)
    ]
    assert {"onnxruntime", "lm_eval", "vllm", "peft"} <= set(extras)
    done = subprocess.run(
        [
            sys.executable, "-c", WITHOUT, ",".join(extras), "prune", pico_model, "-o", tmp_path / "out",
            "--calibration", text, "--sparsity", "0.3", "--samples", "4", "--seq-len", "16", "--align", "8",
        ],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
