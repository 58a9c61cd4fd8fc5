import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_pico, prune_by_hand
from toolchain.architecture.families import FAMILIES
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.model.loading import load_model
from toolchain.model.slicing import narrow_ffn, write_pruned

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
LLAMA = FAMILIES["llama"]


@pytest.fixture(scope="module", params=[{}, {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}])
def pico(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pico")
    make_pico(directory, vocab_size=96, **request.param)
    return directory


def masked(directory: Path, removed_attention: set[int], kept: list[np.ndarray]) -> torch.Tensor:
    """Logits of the original with removed parts zeroed: the truth that surgery must reproduce."""
    model = load_model(directory)
    for index, layer in enumerate(model.model.layers):
        gone = np.setdiff1d(np.arange(48), kept[index])
        layer.mlp.down_proj.weight.data[:, gone] = 0
        if len(kept[index]) == 0 and layer.mlp.down_proj.bias is not None:
            layer.mlp.down_proj.bias.data.zero_()
        if index in removed_attention:
            layer.self_attn.o_proj.weight.data.zero_()
            if layer.self_attn.o_proj.bias is not None:
                layer.self_attn.o_proj.bias.data.zero_()
    with torch.inference_mode():
        return model(IDS).logits


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    removed=st.sets(st.integers(0, 3), max_size=3),
    widths=st.lists(st.sampled_from([0, 1, 7, 31, 48]), min_size=4, max_size=4),
)
def test_pruned_equals_masked(pico: Path, tmp_path_factory: pytest.TempPathFactory, removed: set, widths: list):
    out = tmp_path_factory.mktemp("pruned")
    kept = prune_by_hand(pico, out, removed_attention=removed, width=widths.__getitem__)
    with torch.inference_mode():
        logits = load_model(out)(IDS).logits
    torch.testing.assert_close(logits, masked(pico, removed, kept), atol=1e-5, rtol=1e-4)


def test_a_plan_that_keeps_everything_changes_nothing(pico: Path, tmp_path: Path):
    prune_by_hand(pico, tmp_path, removed_attention=set(), width=lambda _: 48)
    assert open_checkpoint(tmp_path).fingerprint == open_checkpoint(pico).fingerprint
    assert open_checkpoint(tmp_path).config == open_checkpoint(pico).config


def test_same_plan_same_bytes(pico: Path, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        prune_by_hand(pico, tmp_path / name, removed_attention={2}, width=lambda layer: 40 - layer)
    for file in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_narrowing_in_memory_equals_writing(pico: Path, tmp_path: Path):
    kept = prune_by_hand(pico, tmp_path, removed_attention=set(), width=lambda layer: 40 - layer)
    model = load_model(pico)
    narrow_ffn(model, LLAMA, kept)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, load_model(tmp_path)(IDS).logits)


def test_saved_again_by_transformers_it_is_unchanged(pico: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    prune_by_hand(pico, first, removed_attention={0, 3}, width=lambda layer: 40 - layer)
    load_model(first).save_pretrained(second)
    before, after = open_checkpoint(first), open_checkpoint(second)
    assert before.fingerprint == after.fingerprint
    assert before.layout == after.layout
    assert before.config["architectures"] == after.config["architectures"] == ["PrunedLlamaForCausalLM"]
    assert before.config["per_layer_config"] == after.config["per_layer_config"]


def test_weights_are_sharded(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = open_checkpoint(pico)
    layout = [LayerLayout(attention=True, intermediate_size=20)] * 4
    kept = [np.arange(20)] * 4
    from toolchain.model import slicing as surgery

    real = surgery.write_weights
    monkeypatch.setattr(surgery, "write_weights", lambda *args, **kwargs: real(*args, **kwargs, max_shard_bytes=20_000))
    write_pruned(checkpoint, layout, kept, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    with torch.inference_mode():
        model = copy.deepcopy(load_model(pico))
        narrow_ffn(model, LLAMA, kept)
        assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)
