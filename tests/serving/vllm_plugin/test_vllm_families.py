"""Every family's pruned checkpoints in unmodified vLLM: same answers as Transformers, or refused with a reason."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from serving.engines.transformers import TransformersEngine
from tests.conftest import prune_by_hand
from tests.families import EVERY_VARIANT, VARIANTS, make_family_pico
from tests.serving.server.test_lora_check import ATTENTION, FFN, make_adapter
from tests.serving.vllm_answers import KV_CACHE_BYTES, NUM_NEW_TOKENS
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError

if importlib.util.find_spec("vllm") is None:
    if os.environ.get("CI"):
        pytest.fail("vLLM is not installed; in CI that is a failure.", pytrace=False)
    pytest.skip("vLLM is not installed", allow_module_level=True)

# Wide enough for vLLM's attention on a CPU; head_dim is 32, or 64 where it is a variant's own.
WIDE = {"hidden_size": 128, "intermediate_size": 96}
# Longer than any sliding window, and than what long rotary factors begin at: vLLM decides on these by the longest
# sequence it allows, Transformers by each one.
PROMPTS = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 33, 47)]
# The first layer has nothing at all, the second another width, the third no FFN, the last no attention.
REMOVED, WIDTHS = {0, 3}, (0, 50, 0, 96)
NUM_ATTENDING = 2
# What vLLM's own classes cannot express, and says so.
REFUSED = {
    ("qwen2", "alternating"): "layer_types mixes full_attention and sliding_attention",
    ("qwen3", "alternating"): "layer_types mixes full_attention and sliding_attention",
    ("qwen2", "own-head-dim"): "head_dim is not hidden_size / num_attention_heads",
    ("qwen3", "biased-tied"): "attention_bias gives o_proj a bias",
}
# Those that differ most from Llama: norms behind each part and layers of two kinds; fused projections.
BY_DEFAULT = [("gemma3_text", "alternating"), ("phi3", "grouped")]
OTHERS = [each for each in EVERY_VARIANT if each not in BY_DEFAULT]
# Each family as most of its models are; heads, key-value heads and widths are even.
SPLIT = [(family, next(iter(variants))) for family, variants in VARIANTS.items()]


def wide_pico(
    directory: Path,
    family: str,
    variant: str,
    removed: set[int] = REMOVED,
    widths: tuple[int, ...] = WIDTHS,
) -> Path:
    """A random model of four layers, pruned."""
    source, out = directory / f"{family}-{variant}", directory / f"{family}-{variant}-pruned"
    own: dict[str, Any] = {"head_dim": 64} if "head_dim" in VARIANTS[family][variant] else {}
    if variant == "longrope":
        factors = torch.linspace(1, 4, 16).tolist()
        own["rope_parameters"] = {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors[::-1],
        }  # fmt: skip
    make_family_pico(source, family, variant, **WIDE, **own)
    out.mkdir()
    prune_by_hand(source, out, removed_attention=removed, width=widths.__getitem__)
    return out


def ask_vllm(directory: Path, jobs: list[dict[str, Any]], **environment: str) -> list[dict[str, Any]]:
    """Answers of one vLLM process to all of them."""
    file = directory / "jobs.json"
    file.write_text(json.dumps([{"prompts": PROMPTS, **job} for job in jobs]))
    command = [sys.executable, "-m", "tests.serving.vllm_answers", str(file)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(Path(f"{file}.answers").read_text())


def ask_about(
    directory: Path, variants: list[tuple[str, str]], **more: Any
) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    models = [wide_pico(directory, *each) for each in variants]
    answers = ask_vllm(directory, [{"directory": str(model), **more} for model in models])
    return dict(zip(variants, zip(models, answers, strict=True), strict=True))


def check(model: Path, answer: Mapping[str, Any]) -> None:
    assert "refused" not in answer, answer["refused"]
    reference = TransformersEngine(model, dtype=torch.float32)
    for prompt, positions, tokens in zip(PROMPTS, answer["log_probabilities"], answer["greedy"], strict=True):
        expected = reference.log_probabilities(prompt)
        assert len(positions) == len(prompt) - 1
        for position, found in enumerate(positions):
            assert len(found) >= 10
            assert all(abs(value - float(expected[position, token])) < 1e-3 for token, value in found)
        assert tokens == reference.generate(prompt, NUM_NEW_TOKENS)


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory):
    return ask_about(tmp_path_factory.mktemp("default"), BY_DEFAULT)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory):
    return ask_about(tmp_path_factory.mktemp("others"), OTHERS)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory):
    return ask_about(tmp_path_factory.mktemp("split"), SPLIT, tensor_parallel_size=2)


in_vllm = pytest.mark.compatibility(
    "vLLM", "log-probabilities within 1e-3 of Transformers, equal greedy tokens, KV cache for attending layers alone"
)


@in_vllm
@pytest.mark.parametrize("variant", BY_DEFAULT, ids="-".join)
def test_vllm_agrees_with_transformers(by_default, variant: tuple[str, str]):
    check(*by_default[variant])


@in_vllm
@pytest.mark.acceptance
@pytest.mark.parametrize("variant", OTHERS, ids="-".join)
def test_vllm_agrees_with_transformers_or_says_why_not(others, variant: tuple[str, str], record_property):
    model, answer = others[variant]
    if variant in REFUSED:
        assert REFUSED[variant] in answer["refused"]
        record_property("refused", REFUSED[variant])
        return
    check(model, answer)
    config = json.loads((model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    bytes_a_token = 2 * config["num_key_value_heads"] * head_dim * 4 * NUM_ATTENDING
    if len(set(config.get("layer_types") or ["all alike"])) == 1:  # layers of two kinds share one pool of blocks
        assert answer["num_kv_cache_tokens"] == KV_CACHE_BYTES // bytes_a_token


@pytest.mark.compatibility(
    "TP 2", "two ranks give the log-probabilities (within 1e-3) and greedy tokens of Transformers"
)
@pytest.mark.acceptance
@pytest.mark.parametrize("variant", SPLIT, ids="-".join)
def test_two_ranks_agree_with_transformers_too(on_two_ranks, variant: tuple[str, str]):
    """And so with one rank, which gives the same tokens."""
    check(*on_two_ranks[variant])


@pytest.mark.acceptance
def test_lora_adapters_act_on_what_was_kept(tmp_path: Path):
    """Adapters of the pruned model, and of the original's attention; those of another width test_lora.py refuses."""
    models, jobs = {}, []
    for family in ("llama", "phi3"):
        model = wide_pico(tmp_path, family, "grouped")
        adapters = [
            make_adapter(tmp_path / f"{family}-all", model, ATTENTION | FFN),
            make_adapter(tmp_path / f"{family}-original", tmp_path / f"{family}-grouped", ATTENTION),
        ]
        models[model] = adapters
        jobs.append({"directory": str(model), "adapters": [str(adapter) for adapter in adapters]})
    for (model, adapters), answer in zip(models.items(), ask_vllm(tmp_path, jobs), strict=True):
        plain = TransformersEngine(model, dtype=torch.float32)
        assert answer["greedy"] == [plain.generate(prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]
        for adapter, found in zip(adapters, answer["adapted"], strict=True):
            merged = TransformersEngine(model, dtype=torch.float32)
            merge(merged.model, adapter)
            assert found == [merged.generate(prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]
            assert found != answer["greedy"]


def merge(model: torch.nn.Module, adapter: Path) -> None:
    """Adds ``B @ A`` to each weight that is there; the adapters' scale is 1."""
    weights, matrices = dict(model.named_parameters()), load_file(adapter / "adapter_model.safetensors")
    for name in matrices:
        weight = weights.get(name.removeprefix("base_model.model.").replace(".lora_A", ""))
        if weight is not None:
            weight.data += matrices[name.replace("lora_A", "lora_B")] @ matrices[name]


def test_every_family_has_its_class():
    from serving.vllm_plugin.models import PrunedModel

    for model_type, family in FAMILIES.items():
        module = importlib.import_module(f"serving.vllm_plugin.families.{model_type}")
        assert issubclass(getattr(module, family.pruned_architecture), PrunedModel)


def test_what_vllm_has_renamed_in_one_family_stops_no_other(monkeypatch):
    for model_type in FAMILIES:
        monkeypatch.delitem(sys.modules, f"serving.vllm_plugin.families.{model_type}", raising=False)
    monkeypatch.delattr("vllm.model_executor.models.qwen2.Qwen2DecoderLayer")
    for model_type in FAMILIES.keys() - {"qwen2"}:
        importlib.import_module(f"serving.vllm_plugin.families.{model_type}")
    with pytest.raises(ImportError, match="Qwen2DecoderLayer"):
        importlib.import_module("serving.vllm_plugin.families.qwen2")


def config_for_vllm(directory: Path) -> Any:
    """As much of vLLM's config as the plugin's checks look at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=AutoConfig.from_pretrained(directory), model=str(directory)),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        observability_config=SimpleNamespace(enable_mfu_metrics=False),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_refused_before_weights_are_read(family: str, tmp_path: Path):
    """In the same words as by sentei's own loader."""
    from serving.vllm_plugin.models import checked_layout

    entry, variant = FAMILIES[family], next(iter(VARIANTS[family]))
    directory = wide_pico(tmp_path, family, variant)
    assert len(checked_layout(config_for_vllm(directory))) == 4
    config, weights = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    first, output = f"{entry.layers}.1.{entry.ffn_inputs[0]}.weight", f"{entry.layers}.1.self_attn.o_proj.weight"
    spoiled: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        r"layer 1: .* has shape .*, but config\.json says intermediate_size 50": ({}, {first: weights[first][:-1]}),
        r"layer 1 has no tensor self_attn\.o_proj\.weight|layer 2 has a tensor": ({}, {output: None}),
        r"layer 1 has a tensor gate\.weight, which is no part": ({}, {f"{entry.layers}.1.gate.weight": torch.zeros(3)}),
        r"holds more layers than num_hidden_layers = 4 says": ({}, {f"{entry.layers}.4.x.weight": torch.zeros(3)}),
        r"layer 0 has no weights of self_attn": ({"per_layer_config": {**config["per_layer_config"], "0": {}}}, {}),
        r"layer 1: intermediate_size is 0\. Write": (
            {"per_layer_config": {**config["per_layer_config"], "1": {"intermediate_size": 0}}},
            {},
        ),
    }
    for sentence, (more_config, more_weights) in spoiled.items():
        (directory / "config.json").write_text(json.dumps(config | more_config))
        changed = {name: tensor for name, tensor in (weights | more_weights).items() if tensor is not None}
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, directory / "model.safetensors")
        for check_it in (lambda: checked_layout(config_for_vllm(directory)), lambda: open_checkpoint(directory)):
            with pytest.raises(SenteiError, match=sentence):
                check_it()
