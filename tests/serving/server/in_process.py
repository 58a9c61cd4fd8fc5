"""The ONNX server over a real pico export, in this process, so that a test can break it; asked over real HTTP."""

import http.client
import json
import logging
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from serving.server.onnx.api import OnnxApi
from serving.server.onnx.http_connections import BoundedConnection
from serving.server.onnx.server import DrainingServer
from serving.server.process import HOST, free_port
from tests.accidents.processes import wait_for

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """What came back; ``content`` is parsed JSON, or text where it is none."""

    status: int
    headers: dict[str, str]
    content: Any

    @property
    def error(self) -> str:
        """The message of an error in OpenAI's form, whose code is the status."""
        assert set(self.content) == {"error"} and set(self.content["error"]) == {"message", "type", "param", "code"}
        assert self.content["error"]["code"] == self.status
        return str(self.content["error"]["message"])


@dataclass(frozen=True)
class Served:
    """A server that runs in this process."""

    api: OnnxApi
    url: str
    server: DrainingServer

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urllib.parse.urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    def ask(self, path: str, body: Any = None, *, timeout_s: float = 60) -> Answer:
        """Asks once; a body makes it a POST."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            method = "GET" if body is None else "POST"
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        is_json = headers.get("content-type", "").startswith("application/json")
        return Answer(response.status, headers, json.loads(text) if is_json else text)

    def complete(self, **fields: Any) -> Answer:
        """Asks for a completion, greedy, of 4 tokens unless told otherwise."""
        asked = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        return self.ask(COMPLETIONS, asked | fields)

    def in_background(self, number: int = 1, **fields: Any) -> tuple[list[Answer], list[threading.Thread]]:
        """Asks several times at once; the answers come into the list."""
        answers: list[Answer] = []
        threads = [threading.Thread(target=lambda: answers.append(self.complete(**fields))) for _ in range(number)]
        for thread in threads:
            thread.start()
        return answers, threads

    def numbers(self) -> dict[str, float]:
        """What ``/metrics`` says: the sum over labels of each sample, by name, and each of vLLM's labels by value."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.ask("/metrics").content):
            for sample in family.samples:
                reason = sample.labels.get("finished_reason")
                name = f"{sample.name}:{reason}" if reason else sample.name
                if "le" not in sample.labels:
                    found[name] = found.get(name, 0) + sample.value
        return found


class Gate:
    """Stands before every step of the engine, and is open or closed."""

    def __init__(self, api: OnnxApi) -> None:
        self._step, self._open = api._engine.step, threading.Event()
        self._open.set()
        self.steps = 0

    def __call__(self, *arguments: Any) -> Any:
        self.steps += 1
        assert self._open.wait(60)
        return self._step(*arguments)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """No step ends while the context lasts."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


@contextmanager
def serving(api: OnnxApi, *, drain_s: float = 0.5) -> Iterator[Served]:
    """Runs the server in a thread while the context lasts."""
    port = free_port()
    config = uvicorn.Config(api.app(), host=HOST, port=port, http=BoundedConnection, ws="none", log_config=None)
    server = DrainingServer(config, api, drain_s=drain_s)
    thread = threading.Thread(target=server.run, daemon=True)
    logging.getLogger("uvicorn.error").propagate = True  # for pytest to see it
    thread.start()
    try:
        wait_for(lambda: server.started, 30)
        yield Served(api, f"http://{HOST}:{port}", server)
    finally:
        server.should_exit = True
        thread.join(30)


def write_pico_onnx(companions: Path, place: Path, *, context: int) -> Path:
    """Exports a random model with a real tokenizer; returns the export's directory."""
    from export.onnx_graph import export_onnx
    from tests.conftest import make_pico
    from toolchain.checkpoint.directory import copy_companions

    source, out = place / "source", place / "pico-export"
    make_pico(source, head_dim=16, max_position_embeddings=context)
    copy_companions(companions, source)
    export_onnx(source, out)
    return out
