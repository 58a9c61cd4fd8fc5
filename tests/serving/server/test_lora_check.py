"""LoRA adapters of a pruned checkpoint: what fits, what is left out, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from serving.server.vllm import server as vllm_server
from serving.server.vllm.lora_check import check_adapters
from tests.conftest import prune_by_hand
from tests.families import make_family_pico
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError

ATTENTION = {"q_proj", "v_proj", "o_proj", "qkv_proj"}
FFN = {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}
RANK = 4


def make_adapter(directory: Path, model: Path, targets: set[str]) -> Path:
    """Random matrices, in the form that PEFT writes, for a model's modules of these names."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, info in open_checkpoint(model).tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and len(info.shape) == 2:
            for kind, shape in (("lora_A", (RANK, info.shape[1])), ("lora_B", (info.shape[0], RANK))):
                tensors[f"base_model.model.{module}.{kind}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(targets), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    return directory


@pytest.fixture(params=["llama", "phi3"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    source, out = tmp_path / "source", tmp_path / "pruned"
    make_family_pico(source, request.param, "grouped")
    out.mkdir()
    prune_by_hand(source, out, removed_attention={1}, width=(48, 48, 31, 0).__getitem__)
    return source, out


def test_an_adapter_of_the_pruned_model_fits(models, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "a", models[1], ATTENTION | FFN)
    check_adapters(models[1], ["--enable-lora", "--lora-modules", f"mine={adapter}", "--port", "1"])
    assert capsys.readouterr().err == ""


def test_removed_attention_is_left_out_of_an_adapter_of_the_original(models, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "a", models[0], ATTENTION)
    check_adapters(models[1], [f"--lora-modules=mine={adapter}"])
    assert "of its modules were removed" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["mine={}", '{{"name": "mine", "path": "{}"}}'])
def test_another_width_is_refused_before_the_server_starts(models, tmp_path, monkeypatch, form):
    adapter = make_adapter(tmp_path / "a", models[0], FFN)
    monkeypatch.setattr(vllm_server.os, "execve", lambda *_: pytest.fail("a server was started"))
    with pytest.raises(
        SenteiError, match=r"Adapter mine: model\.layers\.2\.mlp\.\w+ has .* before its FFNs were narrow"
    ):
        vllm_server.serve(models[1], ["--lora-modules", form.format(adapter)])


def test_what_cannot_be_read_is_refused(models, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(SenteiError, match="holds no readable adapter_model"):
        check_adapters(models[1], ["--lora-modules", f"mine={tmp_path / 'a'}"])
    with pytest.raises(SenteiError, match="not an object with name and path"):
        check_adapters(models[1], ["--lora-modules", "{}"])
