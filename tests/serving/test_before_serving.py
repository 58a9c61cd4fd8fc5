"""What ``sentei serve`` looks at before it starts anything, and what becomes of it then."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from export.finish import write_verification
from serving import readiness
from serving.server.vllm import server as vllm_server
from serving.server.vllm.kv_cache_asked import KvCacheAsked, kv_cache_asked
from tests.command_line import refused, sentei
from tests.conftest import prune_by_hand
from toolchain.checkpoint.directory import open_checkpoint


@pytest.fixture
def pruned(pico_model: Path, tmp_path: Path) -> Path:
    """A pruned checkpoint that was verified."""
    directory = tmp_path / "pruned"
    directory.mkdir()
    prune_by_hand(pico_model, directory, removed_attention={0}, width=lambda layer: 48 - 2 * layer)
    (directory / "plan.json").write_text("{}")
    found = {"num_tensors": 1, "checks": {"differing_tensors": {"passed": True, "value": 0, "limit": 0}}}
    write_verification(directory, open_checkpoint(pico_model), stored={"dtype": "float32"}, found=found)
    return directory


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of vLLM's that were reached, on a machine where a vLLM is installed that will do."""
    reached: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: reached.append(command))
    monkeypatch.setattr(vllm_server, "launcher_command", lambda *arguments: ["launcher", *arguments])
    monkeypatch.setattr(readiness, "_version", {"vllm-cpu": "0.32.0"}.get)
    monkeypatch.setattr(readiness, "_runs_on_cpu", lambda version: True)
    monkeypatch.setattr(readiness, "_on_cpu", lambda version: True)
    monkeypatch.setattr(readiness, "plugin_registered", lambda: True)
    monkeypatch.setattr(readiness, "available_bytes", lambda device: 10**9)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else find_spec(name))
    for name in ("VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    return reached


def change(directory: Path, **fields: Any) -> None:
    file = directory / "verification.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_was_verified_is_served_without_a_warning(pruned: Path, started: list[list[str]]):
    done = sentei("serve", pruned)
    assert started and started[0][:3] == ["launcher", "serve", str(pruned)]
    assert "WARNING" not in done.stderr


def test_what_failed_its_verification_is_refused(pruned: Path, started: list[list[str]]):
    checks = {"differing_tensors": {"passed": False, "value": 3, "limit": 0}}
    change(pruned, passed=False, checks=checks)
    refused(sentei("serve", pruned), "failed its verification (differing_tensors)", "--force")
    assert not started
    done = sentei("serve", pruned, "--force")
    assert started
    assert "WARNING:" in done.stderr and "failed its verification" in done.stderr and "--force" in done.stderr


def test_a_verification_that_cannot_be_read_proves_nothing(pruned: Path, started: list[list[str]]):
    (pruned / "verification.json").write_text('{"passed": true}')
    refused(sentei("serve", pruned), "verification.json", "nobody knows whether")
    assert not started


def test_what_was_never_verified_is_served_with_a_warning(pruned: Path, pico_model: Path, started: list[list[str]]):
    (pruned / "verification.json").unlink()
    done = sentei("serve", pruned)
    assert len(started) == 1
    assert "WARNING" in done.stderr and "never compared" in done.stderr and "sentei verify" in done.stderr
    done = sentei("serve", pico_model)  # it was made from nothing
    assert len(started) == 2 and "WARNING" not in done.stderr


def test_what_a_verification_left_out_is_told(pruned: Path, started: list[list[str]]):
    answers = {
        "schema_version": 1, "sentei_version": "0.1.0", "passed": True, "engine": "vllm", "dtype": "float32",
        "not_run": "No GPU: weights were compared, answers were not.", "source_fingerprint": "0" * 64,
        "prompts": "built-in", "num_prompts": 1, "num_tokens": 1, "tolerances": {}, "checks": {},
    }  # fmt: skip
    (pruned / "verification.json").write_text(json.dumps(answers))
    assert "answers were not" in sentei("serve", pruned).stderr
    assert started


def test_that_no_prompt_was_run_is_told(pruned: Path, started: list[list[str]]):
    """Of a quantised model, or a nemotron-nas export made without vLLM, the right tensors are all that is known."""
    done = sentei("serve", pruned)
    assert started and "no prompt was run" in done.stderr and "WARNING" not in done.stderr


def test_an_onnx_export_that_failed_is_refused_before_it_is_loaded(
    pruned: Path, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    served: list[Path] = []
    monkeypatch.setattr("serving.server.onnx.server.serve", lambda directory, options: served.append(directory))
    export = tmp_path / "onnx"
    export.mkdir()
    (export / "genai_config.json").write_text("{}")
    done = sentei("serve", export)
    assert served == [export] and "never compared" in done.stderr
    shutil.copy(pruned / "verification.json", export)
    assert "WARNING" not in sentei("serve", export).stderr
    change(export, passed=False)
    refused(sentei("serve", export), "failed its verification")
    assert served == [export] * 2


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"plugin_registered": lambda: False}, "The vLLM plugin is not registered"),
        ({"_version": {"vllm-cpu": "0.24.0"}.get}, "vLLM 0.24.0 is older than 0.25"),
        ({"available_bytes": lambda device: 10**6}, "of memory are free"),
    ],
)
def test_a_machine_that_cannot_serve_it_is_told_before_vllm_is(
    pruned: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any], sentence: str
):
    for name, value in broken.items():
        monkeypatch.setattr(readiness, name, value)
    refused(sentei("serve", pruned), sentence)
    assert not started
    assert sentence in sentei("serve", pruned, "--force").stderr
    assert started


