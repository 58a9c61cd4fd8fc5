"""The checkpoints that ``benchmarks/gpu.sh`` measures have the shapes that they are called by."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolchain.checkpoint.directory import open_checkpoint
from toolchain.model.loading import load_model

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "random_checkpoint.py"


@pytest.mark.acceptance
def test_shapes_are_those_that_pruning_gives(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--shape", "small", "--sparsity", "0.25"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"})
    original, pruned = (open_checkpoint(tmp_path / name) for name in ("original", "pruned-0.25"))
    removed = 1 - pruned.num_block_parameters / original.num_block_parameters
    assert removed == pytest.approx(0.25, abs=0.06)  # widths are multiples of 64, and this model is small
    assert removed >= 0.25
    assert all(layer.intermediate_size % 64 == 0 for layer in pruned.layout)
    logits = load_model(tmp_path / "pruned-0.25", dtype=torch.float32)(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 60000)
    assert torch.isfinite(logits).all()


def test_the_large_shape_is_llama_3_8bs(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from random_checkpoint import SHAPES

    shape = SHAPES["llama-3-8b"]
    hidden, width, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * 128
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width + 2 * hidden
    assert 32 * block + 2 * shape["vocab_size"] * hidden + hidden == 8_030_261_248
