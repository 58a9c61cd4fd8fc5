"""Row 3: onnxruntime's telemetry is off in every process of ours, before the library is loaded."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.onnx_graph import export_onnx
from tests.command_line import PROGRAM
from tests.conftest import make_pico
from toolchain.checkpoint.directory import copy_companions

ROOT = Path(__file__).parents[2]
PACKAGES = ("toolchain", "export", "serving")
DOOR = "toolchain.onnx_libraries"
# Stands in the place of the library, says whether telemetry was off when it was loaded, and stops there.
STAND_IN = """
import os, sys
print("loaded with", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.stdout.flush()
os._exit(0)
"""


def imported(tree: ast.AST) -> Iterator[str]:
    """Everything that a module imports by a statement or by a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_one_door_to_the_library(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        names = list(imported(ast.parse(path.read_text(encoding="utf-8"))))
        loads = [name for name in names if name.startswith("onnxruntime")]
        if path.name == "genai_builder.py":  # inherits from the vendor's classes
            assert names.index(DOOR) < names.index(loads[0])
        else:
            assert not loads, path


@pytest.mark.parametrize(
    "program, users",
    [
        ("import export.genai_builder", None),
        ("import serving.benchmark.sessions.worker as worker; worker.load_onnx(worker.Path('x'), 'cpu', None)", None),
        ("import toolchain.onnx_libraries as door; door.import_onnx_library('onnxruntime')", "0"),
    ],
)
def test_off_before_it_is_loaded(program: str, users: str | None, tmp_path: Path) -> None:
    """Also where sentei is used as a library; a user who wants telemetry keeps it."""
    for name in ("onnxruntime", "onnxruntime_genai"):
        (tmp_path / f"{name}.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment.pop("ORT_DISABLE_TELEMETRY")
    if users is not None:
        environment["ORT_DISABLE_TELEMETRY"] = users
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == f"loaded with {users or 1}\n", done.stderr


def test_nothing_is_written_into_the_home_directory(demo_model: Path, tmp_path: Path) -> None:
    """With the real library, which writes its identity before the first token."""
    source, home = tmp_path / "source", tmp_path / "home"
    source.mkdir()
    home.mkdir()
    make_pico(source, head_dim=16, num_hidden_layers=1)
    copy_companions(demo_model, source)
    export_onnx(source, tmp_path / "onnx")
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    del environment["ORT_DISABLE_TELEMETRY"]
    answered = subprocess.run(
        [PROGRAM, "generate", str(tmp_path / "onnx"), "--prompt", "hi", "--max-new-tokens", "2"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr
    assert [path for path in home.rglob("*") if "onnxruntime" in str(path).lower()] == []
