"""The scripts in examples/, each from a model to a result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.server.process import free_port
from tests.command_line import PROGRAM
from tests.docs.commands import ROOT, sentei_commands
from tests.docs.test_commands import what_is_wrong
from toolchain.plan.plan import load_plan

EXAMPLES = sorted((ROOT / "examples").iterdir())
SMALL = ("--samples", "4", "--seq-len", "16", "--align", "8")


def test_each_is_short() -> None:
    assert len(EXAMPLES) == 3
    num_lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES}
    assert {name: number for name, number in num_lines.items() if number > 40} == {}


def test_their_commands_can_be_typed() -> None:
    scripts = [path for path in EXAMPLES if path.suffix == ".sh"]
    shown = [command for script in scripts for command in sentei_commands(script)]
    assert len(shown) >= 9
    # What a caller adds.
    given = {"$precision": "int8"}
    typed = {str(each): [given.get(word, word) for word in each.words if word != "${@:4}"] for each in shown}
    wrong = {command: what_is_wrong(words) for command, words in typed.items()}
    assert {command: reason for command, reason in wrong.items() if reason} == {}


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What the script prints; it finds sentei as in an environment that is active."""
    path = f"{Path(PROGRAM).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.acceptance
def test_plan_by_hand(narrow_model: Path, text: Path, tmp_path: Path) -> None:
    run(sys.executable, ROOT / "examples" / "plan_by_hand.py", narrow_model, text, "out", *SMALL, cwd=tmp_path)
    layers = load_plan(tmp_path / "out" / "pruned").document.layers
    assert [each.intermediate_size for each in layers] == [384] * 10 + [192] * 10 + [384] * 10
    assert [each.layer for each in layers if each.attention == "remove"] == [10]


@pytest.mark.acceptance
def test_onnx_on_a_cpu(narrow_model: Path, text: Path, tmp_path: Path) -> None:
    # Rounding changes the answers of random weights more than verification allows.
    script = ROOT / "examples" / "onnx_on_a_cpu.sh"
    said = run(script, narrow_model, text, "out", *SMALL, cwd=tmp_path, PRECISION="fp32")
    assert "output_throughput" in said
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
def test_prune_and_serve(narrow_model: Path, text: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "prune_and_serve.sh"
    options = {"PORT": str(free_port()), "SERVE_OPTIONS": "--enforce-eager --kv-cache-memory-bytes 1G"}
    said = run(script, narrow_model, text, "out", *SMALL, cwd=tmp_path, **options)
    assert '"completion_tokens":16' in said
