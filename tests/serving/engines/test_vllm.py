"""Pruned checkpoints in unmodified vLLM: same answers as Transformers, and KV cache only for layers that attend."""

import importlib.util
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from serving.engines.transformers import TransformersEngine
from serving.engines.vllm import VllmEngine
from tests.conftest import make_pico, prune_by_hand
from toolchain.architecture.families import FAMILIES
from toolchain.architecture.layout import LayerLayout
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.model.loading import load_tokenizer
from toolchain.text.embedded import documents

if importlib.util.find_spec("vllm") is None:
    if os.environ.get("CI"):
        pytest.fail("vLLM is not installed; in CI that is a failure.", pytrace=False)
    pytest.skip("vLLM is not installed", allow_module_level=True)

TEXTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. The capital of Italy is",
    "剪定は、木の形を整えるために枝を切ることです。冬に",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)


def answers_of(engine, prompts):
    """Everything the tests ask of an engine, which is then closed."""
    try:
        return {
            "log_probabilities": engine.top_log_probabilities(prompts, 10),
            "greedy": [engine.generate(prompt, 24) for prompt in prompts],
            "num_kv_cache_tokens": engine.num_kv_cache_tokens,
        }
    finally:
        engine.close()


@pytest.fixture(scope="module")
def prompts(demo_model):
    tokenizer = load_tokenizer(demo_model)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def long_prompt(demo_model):
    """More than two blocks of the KV cache (128 tokens each, on a CPU), and far more than one step may hold."""
    return load_tokenizer(demo_model)(documents()[0])["input_ids"][:300]


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.acceptance)], ids=["eager", "compiled"]
)
def pruned_answers(request, pruned_demo, prompts, long_prompt):
    """Prefill in chunks of 32 tokens, prefixes cached, and prompts of unequal lengths at once."""
    options = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "enforce_eager": request.param}
    engine = VllmEngine(pruned_demo, dtype=torch.float32, options=options)
    mixed = [prompts[0][:2], long_prompt, prompts[1], long_prompt[:150], prompts[2]]
    cold, warm = [engine._generate([long_prompt], max_tokens=8)[0] for _ in range(2)]
    return {
        "cold": list(cold.outputs[0].token_ids),
        "warm": list(warm.outputs[0].token_ids),
        "num_cached_tokens": (cold.num_cached_tokens, warm.num_cached_tokens),
        "mixed": list(zip(mixed, engine.generate_batch(mixed, 24), strict=True)),
        **answers_of(engine, prompts),
    }


@pytest.fixture(scope="module")
def patchwork(demo_model, tmp_path_factory):
    """A random Llama, wide enough for vLLM, with every kind of layer: nothing, half of it, narrow, whole."""
    source, directory = tmp_path_factory.mktemp("wide"), tmp_path_factory.mktemp("patchwork")
    make_pico(source, num_hidden_layers=6, hidden_size=64, head_dim=32, intermediate_size=96)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, source / name)
    widths = {0: 0, 1: 0, 2: 50, 3: 96, 4: 34, 5: 0}
    prune_by_hand(source, directory, removed_attention={0, 2, 5}, width=widths.__getitem__)
    return directory


def test_log_probabilities_agree_with_transformers(pruned_demo, prompts, pruned_answers):
    reference = TransformersEngine(pruned_demo, dtype=torch.float32)
    worst = 0.0
    for prompt, positions in zip(prompts, pruned_answers["log_probabilities"], strict=True):
        expected = reference.log_probabilities(prompt)
        assert len(positions) == len(prompt) - 1
        for position, found in enumerate(positions):
            assert len(found) >= 10
            assert prompt[position + 1] in found
            worst = max(worst, *(abs(value - float(expected[position, token])) for token, value in found.items()))
    assert worst < 2e-3


def test_greedy_tokens_agree_with_transformers(pruned_demo, prompts, pruned_answers):
    reference = TransformersEngine(pruned_demo, dtype=torch.float32)
    alone = list(zip(prompts, pruned_answers["greedy"], strict=True))
    for prompt, tokens in alone + pruned_answers["mixed"]:
        assert len(tokens) == 24
        expected = reference.log_probabilities([*prompt, *tokens])[len(prompt) - 1 : -1]
        margin = expected.max(-1).values - expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert margin.max() < 4e-3


def test_a_cached_prefix_gives_the_same_tokens(pruned_answers):
    cold, warm = pruned_answers["num_cached_tokens"]
    assert (cold, warm) == (0, 256)
    assert pruned_answers["warm"] == pruned_answers["cold"]


