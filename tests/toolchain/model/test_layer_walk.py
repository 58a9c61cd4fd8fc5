"""Layers in memory and on disk are changed alike, and compute what the written checkpoint does."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import prune_by_hand
from tests.families import make_family_pico
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.metrics.perplexity import token_losses
from toolchain.model import layer_walk
from toolchain.model.disk_layers import DiskLayers, open_walk
from toolchain.model.layer_walk import LayerWalk


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("family", "variant"), [("llama", "biased-tied"), ("gemma3_text", "alternating")])
def test_an_ffn_without_neurons_is_gone_with_its_bias(tmp_path: Path, family: str, variant: str, offload: bool):
    source, out = tmp_path / "source", tmp_path / "out"
    make_family_pico(source, family, variant)
    out.mkdir()
    kept = prune_by_hand(source, out, removed_attention=set(), width=(48, 0, 24, 48).__getitem__)
    assert [len(each) for each in kept] == [48, 0, 24, 48]
    walk = open_walk(open_checkpoint(source), dtype=torch.float32, device="cpu", offload=offload)
    walk.layers.narrow([np.asarray(each) for each in kept])
    written = open_walk(open_checkpoint(out), dtype=torch.float32, device="cpu", offload=False)
    ids = torch.randint(0, 96, (1, 12))
    with torch.inference_mode():
        assert torch.equal(*(each.forward(each.embed(ids)) for each in (walk, written)))


@pytest.fixture
def offloaded(tmp_path: Path) -> LayerWalk:
    make_family_pico(tmp_path, "llama", "grouped")
    return open_walk(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu", offload=True)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_a_layer_that_waits_is_as_narrow_as_can_be(tmp_path: Path, stored: torch.dtype, computed: torch.dtype):
    make_family_pico(tmp_path, "llama", "grouped")
    file = tmp_path / "model.safetensors"
    save_file({name: each.to(stored) for name, each in load_file(file).items()}, file, {"format": "pt"})
    layers = open_walk(open_checkpoint(tmp_path), dtype=computed, device="cpu", offload=True).layers
    narrower = min(stored, computed, key=lambda dtype: dtype.itemsize)
    assert {weight.dtype for weight in layers._read(1).values()} == {narrower}
    with layers.layer(0) as module:
        assert {weight.dtype for weight in module.parameters()} == {computed}


def test_a_block_leaves_half_of_the_memory_free(offloaded: LayerWalk, monkeypatch: pytest.MonkeyPatch):
    together, seq_len = 32, 64
    state_bytes = seq_len * 32 * 4
    # What enters a layer and what leaves it, of so many sequences, are half of this.
    monkeypatch.setattr(layer_walk, "available_bytes", lambda device: 3 * together * state_bytes * 4)
    assert [len(block) for block in offloaded.blocks(torch.zeros(200, seq_len))] == [3 * together, 3 * together, 8]


def test_processes_that_share_a_machine_share_its_memory(offloaded: LayerWalk, monkeypatch: pytest.MonkeyPatch):
    """Three of them, each taking half of all that is free, would be killed by the system."""
    together, seq_len = 32, 64
    monkeypatch.setattr(layer_walk, "available_bytes", lambda device: 3 * together * seq_len * 32 * 4 * 4)
    offloaded.num_sharing = 3
    assert [len(block) for block in offloaded.blocks(torch.zeros(200, seq_len))] == [together] * 6 + [8]


def test_a_block_is_gone_before_the_next_one_comes(offloaded: LayerWalk, monkeypatch: pytest.MonkeyPatch):
    ids, real, left = torch.randint(0, 96, (40, 64)), offloaded.forward, []
    monkeypatch.setattr(layer_walk, "available_bytes", lambda device: 0)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        assert not any(each() is not None for each in left)
        found = real(hidden)
        left.append(weakref.ref(found))
        return found

    monkeypatch.setattr(offloaded, "forward", forward)
    assert token_losses(offloaded, ids).shape == (40, 63)
    assert len(left) == 2


def test_sequences_that_do_not_share_a_call_come_out_in_their_places(offloaded: LayerWalk):
    ids = torch.randint(0, 96, (70, 64))
    with torch.inference_mode(), offloaded.layers.layer(0) as module:
        hidden = offloaded.embed(ids)
        together = offloaded.run(module, 0, hidden)
        assert torch.equal(together, torch.cat([offloaded.run(module, 0, part) for part in hidden.split(32)]))


def test_the_next_layer_is_read_ahead_in_either_direction(offloaded: LayerWalk, monkeypatch: pytest.MonkeyPatch):
    layers, read = offloaded.layers, []
    assert isinstance(layers, DiskLayers)
    real = layers._read
    monkeypatch.setattr(layers, "_read", lambda index: (read.append(index), real(index))[1])
    for index in (0, 1, 2, 3, 3, 2, 1, 0):
        with layers.layer(index):
            pass
    assert read == [0, 1, 2, 3, 3, 2, 1, 0]
