"""LoRA adapters whose widths are not the model's, as vLLM hands them over once it has read them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import prune_by_hand
from tests.families import make_family_pico
from tests.serving.server.test_lora_check import ATTENTION, FFN, make_adapter
from toolchain.architecture.families import family_of
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.errors import SenteiError

pytestmark = pytest.mark.usefixtures("vllm")


@pytest.fixture(params=["llama", "phi3"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """An original of 48 neurons; one of 32 without attention in layer 1 and without an FFN in layer 2; one of 16."""
    make_family_pico(tmp_path / "original", request.param, "grouped")
    for name, removed, width in (("pruned", {1}, 32), ("narrower", set(), 16)):
        (tmp_path / name).mkdir()
        prune_by_hand(
            tmp_path / "original", tmp_path / name, removed_attention=removed,
            width=lambda layer, width=width: 0 if layer == 2 and width == 32 else width,
        )  # fmt: skip
    return {name: tmp_path / name for name in ("original", "pruned", "narrower")}


def left_out(pruned: Checkpoint, adapter: Path) -> list[str]:
    from serving.vllm_plugin.adapters import check_adapter

    weights: dict[str, Any] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        weights.setdefault(module, SimpleNamespace(lora_a=None, lora_b=None))
        setattr(weights[module], kind.lower(), tensor)
    return check_adapter(family_of(pruned.config), pruned.layout, "mine", weights)


def test_an_adapter_of_the_model_fits(models, tmp_path: Path):
    adapter = make_adapter(tmp_path / "a", models["pruned"], ATTENTION | FFN)
    assert left_out(open_checkpoint(models["pruned"]), adapter) == []


def test_of_the_original_attention_fits_where_it_was_kept(models, tmp_path: Path):
    adapter = make_adapter(tmp_path / "a", models["original"], ATTENTION)
    missing = left_out(open_checkpoint(models["pruned"]), adapter)
    assert {name.split(".")[2] for name in missing} == {"1"}


@pytest.mark.parametrize(("trained_on", "width"), [("original", 48), ("narrower", 16)])
def test_another_width_is_refused(models, tmp_path: Path, trained_on: str, width: int):
    for target in sorted(FFN):
        adapter = make_adapter(tmp_path / target, models[trained_on], {target})
        if load_file(adapter / "adapter_model.safetensors"):
            with pytest.raises(SenteiError, match=rf"LoRA adapter mine: model\.layers\.\d\.mlp\.{target} has {width}"):
                left_out(open_checkpoint(models["pruned"]), adapter)


def test_half_an_adapter_is_vllms_to_refuse(models, tmp_path: Path):
    from serving.vllm_plugin.adapters import check_adapter

    pruned = open_checkpoint(models["pruned"])
    half = SimpleNamespace(lora_a=torch.zeros(4, 32), lora_b=None)
    module = f"model.layers.0.{pruned.family.ffn_inputs[0]}"
    assert check_adapter(pruned.family, pruned.layout, "mine", {module: half}) == []


def test_only_workers_of_pruned_models_check(monkeypatch: pytest.MonkeyPatch):
    from vllm.lora.worker_manager import WorkerLoRAManager

    from serving.vllm_plugin.adapters import check_when_loaded

    adapter = SimpleNamespace(loras={"model.layers.0.mlp.down_proj": None})
    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", lambda self, request: adapter)
    check_when_loaded()
    once = WorkerLoRAManager._load_adapter
    check_when_loaded()
    assert WorkerLoRAManager._load_adapter is once
    worker: Any = SimpleNamespace(_adapter_manager=SimpleNamespace(model=torch.nn.Linear(2, 2)))
    assert WorkerLoRAManager._load_adapter(worker, None) is adapter
