"""A user may have folders of their own that are named as sentei's packages are.

docs/decisions/import-names.md says which ways of starting Python find them first.
"""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from serving.server.vllm.server import launcher_command, launcher_environment
from tests.command_line import PROGRAM

ROOT = Path(__file__).parents[1]

# What 'vllm serve' does first in a process of its own and then in a child: it loads the plugins and looks at the class.
LOOKS_AT_A_CLASS = """
from vllm.plugins import load_general_plugins

if __name__ == "__main__":
    load_general_plugins()
    from vllm import ModelRegistry

    print(ModelRegistry.models["PrunedLlamaForCausalLM"].inspect_model_cls().architecture)
"""


@pytest.fixture
def strangers_project(tmp_path: Path) -> Path:
    """A directory with folders that must not be imported."""
    project = tmp_path / "project"
    for name in ("toolchain", "export", "serving"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(f"raise RuntimeError('The {name} of a stranger was imported.')\n")
    return project


def run_in(directory: Path, command: list[str], environment: dict[str, str] | None = None) -> CompletedProcess[str]:
    # sentei is found behind the working directory, as an installed package is.
    environment = {**(os.environ if environment is None else environment), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def without_safe_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def test_the_folders_are_found_first(strangers_project):
    done = run_in(strangers_project, [sys.executable, "-c", "import serving"], without_safe_path())
    assert "The serving of a stranger was imported." in done.stderr


@pytest.mark.parametrize("words", [["--version"], ["plan", "show", "--help"], ["export", "vllm", "--help"]])
def test_sentei(strangers_project, words):
    done = run_in(strangers_project, [PROGRAM, *words], without_safe_path())
    assert done.returncode == 0, done.stderr


def test_sentei_serve(strangers_project, vllm):
    done = run_in(strangers_project, launcher_command("--version"), launcher_environment())
    assert done.returncode == 0, done.stderr


def test_vllm_serve(strangers_project, tmp_path, vllm):
    # As the program 'vllm': Python puts the script's directory on the path, and not the working directory.
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text(LOOKS_AT_A_CLASS)
    done = run_in(strangers_project, [sys.executable, str(script)], without_safe_path())
    assert done.stdout.endswith("PrunedLlamaForCausalLM\n"), done.stderr


@pytest.mark.acceptance
@pytest.mark.xfail(strict=True, reason="python -m puts the working directory first: docs/decisions/import-names.md")
def test_vllm_as_a_module(strangers_project, vllm):
    # As 'python -m vllm.entrypoints.openai.api_server'.
    (strangers_project / "program.py").write_text(LOOKS_AT_A_CLASS)
    done = run_in(strangers_project, [sys.executable, "-m", "program"], without_safe_path())
    assert done.stdout.endswith("PrunedLlamaForCausalLM\n"), done.stderr
