"""``sentei deploy-kit`` on real directories: what it reads from them, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.finish import write_verification
from export.onnx_graph import export_onnx
from serving.deploy_kit.facts import Kit, _object_name, gather
from serving.engines.onnxruntime import OnnxEngine
from tests.command_line import refused, sentei
from tests.conftest import make_pico, prune_by_hand
from tests.families import make_family_pico
from tests.readers.files import write_tokenizer
from tests.serving.server.in_process import write_pico_onnx
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.json_files import MAX_BYTES

FAILED = {"num_tensors": 1, "checks": {"differing_tensors": {"passed": False, "value": 1, "limit": 0}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original and a candidate without one attention and a part of its neurons."""
    home = tmp_path_factory.mktemp("models")
    original, candidate = home / "Small Model_1.5", home / "pruned"
    make_pico(original, vocab_size=64, num_hidden_layers=2, head_dim=16)
    write_tokenizer(original)
    candidate.mkdir()
    prune_by_hand(original, candidate, removed_attention={0}, width=lambda _: 16)
    write_tokenizer(candidate)
    return original, candidate


def kit_of(*directories: Path, max_model_len: int | None = None) -> Kit:
    return gather(directories, model_name=None, max_model_len=max_model_len, registry="localhost", version="1")


def test_a_pair(models, tmp_path):
    done = sentei("deploy-kit", *models, "-o", tmp_path / "kit", "--registry", "registry.example:5000/llm", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model_name"], found["name"]) == ("Small Model_1.5", "small-model-1-5")
    assert all((tmp_path / "kit" / file).is_file() for file in found["files"])
    assert {"gate.yaml", "envoy/routes/10.yaml", "runbook.ja.md"} <= set(found["files"])
    assert "There is no file for KServe" in done.stderr  # for the space in the name
    assert "never compared" in done.stderr
    kit = kit_of(*models)
    original, candidate = kit.sides
    assert candidate.weight_bytes < original.weight_bytes
    assert 2 * candidate.kv_bytes_per_token == original.kv_bytes_per_token
    assert original.tag != candidate.tag
    assert kit.max_model_len == 256
    assert f"{original.kv_bytes_per_token} bytes" in (tmp_path / "kit/runbook.en.md").read_text()


def test_the_exports_are_never_replaced(models, tmp_path):
    export = tmp_path / "exports" / "candidate"
    shutil.copytree(models[1], export)
    before = sorted(path.name for path in export.iterdir())
    for out in (export, export.parent):
        refused(sentei("deploy-kit", export, "-o", out), "is not empty")
        refused(sentei("deploy-kit", export, "-o", out, "--force"), "would replace the input")
    assert sorted(path.name for path in export.iterdir()) == before


def test_one_with_a_name_of_its_own(models, tmp_path):
    done = sentei(
        "deploy-kit", models[1], "-o", tmp_path / "kit", "--served-model-name", "org/m", "--max-model-len", "128", "-q"
    )
    assert done.returncode == 0, done.stderr
    files = {path.relative_to(tmp_path / "kit").as_posix() for path in (tmp_path / "kit").rglob("*.yaml")}
    assert "kubernetes/kserve.yaml" in files and "gate.yaml" not in files and "kubernetes/route.yaml" in files
    compose = yaml.safe_load((tmp_path / "kit/compose/compose.yaml").read_text())
    assert compose["services"]["model"]["command"][-3:] == ["--served-model-name=org/m", "--max-model-len", "128"]


def test_another_model_has_another_tag_and_the_same_has_the_same(models, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models[0], copy)
    before = kit_of(models[0]).sides[0].tag
    assert kit_of(copy).sides[0].tag == before
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert kit_of(copy).sides[0].tag != before


def test_other_weights_have_another_tag(tmp_path):
    """Nodes keep the image that they have for a tag; nothing but the weights' own file tells these two apart."""
    make_pico(tmp_path / "model")
    before = kit_of(tmp_path / "model").sides[0].tag
    weights = tmp_path / "model/model.safetensors"
    assert weights.stat().st_size > MAX_BYTES
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert kit_of(tmp_path / "model").sides[0].tag != before


def yarn(factor: float, original: int) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": original}
    return {"rope_parameters": rope}


GEMMA_LINEAR = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}


