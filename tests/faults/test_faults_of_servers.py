"""A server is interrupted, killed, or short of memory while it answers; then it is started again on the same port."""

import importlib.util
import json
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.faults.place import plain_place
from tests.faults.running import Ended, Running, running
from tests.faults.table import Observed

ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("pruned-onnx", ("--max-num-seqs", "2", "--max-model-len", "500")),
    "vllm": (
        "pruned",
        ("--max-model-len", "500", "--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", "200M"),
    ),
}
FAULTS: dict[str, tuple[Callable[[Running], None], int]] = {
    "Ctrl-C": (lambda run: run.press_ctrl_c(), 130),
    "SIGTERM": (lambda run: run.process.terminate(), 0),  # how service managers ask a server to stop
    "SIGKILL": (lambda run: run.process.kill(), 137),
}


def _cells() -> Iterator[Any]:
    for engine in ENGINES:
        for fault in FAULTS:
            marks = [] if (engine, fault) == ("onnx", "Ctrl-C") else [pytest.mark.acceptance]
            if engine == "vllm" and importlib.util.find_spec("vllm") is None:
                marks.append(pytest.mark.skip(reason="vLLM is not installed"))
            yield pytest.param(engine, fault, marks=marks)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _ask(url: str, **fields: object) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
        model = json.load(response)["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True, **fields})
    request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
        return bool(response.status == 200)
    return False


@contextmanager
def _serving(engine: str, inputs: Path, scratch: Path, port: int) -> Iterator[tuple[Running, str]]:
    directory, options = ENGINES[engine]
    words = ("serve", inputs / directory, "--", *options, "--port", port)
    place, url = plain_place(scratch / f"place-{len(list(scratch.iterdir()))}"), f"http://127.0.0.1:{port}"
    # vLLM's sockets are there, whose path may not be as long as pytest's directories are.
    with TemporaryDirectory() as short, running(words, place, scratch, environment={"TMPDIR": short}) as run:
        run.wait_until(lambda: _answers(url), timeout_s=240)
        yield run, url


@pytest.mark.parametrize(("engine", "fault"), _cells())
def test_a_fault_of_a_server(
    engine: str, fault: str, inputs: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    cause, exit_code = FAULTS[fault]
    port = _free_port()
    with _serving(engine, inputs, tmp_path, port) as (run, url):
        text = _ask(url, max_tokens=8)["choices"][0]["text"]
        threading.Thread(target=_ask_in_vain, args=(url,), daemon=True).start()
        cause(run)
        if not _ends(run, 20):
            # vLLM may wait for the connection, and says then what this does.
            assert engine == "vllm" and "CTRL+C to force quit" in run.text()
            cause(run)
            exit_code = 143 if fault == "SIGTERM" else exit_code
        ended = run.wait(timeout_s=30)
        assert run.wait_for_relatives() == []
    assert ended.exit_code == exit_code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert (_said(ended) == "Interrupted.") == (exit_code in (130, 143)), ended.stderr
    with _serving(engine, inputs, tmp_path, port) as (_, url):
        assert _ask(url, max_tokens=8)["choices"][0]["text"] == text
    observed = Observed(
        fault=fault, command=f"serve, {engine}", stage="answering", exit_code=ended.exit_code, said=_said(ended),
        left="nothing", next_run="serves on the same port, with the same answers",
    )  # fmt: skip
    record_property("reliability", observed.as_json())


def _said(ended: Ended) -> str:
    """Without what libraries write after it."""
    return ended.said[: len("Interrupted.")]


def _ends(run: Running, timeout_s: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        run.process.wait(timeout_s)
        return True
    return False


def _ask_in_vain(url: str) -> None:
    with suppress(OSError, ValueError):
        _ask(url, max_tokens=480)
