"""Checkpoints whose config and tensors disagree: one sentence, for every family, before any weight is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import prune_by_hand
from tests.families import VARIANTS, make_family_pico
from toolchain.architecture.families import FAMILIES, Family
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.model.disk_layers import open_offloaded
from toolchain.model.loading import load_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def good(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("pruned")
    make_family_pico(source, family.model_type, next(iter(VARIANTS[family.model_type])))
    prune_by_hand(source, out, removed_attention={1}, width=(48, 31, 48, 0).__getitem__)
    return out


def refused(good: Path, directory: Path, *parts: str, config: dict | None = None, edit: Callable | None = None) -> None:
    """Spoils a good checkpoint; loading it, whole or layer by layer, must end in one sentence with these parts."""
    spoiled = json.loads((good / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(spoiled))
    tensors = load_file(good / "model.safetensors")
    if edit is not None:
        edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    for load in (load_model, lambda path: open_offloaded(open_checkpoint(path), dtype=torch.float32, device="cpu")):
        with pytest.raises(SenteiError) as caught:
            load(directory)
        for part in parts:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ({"1": {"skip": ["norm"]}}, "layer 1 skips ['norm']"),
        ({"1": {"intermediate_size": 0}}, 'layer 1: intermediate_size is 0. Write "skip": ["mlp"]'),
        ({"9": {"skip": ["mlp"]}}, "names layer '9', but num_hidden_layers is 4"),
        ({"1": {"skip": ["attention"], "intermediate_size": 30}, "3": {"skip": ["mlp"]}}, "says intermediate_size 30"),
        ({"1": {"intermediate_size": 31}, "3": {"skip": ["mlp"]}}, "layer 1 has no weights of self_attn"),
        ({"1": {"skip": ["attention"], "intermediate_size": 31}}, "layer 3 has no weights of mlp"),
        (
            {"0": {"skip": ["mlp"]}, "1": {"skip": ["attention"], "intermediate_size": 31}, "3": {"skip": ["mlp"]}},
            "layer 0 has weights of the skipped mlp",
        ),
    ],
)
def test_per_layer_config_that_does_not_fit(good: Path, tmp_path: Path, override: dict, part: str):
    refused(good, tmp_path, part, config={"per_layer_config": override})


def test_another_number_of_layers(good: Path, tmp_path: Path):
    config = json.loads((good / "config.json").read_text())
    fewer = {"num_hidden_layers": 3, "per_layer_config": {"1": config["per_layer_config"]["1"]}}
    more = {"num_hidden_layers": 5}
    if config.get("layer_types"):
        fewer["layer_types"] = config["layer_types"][:3]
        more["layer_types"] = [*config["layer_types"], "full_attention"]
    refused(good, tmp_path, "holds more layers than num_hidden_layers = 3", config=fewer)
    refused(good, tmp_path, "layer 4 has no weights of self_attn", config=more)


def test_missing_and_left_over_tensors(good: Path, family: Family, tmp_path: Path):
    layer = f"{family.layers}.2"
    output, norm = f"{layer}.{family.attention}.o_proj.weight", f"{layer}.{family.ffn_norms[0]}.weight"

    def drop(name: str) -> Callable[[Tensors], Tensors]:
        return lambda tensors: tensors.pop(name)

    def add(name: str) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update({name: torch.zeros(3)})

    refused(good, tmp_path, "layer 2 has no tensor self_attn.o_proj.weight", edit=drop(output))
    refused(good, tmp_path, f"layer 2 has no weights of {family.ffn_norms[0]}", edit=drop(norm))
    refused(good, tmp_path, "there is no tensor model.norm.weight (1 missing)", edit=drop("model.norm.weight"))
    refused(good, tmp_path, "layer 2 has no tensor mlp.down_proj.weight", edit=drop(f"{layer}.mlp.down_proj.weight"))
    refused(
        good, tmp_path, "layer 2 has a tensor mlp.extra.weight, which the others", edit=add(f"{layer}.mlp.extra.weight")
    )
    refused(good, tmp_path, "layer 2 has a tensor gate.weight, which is no part", edit=add(f"{layer}.gate.weight"))
    refused(good, tmp_path, "no place for tensor model.extra", edit=add("model.extra"))


def test_other_shapes(good: Path, family: Family, tmp_path: Path):
    def cut(name: str) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})

    layer = f"{family.layers}.2"
    refused(
        good, tmp_path, "layer 2", "but config.json says intermediate_size 48",
        edit=cut(f"{layer}.{family.ffn_inputs[0]}.weight"),
    )  # fmt: skip
    refused(
        good, tmp_path, "layer 2: self_attn.o_proj.weight has shape [31,", edit=cut(f"{layer}.self_attn.o_proj.weight")
    )
    refused(good, tmp_path, "embed_tokens.weight has shape [95, 32]", edit=cut("model.embed_tokens.weight"))


def test_a_config_that_transformers_refuses(good: Path, tmp_path: Path):
    refused(good, tmp_path, "config.json: Transformers refuses it", config={"rms_norm_eps": "small"})


def test_the_good_one_loads(good: Path):
    assert load_model(good).config.num_hidden_layers == 4
