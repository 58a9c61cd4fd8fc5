"""``kill -9`` in each stage of ``sentei prune`` loses one window or one layer of work: the weights are the same."""

import signal
from pathlib import Path

import pytest

from tests.accidents.stopped_commands import stopped
from tests.command_line import sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.plan.plan import load_plan
from toolchain.prune import compensation
from toolchain.prune.search import sensitivity

# Where each stage rests, and before which call.
STAGES = {
    "reading": ("toolchain.prune.apply:open_walk", 1),
    "gradients": ("toolchain.prune.search.sensitivity:_gradient_of_loss", 4),
    "importance": ("toolchain.prune.search.two_stage:neuron_importance", 1),
    "search": ("toolchain.prune.search.two_stage:measure", 3),
    "compensation": ("toolchain.prune.compensation:_refit_layer", 3),
    "writing": ("toolchain.checkpoint.directory:write_safetensors", 1),
}


def command(model: Path, text: Path, out: Path) -> tuple[object, ...]:
    return (
        "prune", model, "-o", out, "--calibration", text, "--sparsity", 0.3, "--samples", 10, "--seq-len", 16,
        "--align", 8, "--attention-removals", 1, "--quiet",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(pico_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert sentei(*command(pico_model, text, out)).returncode == 0
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_in_a_stage_changes_nothing(
    pico_model: Path, text: Path, tmp_path: Path, whole: Path, stage: str, monkeypatch: pytest.MonkeyPatch
):
    at, call = STAGES[stage]
    out, said = tmp_path / "out", tmp_path / "said"
    said.mkdir()
    with stopped(said, *command(pico_model, text, out), at=at, call=call) as running:
        assert running.kill(signal.SIGKILL) == -9
    assert not out.exists()

    windows, layers = [], []
    gradient, refit = sensitivity._gradient_of_loss, compensation._refit_layer
    monkeypatch.setattr(sensitivity, "_gradient_of_loss", lambda *given: (windows.append(given), gradient(*given))[1])
    monkeypatch.setattr(compensation, "_refit_layer", lambda *given: (layers.append(given), refit(*given))[1])
    assert sentei(*command(pico_model, text, out), "--resume").returncode == 0
    assert (out / "plan.safetensors").read_bytes() == (whole / "plan.safetensors").read_bytes()
    assert load_plan(out).document == load_plan(whole).document
    assert open_checkpoint(out).fingerprint == open_checkpoint(whole).fingerprint
    # Three windows' gradients were taken before the fourth, and two layers fitted before the third.
    assert len(windows) == {"reading": 8, "gradients": 5}.get(stage, 0)
    assert len(layers) == {"compensation": 2, "writing": 0}.get(stage, 4)
