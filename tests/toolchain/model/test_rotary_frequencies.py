"""Checkpoints of Llama 2's time hold each layer's rotary frequencies, which every model computes itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import prune_by_hand
from tests.families import make_family_pico
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.model.disk_layers import open_offloaded
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model


@pytest.fixture
def old_model(tmp_path: Path) -> Path:
    directory = tmp_path / "old"
    make_family_pico(directory, "llama", "grouped")
    tensors = load_file(directory / "model.safetensors")
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_it_runs_the_same_in_memory_and_from_disk(old_model: Path):
    checkpoint = open_checkpoint(old_model)
    ids = torch.randint(0, 96, (1, 12))
    offloaded = open_offloaded(checkpoint, dtype=torch.float32, device="cpu")
    loaded = LayerWalk(load_model(checkpoint, dtype=torch.float32), checkpoint.family)
    with torch.inference_mode():
        assert torch.equal(*(walk.forward(walk.embed(ids)) for walk in (loaded, offloaded)))


def test_they_are_not_carried_along(old_model: Path, tmp_path: Path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune_by_hand(old_model, pruned, removed_attention={1}, width=lambda layer: 48)
    assert not any("inv_freq" in name for name in load_file(pruned / "model.safetensors"))
