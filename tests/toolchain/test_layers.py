"""Layers in memory and on disk are changed alike, and compute what the written checkpoint does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import prune_by_hand
from tests.families import make_family_pico
from toolchain.checkpoint import open_checkpoint
from toolchain.pipeline import open_walk


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
