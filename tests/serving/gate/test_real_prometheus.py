"""The gate with a real Prometheus (Debian's package ``prometheus``), which scrapes what the ONNX server shows."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import Counter, Gauge, start_http_server

from serving.server.onnx.metrics import ServerMetrics
from serving.server.process import free_port
from tests.command_line import sentei
from tests.serving.gate.world import Truth

GATE = """version: 1
original: {job: original}
candidate: {job: candidate}
window: 2m
min_requests: 1000
looks: 1
ttft: {max_ratio: 1.5}
"""


class Canary:
    """A server's numbers, which grow as if it answered; ``truth`` may change while it runs."""

    def __init__(self, truth: Truth, seed: int) -> None:
        self.truth, self._rng = truth, np.random.default_rng(seed)
        self._metrics = ServerMetrics("small", 256)
        labels = {"model_name": "small", "engine": "0"}
        registry = self._metrics.registry
        self._tokens = Counter("vllm:generation_tokens", "", labels, registry=registry).labels(**labels)
        for name in ("num_requests_waiting", "kv_cache_usage_perc"):
            Gauge(f"vllm:{name}", "", labels, registry=registry).labels(**labels).set(0.25)
        self.port = free_port()
        self._server, _ = start_http_server(self.port, addr="127.0.0.1", registry=registry)
        self._stop = threading.Event()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while not self._stop.wait(0.2):
            for _ in range(30):
                failed = self._rng.random() < self.truth.errors
                self._metrics.answered("POST", "/v1/completions", 500 if failed else 200)
                self._metrics.ended["error" if failed else "stop"].inc()
                self._metrics.first_token.observe(self.truth.ttft_s * self._rng.exponential())
                self._metrics.per_token.observe(self.truth.tpot_s * self._rng.exponential())
                self._tokens.inc(8)

    def end(self) -> None:
        """Nobody answers any more."""
        if not self._stop.is_set():
            self._stop.set()
            self._server.shutdown()
            self._server.server_close()


@contextmanager
def real_prometheus(place: Path, ports: dict[str, int]) -> Iterator[str]:
    program = shutil.which("prometheus")
    assert program is not None
    jobs = [{"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for job, port in ports.items()]
    settings = place / "prometheus.yml"
    settings.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    address = f"127.0.0.1:{free_port()}"
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [program, f"--config.file={settings}", f"--storage.tsdb.path={place / 'data'}",
             f"--web.listen-address={address}"], stdout=log, stderr=log, cwd=place,
        )  # fmt: skip
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.acceptance
def test_a_canary_is_promoted_breaks_and_dies(tmp_path: Path):
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed")
    gate = tmp_path / "gate.yaml"
    gate.write_text(GATE)
    sides = {"original": Canary(Truth(), 0), "candidate": Canary(Truth(), 1)}
    with real_prometheus(tmp_path, {job: each.port for job, each in sides.items()}) as url:
        said: list[str] = []

        def until(exit_code: int, words: str, timeout_s: float) -> None:
            """Asks every 3 s until this is the answer."""
            deadline = time.monotonic() + timeout_s
            while True:
                done = sentei("gate", gate, "--prometheus", url, "--json")
                said.append(done.stdout or done.stderr)
                if done.returncode == exit_code and words in said[-1]:
                    return
                assert time.monotonic() < deadline, "\n".join(said[-3:])
                time.sleep(3)

        try:
            until(3, "of each are needed", 60)
            until(0, "Promote", 180)
            sides["candidate"].truth = Truth(errors=0.5)
            until(1, "answers with status 4xx or 5xx", 30)
            sides["candidate"].end()
            until(1, "servers are gone", 30)
        finally:
            for each in sides.values():
                each.end()
