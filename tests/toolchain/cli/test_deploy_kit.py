"""``sentei deploy-kit`` on real directories: what it reads from them, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from export.finish import write_verification
from serving.deploy_kit.facts import _object_name, gather
from tests.command_line import refused, sentei
from tests.conftest import make_pico, prune_by_hand
from tests.readers.files import write_tokenizer
from tests.serving.server.in_process import write_pico_onnx
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError

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


def test_a_pair(models, tmp_path):
    done = sentei("deploy-kit", *models, "-o", tmp_path / "kit", "--registry", "registry.example:5000/llm", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model_name"], found["name"]) == ("Small Model_1.5", "small-model-1-5")
    assert all((tmp_path / "kit" / file).is_file() for file in found["files"])
    assert {"gate.yaml", "envoy/routes/10.yaml", "runbook.ja.md"} <= set(found["files"])
    assert "There is no file for KServe" in done.stderr  # for the space in the name
    assert "never compared" in done.stderr
    kit = gather(models, model_name=None, max_model_len=None, registry="localhost", version="1")
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

    def tag() -> str:
        return gather([copy], model_name=None, max_model_len=None, registry="localhost", version="1").sides[0].tag

    before = tag()
    assert before == gather([models[0]], model_name=None, max_model_len=None, registry="x", version="1").sides[0].tag
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert tag() != before


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
        gather(models, model_name=None, max_model_len=None, registry="localhost", version="1")


@pytest.mark.acceptance
def test_an_onnx_export(pico_model, tmp_path):
    export = write_pico_onnx(pico_model, tmp_path, context=256)
    done = sentei("deploy-kit", export, "-o", tmp_path / "kit", "--json")
    assert done.returncode == 0, done.stderr
    assert "kubernetes/kserve.yaml" not in json.loads(done.stdout)["files"]
    assert "sentei[onnx]==" in (tmp_path / "kit/images/server.Containerfile").read_text()
    assert "nvidia" not in (tmp_path / "kit/compose/compose.yaml").read_text()
