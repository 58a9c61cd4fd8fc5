"""Every family, at every shape: complete entries, the laws of pruning, and the search."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import prune_by_hand
from tests.families import EVERY_VARIANT, VARIANTS, make_family_pico
from toolchain.architecture.families import FAMILIES, family_of
from toolchain.architecture.parts import SubBlock, layers_of, whole_blocks
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.metrics.token_metrics import PerplexityMetric
from toolchain.model.disk_layers import open_offloaded
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model
from toolchain.model.slicing import narrow_ffn
from toolchain.prune.search.attention import removals
from toolchain.prune.search.candidates import last_states

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
WIDTH = 48
# Unequal widths, one FFN gone, and the layers whose attention goes: with alternating kinds, the first layer alone,
# every sliding one, every full one, one of each, and all but the last.
WIDTHS = (31, 0, 48, 7)
REMOVALS = ({0}, {0, 2}, {1, 3}, {1, 2}, {0, 1, 2})
# Whole blocks, and half of another one.
WITHOUT = (([], SubBlock(1, "ffn")), ([0], SubBlock(2, "attention")), ([1, 2, 3], SubBlock(0, "ffn")))

each_variant = pytest.mark.parametrize("pico", EVERY_VARIANT, indirect=True, ids="-".join)


@pytest.fixture(scope="session")
def picos(tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[str, str], Path] = {}

    def pico(family: str, variant: str) -> Path:
        if (family, variant) not in made:
            made[family, variant] = tmp_path_factory.mktemp(f"{family}-{variant}")
            make_family_pico(made[family, variant], family, variant)
        return made[family, variant]

    return pico


@pytest.fixture
def pico(request: pytest.FixtureRequest, picos) -> Path:
    return picos(*request.param)


def test_every_family_has_models_to_test_it_with():
    assert set(VARIANTS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_accounts_for_every_tensor_of_a_layer(family: str, tmp_path: Path):
    """Fails until an entry is complete: nothing is left over, and every side that counts neurons is named."""
    entry, width = FAMILIES[family], 53  # a number that no other dimension has, nor any multiple of it
    for variant in VARIANTS[family]:
        directory = tmp_path / variant
        make_family_pico(directory, family, variant, intermediate_size=width)
        checkpoint = open_checkpoint(directory)  # which refuses left-over and missing parts
        layers = {name for name in checkpoint.tensors if name.startswith(f"{entry.layers}.")}
        for name in layers:
            _, _, tensor = name.removeprefix(f"{entry.layers}.").partition(".")
            sides = {
                (dimension, size // width)
                for dimension, size in enumerate(checkpoint.tensors[name].shape)
                if size % width == 0
            }
            assert sides == ({entry.neuron_side(tensor)} - {None}), name
        outside = {name.rpartition(".")[0] for name in checkpoint.tensors.keys() - layers}
        assert outside - {"lm_head"} == {"model.embed_tokens", entry.final_norm}
        assert checkpoint.config["architectures"] == [entry.architecture]


@each_variant
def test_the_walk_gives_the_models_own_logits(pico: Path):
    model = load_model(pico)
    walk = LayerWalk(model, open_checkpoint(pico).family)
    with torch.inference_mode():
        states = walk.forward(walk.embed(IDS)).flatten(0, 1)
        blocks = torch.cat([logits for _, logits in walk.logits(states)], dim=1)
        torch.testing.assert_close(blocks, model(IDS).logits.flatten(0, 1), atol=2e-5, rtol=1e-5)


def silence_attention(layer: torch.nn.Module) -> None:
    for parameter in layer.self_attn.o_proj.parameters():
        parameter.data.zero_()


def masked(directory: Path, removed_attention: set[int], kept: list[np.ndarray]) -> PreTrainedModel:
    """The original with removed parts zeroed: the truth that surgery must reproduce."""
    model = load_model(directory)
    for index, layer in enumerate(model.model.layers):
        output = layer.mlp.down_proj
        output.weight.data[:, np.setdiff1d(np.arange(WIDTH), kept[index])] = 0
        if len(kept[index]) == 0 and output.bias is not None:
            output.bias.data.zero_()
        if index in removed_attention:
            silence_attention(layer)
    return model


@pytest.mark.compatibility("prune", "a pruned model equals the original with the same parts zeroed")
@each_variant
def test_pruned_equals_masked(pico: Path, tmp_path: Path):
    for removed in REMOVALS:
        out = tmp_path / "-".join(map(str, sorted(removed)))
        out.mkdir()
        kept = prune_by_hand(pico, out, removed_attention=removed, width=WIDTHS.__getitem__)
        with torch.inference_mode():
            found, expected = load_model(out)(IDS).logits, masked(pico, removed, kept)(IDS).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(found, load_model(pico)(IDS).logits, atol=1e-2)


@each_variant
def test_a_plan_that_keeps_everything_changes_nothing(pico: Path, tmp_path: Path):
    prune_by_hand(pico, tmp_path, removed_attention=set(), width=lambda _: WIDTH)
    assert open_checkpoint(tmp_path).fingerprint == open_checkpoint(pico).fingerprint
    assert open_checkpoint(tmp_path).config == open_checkpoint(pico).config


@pytest.mark.compatibility("Transformers", "saved again, nothing is lost")
@each_variant
def test_saved_again_by_transformers_it_is_unchanged(pico: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    kept = prune_by_hand(pico, first, removed_attention={0, 3}, width=WIDTHS.__getitem__)
    load_model(first).save_pretrained(second)
    before, after = open_checkpoint(first), open_checkpoint(second)
    assert before.fingerprint == after.fingerprint
    assert before.layout == after.layout
    assert before.config["architectures"] == after.config["architectures"] == [before.family.pruned_architecture]
    assert before.config["per_layer_config"] == after.config["per_layer_config"]

    narrowed = load_model(pico)
    every = [np.arange(WIDTH) if len(some) == 0 else some for some in kept]
    narrow_ffn(narrowed, before.family, every)
    third = tmp_path / "third"
    third.mkdir()
    prune_by_hand(pico, third, removed_attention=set(), width=lambda layer: len(every[layer]))
    with torch.inference_mode():
        assert torch.equal(narrowed(IDS).logits, load_model(third)(IDS).logits)


@pytest.mark.compatibility("Transformers", "generation with a cache, padded, equals generation without")
@each_variant
def test_generating_with_a_cache_changes_nothing(pico: Path, tmp_path: Path):
    """Sequences are longer than any sliding window; the second is padded."""
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    for removed in REMOVALS:
        out = tmp_path / "-".join(map(str, sorted(removed)))
        out.mkdir()
        prune_by_hand(pico, out, removed_attention=removed, width=WIDTHS.__getitem__)
        model = load_model(out)
        prompt = {"input_ids": IDS, "attention_mask": mask, "max_new_tokens": 16, "min_new_tokens": 16}
        cached, uncached = (
            model.generate(**prompt, do_sample=False, use_cache=use_cache, pad_token_id=0)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached), removed


@each_variant
@pytest.mark.parametrize(
    ("removed", "width"),
    [(set(), lambda layer: WIDTH - layer), ({1}, lambda _: WIDTH), (set(), lambda layer: WIDTH * (layer != 2))],
    ids=["narrow", "attention-only", "ffn-only"],
)
def test_stock_transformers_refuses_what_was_pruned(pico: Path, tmp_path: Path, removed: set, width):
    prune_by_hand(pico, tmp_path, removed_attention=removed, width=width)
    AutoModelForCausalLM.from_pretrained(pico)
    with pytest.raises(RuntimeError, match="is a per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def plain_search(directory: Path, num_removals: int) -> list[tuple[int, dict[int, float]]]:
    """Masks one attention and runs Transformers' own model: nothing shared with the search under test."""
    removed: list[int] = []
    steps = []
    for _ in range(num_removals):
        found = {}
        for index in sorted(set(range(4)) - set(removed)):
            model = masked(directory, {*removed, index}, [np.arange(WIDTH)] * 4)
            with torch.inference_mode():
                logits = model(IDS[:1]).logits[0, :-1].float()
            found[index] = math.exp(float(cross_entropy(logits, IDS[0, 1:])))
        removed.append(min(found, key=lambda index: (found[index], index)))
        steps.append((removed[-1], found))
    return steps


