"""Nothing that sentei runs asks the network for anything, or leaves an identity in the home directory."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.command_line import PROGRAM
from tests.faults.network import NoNetwork, namespaces_work, network_namespace, no_network, python_hook
from toolchain.model.gguf import demo_gguf

# What would keep a library from the network for another reason than ours.
_SET_BY_TESTS = ("HF_HUB_OFFLINE", "HF_HOME", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS")
# What vLLM has learnt of its own model classes.
_CACHES = Path(".cache/vllm/modelinfos")
_RESOLVE = "import socket\ntry: socket.getaddrinfo('example.org', 443)\nexcept OSError as error: print(error)"
_CONNECT = (
    "import socket\ntry: socket.create_connection(('192.0.2.7', 443), timeout=1)\nexcept OSError as error: print(error)"
)
_ASK = """
import json, sys, urllib.request
url = sys.argv[1]
model = json.load(urllib.request.urlopen(url + "/v1/models"))["data"][0]["id"]
body = json.dumps({"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True})
request = urllib.request.Request(url + "/v1/completions", body.encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request))["usage"]["completion_tokens"])
"""


class Offline:
    """Commands without a network, and with a home of their own."""

    def __init__(self, place: NoNetwork, directory: Path) -> None:
        self.place = place
        self.home = directory / "home"
        self.home.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if name not in _SET_BY_TESTS}
        self.environment |= {"HOME": str(self.home), **place.environment}

    def run(self, *words: object) -> str:
        done = subprocess.run(
            [*self.place.enter, *map(str, words)], env=self.environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sentei(self, *words: object) -> str:
        return self.run(PROGRAM, *words)

    def python(self, script: str, *words: object) -> str:
        return self.run(sys.executable, "-c", script, *words)

    @contextmanager
    def server(self, log: Path, *words: object) -> Iterator[str]:
        """``sentei serve`` until it answers; gone with the context."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = [*self.place.enter, PROGRAM, "serve", *map(str, words), "--port", str(port)]
        with (
            log.open("wb") as output,
            subprocess.Popen(command, env=self.environment, stdout=output, stderr=output) as process,
        ):
            try:
                deadline = time.monotonic() + 300
                while not self._is_up(url):
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.5)
                yield url
            finally:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()

    def _is_up(self, url: str) -> bool:
        script = f"import urllib.request; urllib.request.urlopen('{url}/v1/models')"
        command = [*self.place.enter, sys.executable, "-c", script]
        return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def check_silence(self) -> None:
        """Nothing was tried, and the home directory tells nobody's identity."""
        assert self.place.attempts() == 0
        files = [path.relative_to(self.home) for path in self.home.rglob("*") if path.is_file()]
        assert [str(file) for file in files if file.parent != _CACHES] == []


@pytest.fixture
def offline(tmp_path: Path, record_property: Callable[[str, object], None]) -> Iterator[Offline]:
    with no_network(tmp_path) as place:
        record_property("no network by", place.kind)
        yield Offline(place, tmp_path)


@pytest.mark.parametrize("script", [_RESOLVE, _CONNECT], ids=["name", "address"])
@pytest.mark.parametrize("kind", [network_namespace, python_hook])
def test_an_attempt_is_seen(tmp_path: Path, script: str, kind: Callable) -> None:
    if kind is network_namespace and not namespaces_work():
        pytest.skip("This machine allows no network namespaces; the tests below use the hook.")
    with kind(tmp_path) as place:
        offline = Offline(place, tmp_path)
        assert place.attempts() == 0
        offline.python(script)
        assert place.attempts() > 0


def test_pruning_exporting_and_serving_stay_here(offline: Offline, inputs: Path, tmp_path: Path) -> None:
    offline.sentei(
        "prune", inputs / "model", "-o", tmp_path / "pruned", "--sparsity", 0.3, "--align", 8, "--samples", 4,
        "--seq-len", 64, "--calibration", inputs / "text.txt",
    )  # fmt: skip
    offline.sentei("export", "onnx", tmp_path / "pruned", "-o", tmp_path / "onnx")
    with offline.server(tmp_path / "log", tmp_path / "onnx", "--", "--max-model-len", 64) as url:
        assert offline.python(_ASK, url) == "4\n"
    offline.check_silence()


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_the_whole_job_stays_here(offline: Offline, inputs: Path, tmp_path: Path) -> None:
    model, pruned, text = tmp_path / "model", tmp_path / "pruned", inputs / "text.txt"
    few = ("--seq-len", 64, "--windows", 2, "--generations", 1)
    offline.sentei("doctor")
    offline.sentei("import", demo_gguf(), "-o", model)
    offline.sentei("prune", model, "-o", pruned, "--sparsity", 0.1, "--samples", 2, "--seq-len", 64)
    offline.sentei("evaluate", pruned, "--against", model, "--text", text, "-o", tmp_path / "evaluation", *few)
    for kind in ("onnx", "vllm"):
        offline.sentei("export", kind, pruned, "-o", tmp_path / kind)
        offline.sentei("verify", tmp_path / kind, "--against", pruned)
        offline.sentei("generate", tmp_path / kind, "--prompt", "Bread is", "--max-new-tokens", 4)
    load = ("--input-len", 16, "--output-len", 4, "--repeats", 3)
    offline.sentei("export", "onnx", model, "-o", tmp_path / "original-onnx")
    offline.sentei(
        "benchmark", tmp_path / "original-onnx", tmp_path / "onnx", "--engine", "onnx", "-o", tmp_path / "speed", *load
    )
    offline.sentei("report", tmp_path / "speed", pruned, tmp_path / "evaluation", "-o", tmp_path / "report.html")
    offline.check_silence()


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
def test_vllms_server_stays_here(offline: Offline, inputs: Path, tmp_path: Path) -> None:
    options = ("--max-model-len", 64, "--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", "200M")
    with offline.server(tmp_path / "log", inputs / "pruned", "--", *options) as url:
        assert offline.python(_ASK, url) == "4\n"
    offline.check_silence()
