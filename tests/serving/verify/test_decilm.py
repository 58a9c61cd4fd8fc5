"""The nemotron-nas export in stock vLLM, with sentei's plugin switched off: same answers as Transformers."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from export.decilm import export_nemotron_nas
from export.vllm import export_vllm
from serving.verify.decilm import open_nas, start_vllm
from serving.verify.verify import verify
from tests.command_line import refused, sentei, sentei_program
from tests.conftest import prune_by_hand
from tests.families import EVERY_VARIANT, make_family_pico
from tests.serving.vllm_plugin.test_vllm_families import ask_vllm, check, wide_pico
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError

# The second layer has another width, the third no FFN, the fourth no attention and a width that nothing divides.
REMOVED, WIDTHS = {1, 3}, (96, 50, 0, 47)
EXPRESSIBLE = [each for each in EVERY_VARIANT if not FAMILIES[each[0]].unlike_llama]
# One of each family, with what sets it apart: biases, sliding window, fused projections.
BY_DEFAULT = [("llama", "biased-tied"), ("mistral", "sliding-tied"), ("qwen2", "grouped"), ("phi3", "grouped")]
OTHERS = [each for each in EXPRESSIBLE if each not in BY_DEFAULT]


def ask_without_the_plugin(
    directory: Path, variants: list[tuple[str, str]]
) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    models = [wide_pico(directory, *each, removed=REMOVED, widths=WIDTHS) for each in variants]
    jobs = []
    for model in models:
        export_nemotron_nas(model, directory / f"{model.name}-nas")
        jobs.append({"directory": str(directory / f"{model.name}-nas"), "source": str(model)})
    jobs.append({"directory": str(models[0])})
    *answers, plugins_own = ask_vllm(directory, jobs, VLLM_PLUGINS="", HF_MODULES_CACHE=str(directory / "modules"))
    assert "leaves out sentei's plugin, which pruned checkpoints need" in plugins_own["refused"]
    return dict(zip(variants, zip(models, answers, strict=True), strict=True))


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory):
    return ask_without_the_plugin(tmp_path_factory.mktemp("default"), BY_DEFAULT)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory):
    return ask_without_the_plugin(tmp_path_factory.mktemp("others"), OTHERS)


without_the_plugin = pytest.mark.compatibility(
    "nemotron-nas", "vLLM without the plugin: log-probabilities within 1e-3 of Transformers, equal greedy tokens"
)


@without_the_plugin
@pytest.mark.parametrize("variant", BY_DEFAULT, ids="-".join)
def test_stock_vllm_agrees_with_transformers(by_default, variant: tuple[str, str]):
    check(*by_default[variant])


@without_the_plugin
@pytest.mark.acceptance
@pytest.mark.parametrize("variant", OTHERS, ids="-".join)
def test_stock_vllm_agrees_with_transformers_on_every_shape(others, variant: tuple[str, str]):
    check(*others[variant])


@pytest.mark.acceptance
def test_the_demo_model_is_exported_and_verified_in_stock_vllm(demo_model: Path, tmp_path: Path):
    pruned, precise, out = tmp_path / "pruned", tmp_path / "precise", tmp_path / "out"
    pruned.mkdir()
    widths = {3: 1100, 12: 0, 20: 1024}
    prune_by_hand(demo_model, pruned, removed_attention={5, 12, 13, 29}, width=lambda layer: widths.get(layer, 1280))
    export_vllm(pruned, precise, dtype=torch.float32)
    with mock.patch.dict(os.environ, {"VLLM_PLUGINS": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}):
        done = sentei_program("export", "nemotron-nas", precise, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert "needs trust_remote_code" in done.stderr
    told = json.loads(done.stdout)
    assert (told["passed"], told["engine"], told["checks"]["differing_tensors"]["value"]) == (True, "vllm", 0)
    assert {"max_difference", "mean_difference", "greedy_margin"} <= set(told["checks"])


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Path]:
    make_family_pico(tmp_path / "source", "qwen2", "grouped")
    export_nemotron_nas(tmp_path / "source", tmp_path / "out")
    return tmp_path / "out", tmp_path / "source"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("configuration_decilm.py", "import os\n", "is not the file that this version of sentei writes"),
        ("modeling_decilm.py", "import os\n", "is none of the files that sentei writes"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x--y.Z", null]}}', "names code to run"),
        ("config.json", '{"model_type": "nemotron-nas", "auto_map": {"AutoConfig": "x--y.Z"}}', "names code to run"),
    ],
)
def test_other_code_is_never_trusted(exported: tuple[Path, Path], name: str, content: str, sentence: str):
    out, source = exported
    (out / name).write_text(content)
    with pytest.raises(SenteiError, match=sentence):
        start_vllm(out, open_checkpoint(source))


def test_engines_that_cannot_run_it(exported: tuple[Path, Path], pico_model: Path, tmp_path: Path):
    export_nemotron_nas(pico_model, tmp_path / "with-tokenizer")
    with pytest.raises(SenteiError, match="nemotron-nas export; engine 'transformers' cannot run it"):
        verify(tmp_path / "with-tokenizer", pico_model, engine="transformers")
    out, _ = exported
    refused(sentei("evaluate", out, "--text", __file__), "is an export for servers that take no plugin")


def test_a_changed_weight_is_found(exported: tuple[Path, Path]):
    from safetensors.torch import load_file, save_file

    from serving.verify.decilm import count_differing

    out, source = exported
    assert count_differing(open_checkpoint(source), open_nas(out, open_checkpoint(source))) == 0
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    del weights["model.layers.2.self_attn.q_proj.bias"]
    save_file(weights, out / "model.safetensors")
    assert count_differing(open_checkpoint(source), open_nas(out, open_checkpoint(source))) == 2