@pytest.mark.acceptance
def test_kv_cache_is_for_layers_that_attend(demo_model, prompts, pruned_answers):
    full = answers_of(VllmEngine(demo_model, dtype=torch.float32), prompts)
    block = 128  # tokens; blocks are whole
    assert abs(pruned_answers["num_kv_cache_tokens"] - full["num_kv_cache_tokens"] * 30 / 28) < block


@pytest.mark.acceptance
def test_compiled_and_on_two_ranks(patchwork, prompts, monkeypatch):
    if (os.cpu_count() or 1) > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "enforce_eager": shutil.which("g++") is None}
    found = answers_of(VllmEngine(patchwork, max_model_len=128, options=options), prompts)
    reference = TransformersEngine(patchwork, dtype=torch.float32)
    for prompt, positions, tokens in zip(prompts, found["log_probabilities"], found["greedy"], strict=True):
        expected = reference.log_probabilities(prompt)
        for position, entry in enumerate(positions):
            assert all(abs(value - float(expected[position, token])) < 1e-3 for token, value in entry.items())
        assert tokens == reference.generate(prompt, 24)


def vllm_config(ranks=1, stages=1, **config):
    overrides = {"num_hidden_layers": 4, "intermediate_size": 48, **config}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=LlamaConfig(**overrides), model="org/name"),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=stages),
        observability_config=SimpleNamespace(enable_mfu_metrics=False),
    )


def test_widths_must_fit_the_ranks():
    from serving.vllm_plugin.models import checked_layout

    narrow = {"1": {"intermediate_size": 47}, "3": {"intermediate_size": 46}}
    assert checked_layout(vllm_config(ranks=1, per_layer_config=narrow))[1].intermediate_size == 47
    with pytest.raises(SenteiError, match=r"tensor_parallel_size is 2, .* intermediate_size 47 of layer 1 \(1 such"):
        checked_layout(vllm_config(ranks=2, per_layer_config=narrow))


def test_a_bad_layout_is_one_sentence():
    from serving.vllm_plugin.models import checked_layout

    with pytest.raises(SenteiError, match=r"layer 2: intermediate_size is 0\. Write"):
        checked_layout(vllm_config(per_layer_config={"2": {"intermediate_size": 0}}))
    with pytest.raises(SenteiError, match="skips"):
        checked_layout(vllm_config(per_layer_config={"2": {"skip": ["norm"]}}))


def test_an_option_that_takes_all_layers_for_equal_is_refused():
    from serving.vllm_plugin.models import checked_layout

    asked = vllm_config(per_layer_config={"1": {"intermediate_size": 32}})
    asked.observability_config.enable_mfu_metrics = True
    with pytest.raises(SenteiError, match="--enable-mfu-metrics"):
        checked_layout(asked)


def test_a_stage_without_attention_is_refused_before_weights_are_read():
    from serving.vllm_plugin.models import checked_layout

    skipped = {str(layer): {"skip": ["attention"], "attention_dropout": 0.5} for layer in (2, 3)}
    assert len(checked_layout(vllm_config(per_layer_config=skipped))) == 4
    with pytest.raises(SenteiError, match=r"stage 1 \(layers 2 to 3\) has no attention.* VLLM_PP_LAYER_PARTITION=1,3"):
        checked_layout(vllm_config(stages=2, per_layer_config=skipped))


def test_a_division_into_stages_is_of_the_layers_that_are_built(monkeypatch):
    """The model of vLLM is built without layers first; then the user's division would not add up."""
    from vllm.distributed.utils import get_pp_indices

    from serving.vllm_plugin.models import _no_layers

    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    config = vllm_config().model_config.hf_config
    with _no_layers(config):
        assert get_pp_indices(config.num_hidden_layers, 1, 2) == (0, 0)
    assert get_pp_indices(config.num_hidden_layers, 1, 2) == (1, 4)


def test_a_config_with_layers_that_differ_equals_itself():
    """As vLLM before 0.28 asks; reading its global width is what Transformers refuses."""
    from serving.vllm_plugin.registration import register

    register()
    config = vllm_config(per_layer_config={"2": {"intermediate_size": 32}}).model_config.hf_config
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.intermediate_size
    same = config
    assert config == same


