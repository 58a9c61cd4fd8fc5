"""Features of vLLM that must not take all layers for equal: they work with a pruned model, or are refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engines.transformers import TransformersEngine
from serving.server.vllm.server import running_server
from tests.conftest import prune_by_hand
from tests.families import make_family_pico
from tests.serving.server.test_lora_check import FFN, make_adapter
from tests.serving.vllm_answers import KV_CACHE_BYTES, NUM_NEW_TOKENS
from tests.serving.vllm_plugin.test_vllm_families import REMOVED, WIDE, WIDTHS, ask_vllm, check, wide_pico
from toolchain.errors import SenteiError

pytestmark = [pytest.mark.usefixtures("vllm"), pytest.mark.acceptance]

KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 3
# By what is removed: how many layers attend within a window and how many to all, and how many layers share a block.
# vLLM takes the smaller number, or the larger if that is less than 1.5 times as much.
HYBRID = {
    "nothing": (set(), 6, 3, 3),
    "two full": ({2, 5}, 6, 1, 1),
    "two sliding": ({0, 1}, 4, 3, 4),
    "one of each": ({1, 5}, 5, 2, 2),
    "all full": ({2, 5, 8}, 6, 0, 6),
    "all sliding": ({0, 1, 3, 4, 6, 7}, 0, 3, 3),
}
BLOCK_TOKENS = 32  # of which the prompts need one and two
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
REPEATED = [([5, 17, 40, 8] * 8)[:length] for length in (20, 29, 31)]


def hybrid(directory: Path, removed: set[int]) -> Path:
    source, out = directory / "source", directory / f"without-{'-'.join(map(str, sorted(removed)))}"
    if not source.exists():
        shape = {**WIDE, "head_dim": 64, "num_hidden_layers": len(KINDS), "layer_types": KINDS}
        make_family_pico(source, "gemma3_text", "alternating", **shape)
    out.mkdir()
    prune_by_hand(source, out, removed_attention=removed, width=lambda layer: 96 - 8 * layer)
    return out


def zeroed(source: Path, directory: Path) -> Path:
    """The original with what is pruned by hand set to zero instead: it computes the same, in vLLM's own class."""
    shutil.copytree(source, directory)
    weights = load_file(source / "model.safetensors")
    for layer, width in enumerate(WIDTHS):
        down = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
        kept = np.linspace(0, down.shape[1] - 1, width).round().astype(int)
        down[:, np.setdiff1d(range(down.shape[1]), kept)] = 0
        if layer in REMOVED:
            weights[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """One process of vLLM for all of it."""
    directory = tmp_path_factory.mktemp("features")
    models = {name: hybrid(directory, removed) for name, (removed, *_) in HYBRID.items()}
    jobs = {name: {"directory": str(model), "options": {"block_size": BLOCK_TOKENS}} for name, model in models.items()}
    models["ngram"] = models["fp8"] = models["lora"] = wide_pico(directory, "llama", "grouped")
    models["fp8, zeroed"] = zeroed(directory / "llama-grouped", directory / "zeroed")
    for name in ("fp8", "fp8, zeroed"):
        jobs[name] = {"directory": str(models[name]), "options": {"kv_cache_dtype": "fp8"}}
    narrower = directory / "narrower"
    narrower.mkdir()
    prune_by_hand(directory / "llama-grouped", narrower, removed_attention=set(), width=lambda layer: 40)
    jobs["lora"] = {
        "directory": str(models["lora"]),
        "adapters": [],
        "wrong_adapters": [
            str(make_adapter(directory / f"of-{name}", model, FFN))
            for name, model in (("original", directory / "llama-grouped"), ("narrower", narrower))
        ],
    }
    # The last one: vLLM (0.32) starts no other engine in a process that has loaded numba.
    drafting = {"speculative_config": NGRAM, "disable_log_stats": False}
    jobs["ngram"] = {"directory": str(models["ngram"]), "options": drafting, "prompts": REPEATED}
    found = ask_vllm(directory, list(jobs.values()))
    return {name: (models[name], answer) for name, answer in zip(jobs, found, strict=True)}


@pytest.mark.parametrize("case", HYBRID)
def test_layers_of_two_kinds_share_blocks_without_those_that_were_removed(answers, case: str):
    removed, num_sliding, num_full, shared_by = HYBRID[case]
    model, answer = answers[case]
    check(model, answer)
    groups = answer["kv_cache"]["groups"]
    layers = {kind: [] for kind in ("SlidingWindowSpec", "FullAttentionSpec")}
    for group in groups:
        layers[group["kind"]] += [int(name.split(".")[2]) for name in group["layers"]]
    attending = sorted(set(range(len(KINDS))) - removed)
    assert sorted(layers["SlidingWindowSpec"]) == [index for index in attending if KINDS[index].startswith("sliding")]
    assert sorted(layers["FullAttentionSpec"]) == [index for index in attending if KINDS[index].startswith("full")]
    assert [len(each) for each in layers.values()] == [num_sliding, num_full]
    assert max(len(group["layers"]) for group in groups) == shared_by
    page_bytes = 2 * 2 * 64 * 4 * BLOCK_TOKENS  # keys and values, heads, head_dim, float32
    assert answer["kv_cache"]["num_blocks"] == KV_CACHE_BYTES // (shared_by * page_bytes)


def test_an_ngram_drafter_changes_no_token(answers):
    model, answer = answers["ngram"]
    assert "refused" not in answer, answer["refused"]
    reference = TransformersEngine(model, dtype=torch.float32)
    assert answer["greedy"] == [reference.generate(prompt, NUM_NEW_TOKENS) for prompt in REPEATED]
    assert answer["num_accepted_drafts"] > 0


def test_an_fp8_kv_cache_holds_four_times_the_tokens_of_float32_and_loses_no_more_than_in_vllms_own_class(answers):
    (_, found), (_, whole) = answers["fp8"], answers["fp8, zeroed"]
    assert "refused" not in found, found["refused"]
    # Two layers attend, with 2 key-value heads of 32 numbers in one byte each, keys and values; in the other all four.
    assert found["num_kv_cache_tokens"] == 2 * whole["num_kv_cache_tokens"] == KV_CACHE_BYTES // (2 * 2 * 32 * 2)
    assert found["greedy"] == whole["greedy"]
    for ours, theirs in zip(found["log_probabilities"], whole["log_probabilities"], strict=True):
        for position, other in zip(ours, theirs, strict=True):
            known = dict(map(tuple, other))
            both = [abs(value - known[token]) for token, value in position if token in known]
            assert len(both) >= 9  # of ten, where two are as likely
            assert max(both) < 1e-2


def test_an_adapter_of_another_width_is_refused_when_a_client_loads_it(answers):
    """The wider one fails in vLLM too, in torch's words; the narrower one would be used, and give wrong answers."""
    _, answer = answers["lora"]
    wider, narrower = answer["refused_adapters"]
    assert "of-original: model.layers.1.mlp.down_proj has 96 neurons, and this model has 50 there" in wider
    assert "of-narrower: model.layers.1.mlp.down_proj has 40 neurons, and this model has 50 there" in narrower


def test_a_server_ends_with_a_sentence_for_such_an_adapter(pruned_demo, demo_model, tmp_path):
    """As by plain ``vllm serve``: ``sentei serve`` looks at adapters before, which is left out here."""
    adapter = make_adapter(tmp_path / "adapter", demo_model, FFN)
    options = ("--max-model-len", "64", "--enforce-eager", "--dtype", "bfloat16", "--kv-cache-memory-bytes", "64M")
    lora = ("--enable-lora", "--lora-modules", f"mine={adapter}")
    said = r"LoRA adapter mine: model\.layers\.\d+\.mlp\.\w+ has 1536 neurons, and this model has \d+ there"
    with (
        pytest.raises(SenteiError, match=said),
        running_server(pruned_demo, options=(*options, *lora), log=tmp_path / "server.log"),
    ):
        pass