def test_a_plugin_that_is_left_out_is_told(pruned: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    refused(sentei("serve", pruned), "VLLM_PLUGINS=lora_filesystem_resolver")
    assert not started


PER_TOKEN = 2 * 3 * 2 * 8 * 2  # keys and values, attending layers, heads, head_dim, bytes in 16 bits


@pytest.mark.parametrize(
    ("options", "variable", "fits"),
    [
        (["--max-model-len", "200"], "", True),
        (["--max-model-len=200k"], "", False),
        (["--max_model_len", "200k"], "", False),
        (["--max-model-len", "200k", "--dtype", "float32"], "", False),
        (["--kv-cache-memory-bytes", "1M"], "", True),
        (["--kv-cache-memory-bytes", "2G"], "", False),
        ([], "1", False),
        (["--kv-cache-memory-bytes", "1M"], "1", True),
        (["--max-model-len", "200k", "--cpu-offload-gb", "4"], "", True),  # vLLM's to compute
    ],
)
def test_memory_for_the_kv_cache_that_is_asked_for(
    pruned: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch,
    options: list[str], variable: str, fits: bool,
):  # fmt: skip
    free = open_checkpoint(pruned).weight_bytes + 150_000 * PER_TOKEN
    monkeypatch.setattr(readiness, "available_bytes", lambda device: free)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", variable)
    done = sentei("serve", pruned, "--", *options)
    assert bool(started) == fits, done.stderr
    if not fits:
        refused(done, "asked for", "memory are free")


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--max-model-len", "4k"], KvCacheAsked(max_model_len=4000)),
        (["--max-model-len", "4K"], KvCacheAsked(max_model_len=4096)),
        (["--max-model-len", "25.6k"], KvCacheAsked(max_model_len=25600)),
        (["--max-model-len", "auto"], KvCacheAsked()),
        (["--max-model-len", "-1"], KvCacheAsked()),
        (["--max-model-len", "1", "--max-model-len", "2"], KvCacheAsked(max_model_len=2)),
        (["--port", "--max-model-len"], KvCacheAsked()),
        (["-tp", "2", "--dtype", "half"], KvCacheAsked(tensor_parallel_size=2, dtype="float16")),
        (["--kv-cache-dtype=fp8"], KvCacheAsked(stored_otherwise=True)),
        (["--config", "file.yaml"], KvCacheAsked(spread_otherwise=True)),
    ],
)
def test_options_are_read_as_vllm_reads_them(options: list[str], asked: KvCacheAsked):
    assert kv_cache_asked(options, on_cpu=False) == asked
