"""Many clients at once, good and bad, for minutes: every good one gets its answer, and the server does not grow."""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.server.onnx.server import running_server
from serving.server.process import HOST
from tests.accidents.processes import wait_for
from tests.serving.server.in_process import COMPLETIONS, write_pico_onnx

DURATION_S = 300.0
WARM_UP_S = DURATION_S / 5
CLIENTS = 64
# A growth of the server's memory from the end of the warm-up on, in bytes: nothing per request may stay.
GROWTH = 48 * 2**20
MALFORMED = (
    b"{",
    b"null",
    b'{"prompt": 5}',
    b'{"prompt": "a", "n": 2}',
    b'{"prompt": "\xff"}',
    b'{"prompt": [1], "seed": -1}',
)


class Load:
    """Clients of one server, and what became of their requests."""

    def __init__(self, port: int, expected: dict[int, str], ends_at: float) -> None:
        self.port, self.expected, self.ends_at = port, expected, ends_at
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, number: int) -> None:
        """One client, always of one kind, until the time is over."""
        kinds: tuple[Callable[[random.Random], None], ...] = (
            self.good, self.streamed, self.good, self.malformed, self.hangs_up, self.reads_slowly, self.good,
            self.streamed,
        )  # fmt: skip
        draw, kind = random.Random(number), kinds[number % len(kinds)]
        while time.monotonic() < self.ends_at:
            try:
                kind(draw)
            except Exception as error:
                self.wrong.append(f"{kind.__name__}: {error!r}")
                return
            self.counts[kind.__name__] += 1

    def good(self, draw: random.Random) -> None:
        """Wants the answer that the model gives alone."""
        length = draw.choice(list(self.expected))
        status, text = self.post(json.dumps(self.body(length)).encode())
        if status != 200 or json.loads(text)["choices"][0]["text"] != self.expected[length]:
            raise AssertionError(f"{status} {text[:300]}")

    def streamed(self, draw: random.Random) -> None:
        """Wants the same in pieces."""
        length = draw.choice(list(self.expected))
        status, text = self.post(json.dumps(self.body(length) | {"stream": True}).encode())
        pieces = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        said = "".join(piece["choices"][0]["text"] for piece in pieces)
        if status != 200 or said != self.expected[length] or not text.endswith("data: [DONE]\n\n"):
            raise AssertionError(f"{status} {text[-300:]}")

    def malformed(self, draw: random.Random) -> None:
        """Sends what is no request, and is told so."""
        status, text = self.post(draw.choice(MALFORMED))
        if status != 400 or json.loads(text)["error"]["code"] != 400:
            raise AssertionError(f"{status} {text[:300]}")
        time.sleep(0.05)

    def hangs_up(self, draw: random.Random) -> None:
        """Goes away: before its body is complete, or before or within its answer."""
        body = json.dumps(self.body(draw.choice(list(self.expected))) | {"stream": draw.random() < 0.5}).encode()
        with socket.create_connection((HOST, self.port), timeout=60) as connection:
            connection.sendall(self.head(len(body)) + body[: draw.choice([5, len(body)])])
            time.sleep(draw.random() * 0.3)

    def reads_slowly(self, draw: random.Random) -> None:
        """Takes a few bytes at a time, and gets all of its answer."""
        length = draw.choice(list(self.expected))
        body = json.dumps(self.body(length) | {"stream": True}).encode()
        with socket.create_connection((HOST, self.port), timeout=120) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(self.head(len(body)) + body)
            received = bytearray()
            while b"[DONE]" not in received:
                piece = connection.recv(512)
                if not piece:
                    raise AssertionError(f"ended after {bytes(received[-300:])!r}")
                received += piece
                time.sleep(0.01)

    @staticmethod
    def body(length: int) -> dict[str, Any]:
        """A request whose prompt is that long."""
        return {"prompt": [100 + length] * length, "max_tokens": 24, "temperature": 0, "ignore_eos": True}

    @staticmethod
    def head(length: int) -> bytes:
        """What comes before a body."""
        kind = "Content-Type: application/json"
        return f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n".encode()

    def post(self, body: bytes) -> tuple[int, str]:
        """Status and text of an answer."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=120)
        try:
            connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def numbers(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {line.split("{")[0].split(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(DURATION_S + 300)
def test_nothing_is_lost_and_memory_is_flat(pico_model: Path, tmp_path: Path):
    export = write_pico_onnx(pico_model, tmp_path, context=256)
    log = tmp_path / "log"
    with running_server(export, options=["--max-num-seqs", "8", "--max-model-len", "256"], log=log) as url:
        port = int(url.rpartition(":")[2])
        alone = Load(port, {}, 0)
        expected = {}
        for length in (1, 7, 40, 200):
            _, text = alone.post(json.dumps(alone.body(length)).encode())
            expected[length] = json.loads(text)["choices"][0]["text"]
        load = Load(port, expected, time.monotonic() + DURATION_S)
        clients = [threading.Thread(target=load.run, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(WARM_UP_S)
        before = numbers(port)["process_resident_memory_bytes"]
        for client in clients:
            client.join(DURATION_S + 200)
        wait_for(lambda: numbers(port)["vllm:num_requests_running"] == 0, 30)
        after = numbers(port)
        files = len(list(Path(f"/proc/{_pid(log)}/fd").iterdir()))
    assert load.wrong == [], load.wrong[:3]
    assert all(load.counts[kind] for kind in ("good", "streamed", "malformed", "hangs_up", "reads_slowly")), load.counts
    assert after["process_resident_memory_bytes"] - before < GROWTH, (before, after["process_resident_memory_bytes"])
    assert after["vllm:num_requests_waiting"] == after["vllm:kv_cache_usage_perc"] == 0
    assert files < CLIENTS
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    print(dict(load.counts), f"{before / 2**20:.0f} MiB, then {after['process_resident_memory_bytes'] / 2**20:.0f} MiB")


def _pid(log: Path) -> int:
    return int(log.read_text().partition("Started server process [")[2].partition("]")[0])
