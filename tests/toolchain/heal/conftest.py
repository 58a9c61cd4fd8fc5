"""What tests of healing share."""

from pathlib import Path

import pytest

from tests.command_line import PLAIN, sentei


@pytest.fixture(scope="session")
def pruned_pico(pico_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model by ``sentei prune``, with a plan: an attention less, and narrower FFNs."""
    out = tmp_path_factory.mktemp("healing") / "pruned"
    settings = ("--sparsity", 0.3, "--samples", 2, "--seq-len", 64, "--align", 8, "--attention-removals", 1)
    done = sentei("prune", pico_model, "-o", out, "--calibration", text, *settings, *PLAIN, "--quiet")
    assert done.returncode == 0, done.stderr
    return out
