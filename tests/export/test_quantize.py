"""Quantising: what is refused, what is checked of llm-compressor's work, and, in acceptance, llm-compressor itself."""

import json
import shutil
import stat
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from export import quantize as module
from export import quantize_worker
from export.quantize import PYTHON_VARIABLE, pick_group_size, quantize
from serving.verify.verify import verify
from tests.command_line import refused, sentei
from tests.conftest import prune_by_hand
from tests.quantized import SCHEMES, write_quantized
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.checkpoint.quantized import open_quantized
from toolchain.errors import CheckFailedError, SenteiError

# Stands in for llm-compressor's environment: does the job with the tests' own arithmetic.
STAND_IN = """#!{python}
import json, os, sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch
from tests.quantized import write_quantized
assert sys.argv[1:4] == ["-P", "-m", "export.quantize_worker"], sys.argv
job_file = Path(sys.argv[4])
job = json.loads(job_file.read_text())
print("rounding", job["scheme"], job["group_size"])
change = lambda tensors: None
exec(os.environ.get("STAND_IN_DOES", ""))
write_quantized(Path(job["source"]), Path(job["out"]), job["scheme"], change=change)
(Path(job["out"]) / "generation_config.json").write_text("of llm-compressor")
job_file.with_suffix(".done").write_text(json.dumps({{"llmcompressor": "none"}}))
"""
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Lets the environment name a program in place of llm-compressor's Python."""
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN.format(python=sys.executable, path=[str(Path(__file__).parents[2])]))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(PYTHON_VARIABLE, str(program))
    return monkeypatch


