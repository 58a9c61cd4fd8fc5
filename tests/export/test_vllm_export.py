"""The vLLM export: it equals its source, and what cannot be served is refused before anything is written."""

import json

import pytest
import torch

from export.vllm import export_vllm
from tests.conftest import make_pico, prune_by_hand
from tests.families import VARIANTS, make_family_pico
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import CheckFailedError, SenteiError


@pytest.fixture
def pruned_pico(demo_pico, tmp_path):
    directory = tmp_path / "pruned"
    directory.mkdir()
    prune_by_hand(demo_pico, directory, removed_attention={0, 2}, width=lambda layer: 48 - 4 * layer)
    return directory


def test_shards_dtype_and_companions(pruned_pico, tmp_path):
    for name in ("plan.json", "README.md", "plan.safetensors", "pytorch_model.bin"):
        (pruned_pico / name).write_text(name)
    config = json.loads((pruned_pico / "config.json").read_text())
    (pruned_pico / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    out = tmp_path / "out"
    told = export_vllm(pruned_pico, out, dtype=torch.bfloat16, tensor_parallel=2, max_shard_bytes=2_000_000)
    source, written = open_checkpoint(pruned_pico), open_checkpoint(out)
    assert written.layout == source.layout
    assert set(written.tensors) == set(source.tensors)
    for name in source.tensors:
        assert torch.equal(written.read(name), source.read(name).to(torch.bfloat16)), name
    names = {path.name for path in out.iterdir()}
    assert {"plan.json", "README.md", "tokenizer.json", "verification.json"} < names
    assert not names & {"plan.safetensors", "pytorch_model.bin", "model.safetensors"}
    assert sum(name.startswith("model-") for name in names) == 3
    assert written.config["dtype"] == written.config["torch_dtype"] == "bfloat16"
    assert told == json.loads((out / "verification.json").read_text())
    assert (told["passed"], told["dtype"], told["num_tensors"]) == (True, "bfloat16", len(source.tensors))
    assert told["source_fingerprint"] == source.fingerprint


def test_an_unpruned_model_is_copied_as_it_is(demo_pico, tmp_path):
    export_vllm(demo_pico, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    assert written.fingerprint == open_checkpoint(demo_pico).fingerprint
    assert written.config == open_checkpoint(demo_pico).config


def test_widths_that_cannot_be_split_are_named(demo_pico, tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune_by_hand(demo_pico, pruned, removed_attention=set(), width=lambda layer: 48 - layer)
    with pytest.raises(SenteiError, match=r"2 layers: 1 \(47\), 3 \(45\)\. Prune again with --tensor-parallel 2"):
        export_vllm(pruned, tmp_path / "out", tensor_parallel=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tensor_parallel", "fits"), [(1, True), (2, True), (3, False), (4, True), (0, False)])
def test_heads_are_checked(demo_pico, tmp_path, tensor_parallel, fits):
    if fits:
        export_vllm(demo_pico, tmp_path / "out", tensor_parallel=tensor_parallel)
        return
    with pytest.raises(
        SenteiError, match=r"cannot be split over tensor_parallel = 3\. Possible here: 1, 2, 4|at least 1"
    ):
        export_vllm(demo_pico, tmp_path / "out", tensor_parallel=tensor_parallel)


@pytest.mark.parametrize(
    ("family", "variant", "sentence"),
    [
        ("qwen2", "own-head-dim", "head_dim is not hidden_size / num_attention_heads = 8, which vLLM's class for"),
        ("qwen2", "alternating", "layer_types mixes full_attention and sliding_attention"),
        ("qwen3", "alternating", "layer_types mixes full_attention and sliding_attention"),
        ("qwen3", "biased-tied", "attention_bias gives o_proj a bias"),
    ],
)
def test_what_vllms_class_does_not_follow_is_refused(tmp_path, family, variant, sentence):
    make_family_pico(tmp_path / "model", family, variant)
    with pytest.raises(SenteiError, match=sentence):
        export_vllm(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_usual_model_can_be_exported(tmp_path, family):
    make_family_pico(tmp_path / "model", family, next(iter(VARIANTS[family])))
    assert export_vllm(tmp_path / "model", tmp_path / "out", tensor_parallel=2)["passed"]


def test_a_weight_too_large_for_float16_is_refused(tmp_path):
    from transformers import LlamaForCausalLM

    source = tmp_path / "source"
    make_pico(source, num_hidden_layers=1)
    model = LlamaForCausalLM.from_pretrained(source)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e5
    model.save_pretrained(source)
    with pytest.raises(SenteiError, match=r"up_proj.weight holds 1e\+05, more than float16 can"):
        export_vllm(source, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    export_vllm(source, tmp_path / "out", dtype=torch.bfloat16)


def test_bad_requests(demo_pico, tmp_path):
    with pytest.raises(SenteiError, match="float64 is not supported"):
        export_vllm(demo_pico, tmp_path / "out", dtype=torch.float64)
    with pytest.raises(SenteiError, match="positive size"):
        export_vllm(demo_pico, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(SenteiError, match="would replace the input"):
        export_vllm(demo_pico, demo_pico, force=True)


def test_what_reads_back_different_is_not_kept(demo_pico, tmp_path, monkeypatch):
    from export import vllm

    def write_one_wrong(out, tensors, load, **options):
        def load_wrong(name):
            tensor = load(name)
            return tensor.clone().fill_(0) if name.endswith("layers.1.mlp.down_proj.weight") else tensor

        write_weights(out, tensors, load_wrong, **options)

    write_weights = vllm.write_weights
    monkeypatch.setattr(vllm, "write_weights", write_one_wrong)
    with pytest.raises(CheckFailedError, match=r"layers\.1\.mlp\.down_proj\.weight reads back different"):
        export_vllm(demo_pico, tmp_path / "out")
    assert not list(tmp_path.iterdir())