class Loaded(nn.Module):
    """A vLLM model as far as loading goes: it takes everything, as vLLM's loader does for linear layers."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012 (as in vLLM)

    def load_weights(self, weights):
        return {name for name, _ in weights}


@pytest.fixture
def loading():
    from serving.vllm_plugin.weights import CompleteWeights

    class Model(CompleteWeights, Loaded):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.layers = nn.ModuleList([nn.Module()])
            self.model.layers[0].mlp = nn.Module()
            self.model.layers[0].mlp.gate_up_proj = nn.Linear(4, 12, bias=False)
            self.model.layers[0].mlp.down_proj = nn.Linear(6, 4, bias=False)
            self.layout = (LayerLayout(attention=False, intermediate_size=6),)
            self.family = FAMILIES["llama"]

    shapes = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    weights = {f"model.layers.0.mlp.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    return Model(), weights


def test_complete_weights_load(loading):
    model, weights = loading
    assert model.load_weights(weights.items()) == set(weights)
    model.load_weights(list(weights.items())[:1])  # a later, partial update


def test_a_missing_part_of_a_fused_matrix_fails(loading):
    model, weights = loading
    del weights["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(SenteiError, match=r"has no tensor model\.layers\.0\.mlp\.up_proj\.weight \(1 missing\)"):
        model.load_weights(weights.items())


def test_scales_that_vllm_makes_while_it_loads_are_not_missed(loading, monkeypatch):
    """As with --quantization fp8: a layer is quantised, and given a scale, as soon as its weights are there."""
    model, weights = loading
    del weights["model.layers.0.mlp.down_proj.weight"]

    def load_and_quantize(self, weights):
        loaded = {name for name, _ in weights}
        self.model.layers[0].mlp.gate_up_proj.weight_scale = nn.Parameter(torch.ones(1))
        return loaded

    monkeypatch.setattr(Loaded, "load_weights", load_and_quantize)
    with pytest.raises(SenteiError, match=r"has no tensor model\.layers\.0\.mlp\.down_proj\.weight \(1 missing\)"):
        model.load_weights(weights.items())
    del model.model.layers[0].mlp.gate_up_proj.weight_scale
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(4, 6)
    assert model.load_weights(weights.items()) == set(weights)


def test_a_left_over_bias_fails(loading):
    model, weights = loading
    weights["model.layers.0.mlp.down_proj.bias"] = torch.zeros(4)
    with pytest.raises(SenteiError, match=r"has model\.layers\.0\.mlp\.down_proj\.bias, for which"):
        model.load_weights(weights.items())


@pytest.mark.parametrize(("name", "shape"), [("gate_proj", (7, 4)), ("down_proj", (4, 7))])
def test_a_matrix_of_another_width_fails(loading, name, shape):
    model, weights = loading
    weights[f"model.layers.0.mlp.{name}.weight"] = torch.zeros(shape)
    with pytest.raises(SenteiError, match=rf"{name}\.weight has shape .*, but config\.json says intermediate_size 6"):
        model.load_weights(weights.items())


def test_without_vllm_there_is_one_sentence(pico_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match=r"vLLM is not installed.*sentei\[vllm\]"):
        VllmEngine(pico_model)


@pytest.mark.acceptance
def test_the_scores_beside_the_weights_are_no_weights(patchwork, tmp_path, prompts):
    """Without an index vLLM reads every *.safetensors, and would stumble over the plan's."""
    directory = tmp_path / "with-scores"
    shutil.copytree(patchwork, directory)
    save_file({"layers.0.importance": torch.zeros(48)}, directory / "plan.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    engine = VllmEngine(directory, max_model_len=128)
    try:
        assert engine.generate(prompts[0], 8) == TransformersEngine(patchwork).generate(prompts[0], 8)
    finally:
        engine.close()


def test_the_engine_leaves_the_environment_alone(pruned_answers):
    """Servers started later would otherwise log only warnings, and the benchmark reads their log."""
    assert pruned_answers
    assert "VLLM_LOGGING_LEVEL" not in os.environ


def test_on_a_gpu_it_starts_beside_others_in_a_new_process_and_multiplies_in_full(
    pico_model, monkeypatch: pytest.MonkeyPatch
):
    """What only a GPU would show: vLLM forks, rounds float32 to ten bits, and wants the GPU for itself by default."""
    seen: dict[str, object] = {}

    def start(**arguments: object) -> None:
        seen.update(arguments, environment=dict(os.environ))
        raise RuntimeError("enough")

    monkeypatch.setattr("serving.engines.vllm._import_vllm", lambda: SimpleNamespace(LLM=start))
    with pytest.raises(SenteiError, match="enough"):
        VllmEngine(pico_model)
    environment = seen["environment"]
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert environment["TRITON_F32_DEFAULT"] == "ieee"
    assert seen["gpu_memory_utilization"] < 0.1
