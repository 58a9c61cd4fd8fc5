"""An interrupted sweep and an interrupted search are not taken for each other, and neither is deleted unasked."""

from pathlib import Path

import pytest
import torch

from tests.families import make_family_pico
from toolchain.errors import SenteiError
from toolchain.pipeline import PruneSettings, prune
from toolchain.search_state import SearchState
from toolchain.sweep import sweep

SETTINGS = PruneSettings(
    sparsity=0.3,
    calibration=(),
    num_samples=1,
    seq_len=8,
    align=1,
    attention_removals=None,
    device="cpu",
    dtype=torch.float32,
    seed=0,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    make_family_pico(directory, "llama", "grouped")
    return directory


def unfinished(tmp_path: Path, *plans: str) -> list[Path]:
    found = [tmp_path / "out.search" / plan for plan in plans]
    for path in found:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return found


def test_a_search_does_not_delete_an_interrupted_sweep(model: Path, tmp_path: Path):
    kept = unfinished(tmp_path, "0.1/plan.json", "0.2/plan.json")
    with pytest.raises(SenteiError, match="--resume"):
        prune(model, tmp_path / "out", SETTINGS, model_name="pico")
    assert all(path.exists() for path in kept)


def test_a_sweep_is_not_resumed_as_a_search(tmp_path: Path):
    unfinished(tmp_path, "0.1/plan.json")
    with pytest.raises(SenteiError, match="interrupted sweep"):
        SearchState(tmp_path / "out.search").load(None)  # type: ignore[arg-type]


def test_a_search_is_not_resumed_as_a_sweep(model: Path, tmp_path: Path):
    [kept] = unfinished(tmp_path, "plan.json")
    with pytest.raises(SenteiError, match="one sparsity"):
        sweep(model, tmp_path / "out", SETTINGS, [0.1, 0.2], model_name="pico", resume=True)
    assert kept.exists()
