"""A sweep pays once for what does not depend on the sparsity, and finds what searches one by one would."""

from pathlib import Path

import pytest

from tests.command_line import sentei
from toolchain.prune import apply
from toolchain.prune.search import sensitivity


def test_a_sweep_shares_the_model_and_its_gradients(
    pico_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ("--calibration", text, "--samples", 10, "--seq-len", 16, "--align", 8, "--quiet")
    for sparsity in (0.2, 0.3, 0.4):
        alone = ("prune", pico_model, "-o", tmp_path / f"{sparsity:g}", "--sparsity", sparsity, "--no-compensate")
        assert sentei(*alone, *settings).returncode == 0

    windows, opened = [], []
    gradient, open_walk = sensitivity._gradient_of_loss, apply.open_walk
    monkeypatch.setattr(sensitivity, "_gradient_of_loss", lambda *given: (windows.append(given), gradient(*given))[1])
    monkeypatch.setattr(apply, "open_walk", lambda *given, **more: (opened.append(given), open_walk(*given, **more))[1])
    swept = ("prune", pico_model, "-o", tmp_path / "swept", "--sweep", "0.2:0.4:0.1", "--no-compensate")
    assert sentei(*swept, *settings).returncode == 0
    assert (len(windows), len(opened)) == (8, 1)
    for sparsity in ("0.2", "0.3", "0.4"):
        one, other = (tmp_path / place / "plan.safetensors" for place in (sparsity, f"swept/{sparsity}"))
        assert one.read_bytes() == other.read_bytes()
        one, other = (tmp_path / place / "plan.json" for place in (sparsity, f"swept/{sparsity}"))
        assert one.read_text() == other.read_text()