def test_a_models_own_sampling_does_not_stop_the_worker(pruned_wide, tmp_path, monkeypatch):
    """Most chat models say how they are to be sampled; hours of rounding would be lost as they are written."""
    source, job = tmp_path / "source", tmp_path / "job.json"
    shutil.copytree(pruned_wide, source)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    asked = {"source": str(source), "out": str(tmp_path / "out"), "scheme": "fp8", "group_size": None, "windows": None}
    job.write_text(json.dumps(asked))
    monkeypatch.setattr(quantize_worker, "_recipe", lambda scheme, group_size: None)
    monkeypatch.setattr(quantize_worker, "_quantize", lambda model, recipe, calibration: None)
    monkeypatch.setattr(quantize_worker, "version", lambda name: "1")
    quantize_worker.main(job)
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(source).tensors.keys()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_out_is_a_directory_like_any_other(pruned_wide, text, tmp_path, stand_in, scheme):
    source = tmp_path / "source"
    source.mkdir()
    for path in pruned_wide.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("plan.json", "README.md", "plan.safetensors"):
        (source / name).write_text(name)
    more = ["--calibration", text, "--samples", 2, "--seq-len", 16] if scheme == "w4a16" else []
    done = sentei("quantize", source, "--scheme", scheme, "-o", tmp_path / "out", "--json", *more)
    assert done.returncode == 0, done.stderr
    assert f"rounding {scheme}" in done.stderr
    told = json.loads(done.stdout)
    written = json.loads((tmp_path / "out/verification.json").read_text())
    assert told == {"directory": str(tmp_path / "out"), **written}
    assert (told["passed"], told["scheme"], told["num_matrices"]) == (True, scheme, 4 * 2 + 3 * 3)
    assert told["quantised_with"] == {"llmcompressor": "none"}
    assert told["source_fingerprint"] == open_checkpoint(source).fingerprint
    assert told["weight_bytes"] < told["source_weight_bytes"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"plan.json", "tokenizer.json", "model.safetensors"} < names
    assert "plan.safetensors" not in names
    assert (tmp_path / "out/generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert f"--scheme {scheme}" in (tmp_path / "out/README.md").read_text()
    config = json.loads((tmp_path / "out/config.json").read_text())
    config.pop("quantization_config")
    assert config == open_checkpoint(source).config
    assert open_quantized(tmp_path / "out").layout == open_checkpoint(source).layout
    refused(sentei("quantize", source, "--scheme", scheme, "-o", tmp_path / "out", *more), "is not empty")
    assert sentei("quantize", source, "--scheme", scheme, "-o", tmp_path / "out", "--force", *more).returncode == 0


@pytest.mark.parametrize(
    ("does", "sentence"),
    [
        (f"change = lambda t: t['{Q_PROJ}.weight'].mul_(-1)", r"q_proj\.weight is no fair rounding"),
        (f"change = lambda t: t['{Q_PROJ}.weight_scale'].fill_(float('nan'))", r"q_proj\.weight is no fair rounding"),
        ("change = lambda t: t['model.norm.weight'].add_(1)", r"model\.norm\.weight is not rounded, and yet differs"),
        ("change = lambda t: t.pop('lm_head.weight')", r"has other tensors than .*: lm_head\.weight"),
        ("job['scheme'] = 'fp8'", "rounded to fp8, not to int8"),
    ],
)
def test_what_is_wrong_is_not_kept(pruned_wide, tmp_path, stand_in, does, sentence):
    stand_in.setenv("STAND_IN_DOES", does)
    with pytest.raises(CheckFailedError, match=sentence):
        quantize(pruned_wide, tmp_path / "out", scheme="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["stand-in"]


def test_a_failure_of_llm_compressor_is_told_in_its_words(pruned_wide, tmp_path, stand_in):
    stand_in.setenv("STAND_IN_DOES", "sys.exit('no such luck')")
    done = sentei("quantize", pruned_wide, "--scheme", "int8", "-o", tmp_path / "out", "--quiet")
    refused(done, "ended with exit code 1", "no such luck")
    assert [path.name for path in tmp_path.iterdir()] == ["stand-in"]


def test_bad_requests(pruned_wide, text, tmp_path, stand_in):
    out = tmp_path / "out"
    with pytest.raises(SenteiError, match=r"--scheme 'int3' is not known\. Use fp8, int8, w4a16"):
        quantize(pruned_wide, out, scheme="int3")
    assert sentei("quantize", pruned_wide, "--scheme", "int3", "-o", out).returncode == 2
    refused(sentei("quantize", tmp_path / "nowhere", "--scheme", "int8", "-o", out), "does not exist")
    refused(sentei("quantize", pruned_wide, "--scheme", "fp8", "-o", out, "--calibration", text), "without looking")
    refused(
        sentei("quantize", pruned_wide, "--scheme", "int8", "-o", pruned_wide, "--force"), "would replace the input"
    )
    write_quantized(pruned_wide, tmp_path / "quantised", "int8")
    refused(sentei("quantize", tmp_path / "quantised", "--scheme", "int8", "-o", out), "quantised checkpoints are not")
    assert not out.exists()


def test_without_llm_compressor_there_is_one_sentence(pruned_wide, tmp_path, monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    done = sentei("quantize", pruned_wide, "--scheme", "int8", "-o", tmp_path / "out")
    refused(done, "llm-compressor is not installed", "make quantize-env", PYTHON_VARIABLE)
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "no-python"))
    refused(sentei("quantize", pruned_wide, "--scheme", "int8", "-o", tmp_path / "out"), "is no program")


@pytest.mark.parametrize(("width", "expected"), [(128, 64), (192, 64), (96, 32), (40, None)])
def test_the_group_divides_every_width(wide_model, tmp_path, stand_in, width, expected):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune_by_hand(wide_model, pruned, removed_attention={1}, width=lambda layer: width if layer == 2 else 192)
    if expected is None:
        done = sentei("quantize", pruned, "--scheme", "w4a16", "-o", tmp_path / "out", "--samples", 1, "--seq-len", 8)
        refused(done, "none divides the 40 of model.layers.2.mlp.down_proj.weight (1 such", "Prune with --align 64")
    else:
        assert pick_group_size(open_checkpoint(pruned)) == expected


@pytest.fixture(scope="module")
def narrow_demo(demo_model, tmp_path_factory):
    """The demo model without two attentions and one FFN, and with widths that are multiples of 64, not of 128."""
    directory = tmp_path_factory.mktemp("models") / "narrow-demo"
    directory.mkdir()

    def width(layer):
        return 0 if layer == 20 else 1536 - 64 * (layer % 8)

    prune_by_hand(demo_model, directory, removed_attention={0, 12}, width=width)
    return directory


@pytest.mark.acceptance
@pytest.mark.parametrize("scheme", SCHEMES)
def test_llm_compressor_and_vllm(narrow_demo, pruned_wide, tmp_path, scheme):
    """The real thing: llm-compressor rounds, sentei checks, vLLM computes with what came out."""
    # On a CPU vLLM multiplies fp8 in plain loops, which takes minutes a prompt in the demo model.
    model, out = pruned_wide if scheme == "fp8" else narrow_demo, tmp_path / "out"
    more = ["--samples", 16, "--seq-len", 512] if scheme == "w4a16" else []
    done = sentei("quantize", model, "--scheme", scheme, "-o", out, "--json", *more)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["group_size"] == (64 if scheme == "w4a16" else None)
    verdict = verify(out, model)
    assert verdict["passed"], verdict["checks"]
    assert (verdict["engine"], verdict["dtype"]) == ("vllm", scheme)


@pytest.mark.acceptance
def test_a_damaged_matrix_fails(narrow_demo, tmp_path):
    """Layer 17 is the demo model's least sensitive one."""
    quantize(narrow_demo, tmp_path / "out", scheme="int8")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.17.mlp.down_proj.weight_scale"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    verdict = verify(tmp_path / "out", narrow_demo)
    assert not verdict["passed"]
    assert verdict["checks"]["int8_gain"]["matrix"] == "model.layers.17.mlp.down_proj.weight"
