"""A server that is told to stop serves who is inside, for so long; and a key stays where it was typed."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from serving.server.onnx import batch_thread
from serving.server.onnx.api import OnnxApi, ServerLimits
from serving.server.process import HOST, free_port, is_healthy
from tests.accidents.processes import descendants, wait_for
from tests.serving.server.in_process import Gate, Served, serving, write_pico_onnx

LIMITS = ServerLimits(max_num_seqs=2, max_model_len=256)
KEY, TOKENS = "typed-by-hand", 2000  # which take longer than the second that Ctrl-C leaves


@pytest.fixture(scope="module")
def export(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_onnx(pico_model, tmp_path_factory.mktemp("onnx"), context=4096)


@contextmanager
def server(export: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    command = [sys.executable, "-m", "serving.server.onnx.server", str(export), "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(lambda: is_healthy(f"http://{HOST}:{port}"), 60)
        yield process, port
    finally:
        process.kill()
        process.wait()


class Asking(threading.Thread):
    """A client that waits for a long answer."""

    def __init__(self, port: int, *, stream: bool) -> None:
        super().__init__(daemon=True)
        self._port, self._stream = port, stream
        self.status, self.text = 0, ""
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=120)
        body = {"prompt": [5], "max_tokens": TOKENS, "ignore_eos": True, "stream": self._stream}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        with suppress(OSError):
            response = connection.getresponse()
            self.status = response.status
            self.text = response.read().decode()


def running(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return 'vllm:num_requests_running{engine="0",model_name="pico-export"} 2.0' in text


def inside(served: Served) -> int:
    """How many requests have arrived: with a row or without, as it happens."""
    return served.api._batch.num_running + served.api._thread.num_waiting


@pytest.mark.parametrize("stream", [False, True])
def test_who_is_inside_is_served_and_the_door_is_closed(export: Path, monkeypatch: pytest.MonkeyPatch, stream: bool):
    with serving(OnnxApi(export, LIMITS), drain_s=30) as served:
        gate = Gate(served.api)
        monkeypatch.setattr(served.api._engine, "step", gate)
        with gate.closed():
            answers, threads = served.in_background(3, max_tokens=20, stream=stream)  # of which one waits at least
            wait_for(lambda: inside(served) == 3, 30)
            served.server.should_exit = True
            wait_for(lambda: not is_healthy(served.url), 10)
            time.sleep(1.5)  # more than Ctrl-C leaves
        for thread in threads:
            thread.join(30)
    assert [answer.status for answer in answers] == [200] * 3
    if stream:
        assert all(answer.content.endswith("data: [DONE]\n\n") for answer in answers)
    else:
        assert [answer.content["usage"]["completion_tokens"] for answer in answers] == [20] * 3


@pytest.mark.parametrize(("drain_s", "signals"), [(0.3, []), (90, [signal.SIGINT])])
def test_what_is_not_finished_in_time_ends_with_an_error_even_where_the_engine_is_stuck(
    export: Path, monkeypatch: pytest.MonkeyPatch, drain_s: float, signals: list[int]
):
    """After SIGTERM as long as was asked for, after Ctrl-C a second."""
    monkeypatch.setattr(batch_thread, "_STOP_S", 0.1)
    with serving(OnnxApi(export, LIMITS), drain_s=drain_s) as served:
        gate = Gate(served.api)
        monkeypatch.setattr(served.api._engine, "step", gate)
        with gate.closed():
            streamed, threads = served.in_background(stream=True)
            whole, more = served.in_background(2)
            wait_for(lambda: inside(served) == 3, 30)
            started = time.monotonic()
            served.server._captured_signals += signals
            served.server.should_exit = True
            for thread in (*threads, *more):
                thread.join(60)
            assert time.monotonic() - started < 60
    for answer in (*streamed, *whole):
        assert answer.status == 503 and "shutting down" in answer.error


@pytest.mark.acceptance
def test_who_is_inside_is_served_to_the_end(export: Path, tmp_path: Path):
    log = tmp_path / "log"
    with server(export, log, "--api-key", KEY, "--drain-seconds", "90") as (process, port):
        for pid in descendants(process.pid):  # the process list, beyond what was typed
            assert KEY not in Path(f"/proc/{pid}/cmdline").read_text()
        asking = [Asking(port, stream=stream) for stream in (True, False)]
        wait_for(lambda: running(port), 30)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not is_healthy(f"http://{HOST}:{port}"), 5)
        assert process.poll() is None
        for each in asking:
            each.join(100)
        assert process.wait(timeout=30) == 0
    streamed, whole = asking
    assert streamed.status == whole.status == 200
    assert streamed.text.count("data: ") == TOKENS + 1 and streamed.text.endswith("data: [DONE]\n\n")
    assert json.loads(whole.text)["usage"]["completion_tokens"] == TOKENS
    said = log.read_text()
    assert KEY not in said and "Traceback" not in said


@pytest.mark.acceptance
def test_what_is_not_finished_in_time_ends_with_an_error(export: Path, tmp_path: Path):
    log = tmp_path / "log"
    with server(export, log, "--drain-seconds", "0") as (process, port):
        asking = [Asking(port, stream=stream) for stream in (True, False)]
        wait_for(lambda: running(port), 30)
        started = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        for each in asking:
            each.join(30)
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - started < 15
    streamed, whole = asking
    last = json.loads(streamed.text.rpartition("data: ")[2])
    assert last["error"]["code"] == 503 and "shutting down" in last["error"]["message"]
    assert whole.status == 503 and json.loads(whole.text)["error"]["type"] == "service_unavailable_error"
    assert "Traceback" not in log.read_text()