@pytest.fixture(
    scope="module",
    params=[
        ("qwen3", "grouped", yarn(4.0, 256), 256, 256),
        ("qwen3", "grouped", yarn(4.0, 64), 256, 256),
        ("gemma3_text", "alternating", GEMMA_LINEAR, 256, 256),
        ("llama", "linear", {}, 1024, 1024),
        ("llama", "dynamic", {}, 512, 512),
        ("llama", "llama3", {}, 256, 256),
        ("phi3", "longrope", {"original_max_position_embeddings": 32}, 32, 256),
    ],
    ids=lambda each: "-".join(each[:2]),
)
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A model whose context is 256 tokens as its config states it; what its server takes unasked, and at most."""
    family, variant, changes, unasked, most = request.param
    model = tmp_path_factory.mktemp("scaled") / "model"
    make_family_pico(model, family, variant, **changes)
    return model, unasked, most


def test_servers_are_asked_for_the_context_that_was_verified(scaled):
    model, unasked, most = scaled
    assert kit_of(model).max_model_len == unasked
    assert kit_of(model, max_model_len=most).max_model_len == most
    with pytest.raises(SenteiError, match=f"--max-model-len {most + 1} is more than the {most} tokens"):
        kit_of(model, max_model_len=most + 1)


@pytest.mark.acceptance
def test_vllm_takes_the_context_that_it_is_asked_for(scaled, vllm):
    """And no token more, but for what Phi-3 reads with its long factors."""
    from vllm.config import ModelConfig

    model, unasked, most = scaled
    for asked in (unasked, most):
        assert ModelConfig(model=str(model), max_model_len=asked).max_model_len == asked
    assert ModelConfig(model=str(model)).max_model_len == unasked
    with pytest.raises(ValueError, match="max_model_len"):
        ModelConfig(model=str(model), max_model_len=most + 1)


def test_the_context_of_an_onnx_export_with_two_rotary_tables(tmp_path):
    """Its server answers in batches, whose rows share a table: it starts with no more than the short one holds."""
    model, export = tmp_path / "model", tmp_path / "export"
    wide = {"hidden_size": 64, "original_max_position_embeddings": 32}  # heads of 16, which ONNX Runtime needs
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    make_family_pico(model, "phi3", "longrope", **wide, rope_parameters=rope)
    write_tokenizer(model)
    export_onnx(model, export)
    assert kit_of(export).max_model_len == 32 == OnnxEngine(export).batch_context_length
    with pytest.raises(SenteiError, match="more than the 32 tokens"):
        kit_of(export, max_model_len=33)


def test_more_than_the_short_factors_hold_is_said(tmp_path):
    make_family_pico(tmp_path / "model", "phi3", "longrope", original_max_position_embeddings=32)
    done = sentei("deploy-kit", tmp_path / "model", "-o", tmp_path / "kit", "--max-model-len", "33")
    assert done.returncode == 0, done.stderr
    assert "Above 32 tokens, vLLM uses the long rotary factors for every prompt" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ORIGINAL", "CANDIDATE", "ORIGINAL"], "3 directories were given"),
        (["missing"], "does not exist"),
        (["ORIGINAL", "--max-model-len", "257"], "more than the 256 tokens"),
        (["ORIGINAL", "--served-model-name", "a\nb"], "cannot be the name of a served model"),
        (["ORIGINAL", "--served-model-name", " a"], "cannot be the name of a served model"),
        (["ORIGINAL", "--registry", "Registry/x y"], "no place of images"),
    ],
)
def test_what_is_refused(models, tmp_path, arguments, said):
    places = {"ORIGINAL": models[0], "CANDIDATE": models[1]}
    refused(sentei("deploy-kit", *(places.get(each, each) for each in arguments), "-o", tmp_path / "kit"), said)
    assert not list(tmp_path.iterdir())


def test_what_failed_its_verification_is_not_deployed(models, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models[1], copy)
    write_verification(copy, open_checkpoint(models[0]), stored={"dtype": "float32"}, found=FAILED)
    done = sentei("deploy-kit", copy, "-o", tmp_path / "kit")
    assert done.returncode == 1
    assert "failed its verification" in done.stderr
    (copy / "verification.json").write_text("{}")
    refused(sentei("deploy-kit", copy, "-o", tmp_path / "kit"), "verification.json")
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Qwen/Qwen2.5-7B", "qwen-qwen2-5-7b"), ("7b", "model-7b"), ("剪定", "model"), ("a" * 60, "a" * 40)],
)
def test_names_of_objects(name, expected):
    assert _object_name(name) == expected


def test_sides_of_different_kinds_do_not_fit(models, monkeypatch):
    from dataclasses import replace

    from serving.deploy_kit import facts

    real = facts._side
    monkeypatch.setattr(
        facts,
        "_side",
        lambda directory, role: replace(real(directory, role), engine={"original": "onnx"}.get(role, "vllm")),
    )
    with pytest.raises(SenteiError, match="another engine or device"):
        kit_of(*models)


@pytest.mark.acceptance
def test_an_onnx_export(pico_model, tmp_path):
    export = write_pico_onnx(pico_model, tmp_path, context=256)
    done = sentei("deploy-kit", export, "-o", tmp_path / "kit", "--json")
    assert done.returncode == 0, done.stderr
    assert "kubernetes/kserve.yaml" not in json.loads(done.stdout)["files"]
    assert "sentei[onnx]==" in (tmp_path / "kit/images/server.Containerfile").read_text()
    assert "nvidia" not in (tmp_path / "kit/compose/compose.yaml").read_text()
