"""A Prometheus on loopback that knows what a test lets it know; the real one is in test_real_prometheus.py."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from serving.gate.counts import Latency, Side

NOW_S = 1_800_000_000.0
Answer = Callable[[str], tuple[int, bytes]]


@contextmanager
def prometheus(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """Serves while the context lasts; yields its URL, and the queries that it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query).get("query", [""])[0]
            asked.append(query)
            status, content = answer(query) if parts.path == "/api/v1/query" else (404, b"not found")
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", content.decode())
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def knows(sides: Mapping[str, list[dict[str, Any]]]) -> Answer:
    """Answers what the gate asks: the time, and all series of a job."""

    def answer(query: str) -> tuple[int, bytes]:
        if query == "time()":
            return 200, success("scalar", [NOW_S, str(NOW_S)])
        found = re.fullmatch(r'\{__name__=~"[^"]+",job="(\w+)"\}\[\d+s:\d+s\]', query)
        assert found is not None, query
        return 200, success("matrix", sides[found[1]])

    return answer


def success(kind: str, result: Any, **more: Any) -> bytes:
    content = {"status": "success", "data": {"resultType": kind, "result": result}, **more}
    return json.dumps(content).encode()


def series_of(side: Side, job: str, window_s: float) -> list[dict[str, Any]]:
    """What Prometheus would hold of one server with these counts: a sample at each end of a block."""
    ends = NOW_S - window_s + window_s / len(side.answers) * np.arange(len(side.answers) + 1)

    def series(name: str, values: np.ndarray, **labels: str) -> dict[str, Any]:
        metric = {"__name__": name, "job": job, "instance": "127.0.0.1:8000", **labels}
        return {"metric": metric, "values": [[t, repr(float(v))] for t, v in zip(ends, values, strict=True)]}

    def counter(name: str, grown: np.ndarray, **labels: str) -> dict[str, Any]:
        return series(name, 7 + np.concatenate([[0], np.cumsum(grown)]), **labels)

    def level(name: str, values: np.ndarray) -> dict[str, Any]:
        return series(name, np.concatenate([values[:1], values]))

    def histogram(name: str, latency: Latency) -> list[dict[str, Any]]:
        buckets = [
            counter(f"{name}_bucket", each, le="+Inf" if bound == np.inf else str(bound))
            for bound, each in latency.within.items()
        ]
        return [*buckets, counter(f"{name}_sum", latency.sums_s), counter(f"{name}_count", latency.counts)]

    handler = {"handler": "/v1/completions", "method": "POST"}
    return [
        counter("vllm:generation_tokens_total", 10 * side.answers),
        counter("http_requests_total", side.answers - side.error_answers, status="2xx", **handler),
        counter("http_requests_total", side.error_answers, status="5xx", **handler),
        counter("http_requests_total", 100 * side.answers, status="2xx", handler="/metrics", method="GET"),
        counter("vllm:request_success_total", side.ended - side.unfinished, finished_reason="stop"),
        counter("vllm:request_success_total", side.unfinished, finished_reason="error"),
        level("vllm:num_requests_waiting", side.waiting),
        level("vllm:kv_cache_usage_perc", side.kv_cache),
        *histogram("vllm:time_to_first_token_seconds", side.ttft),
        *histogram("vllm:request_time_per_output_token_seconds", side.tpot),
    ]