def search(walk: LayerWalk, num_removals: int) -> list[tuple[int, dict[int, float]]]:
    steps = itertools.islice(removals(walk, PerplexityMetric(IDS[:1])), num_removals)
    return [(tried.removed, tried.candidates) for tried in steps]


@each_variant
def test_the_search_agrees_with_the_plain_way(pico: Path):
    checkpoint, expected = open_checkpoint(pico), plain_search(pico, 4)
    from_memory = search(LayerWalk(load_model(pico), checkpoint.family), 4)
    assert [removed for removed, _ in from_memory] == [removed for removed, _ in expected]
    for (_, ours), (_, theirs) in zip(from_memory, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert search(open_offloaded(checkpoint, dtype=torch.float32, device="cpu"), 4) == from_memory


@each_variant
def test_models_without_whole_blocks_run_as_the_plain_way(pico: Path):
    """Several at a time: half blocks, whole blocks, the first layer, and all but one."""
    models = [frozenset(whole_blocks(layers) | {half}) for layers, half in WITHOUT]
    walk = LayerWalk(load_model(pico), open_checkpoint(pico).family)
    every, nothing = np.arange(WIDTH), np.arange(0)
    for removed, state in zip(models, last_states(walk, IDS, models), strict=True):
        kept = [nothing if layer in layers_of("ffn", removed) else every for layer in range(4)]
        with torch.inference_mode():
            expected = masked(pico, set(layers_of("attention", removed)), kept)(IDS).logits
            found = torch.cat([logits for _, logits in walk.logits(state.flatten(0, 1))], dim=1)
        torch.testing.assert_close(found, expected.flatten(0, 1).float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, ("mixture of experts", "num_local_experts = 8")),
        ({"model_type": "qwen3_moe", "num_experts": 128}, ("mixture of experts", "num_experts = 128")),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, ("mixture of experts", "n_routed_experts")),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, ("multimodal", "text_config")),
        ({"model_type": "mistral3", "vision_config": {"a": 1}}, ("multimodal", "vision_config")),
        ({"model_type": "qwen2_audio", "audio_config": {"a": 1}}, ("multimodal", "audio_config")),
        ({"model_type": "olmo2"}, ("'olmo2' is not supported", "gemma3_text, granite, llama, mistral")),
        ({}, ("None is not supported",)),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]},
            ("Qwen2ForSequenceClassification", "PrunedQwen2ForCausalLM"),
        ),
    ],
)
def test_others_are_refused_by_name_and_with_a_reason(config: dict, parts: tuple[str, ...]):
    with pytest.raises(SenteiError) as caught:
        family_of(config)
    for part in parts:
        assert part in str(caught.value)
