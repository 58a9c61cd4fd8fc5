"""A kit's files, held against what their makers check them with; Envoy also routes with them."""

import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.deploy_kit.render import write_kit
from serving.server.process import free_port
from tests.accidents.processes import wait_for
from tests.serving.deploy_kit.kits import PAIR, all_kinds, kit, program

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("kits")
    made = [place / str(number) for number, _ in enumerate(all_kinds())]
    for each, out in zip(all_kinds(), made, strict=True):
        write_kit(each, out)
    return made


def test_kubernetes(kits):
    validator = pytest.importorskip("kubernetes_validate")
    for out in kits:
        for each in yaml.safe_load_all((out / "kubernetes/servers.yaml").read_text()):
            if each is not None:
                validator.validate(each, validator.latest_version(), strict=True)
                each["spec"]["replicaz"] = 1
                with pytest.raises(validator.ValidationError):
                    validator.validate(each, validator.latest_version(), strict=True)


def test_prometheus(kits):
    promtool = program("promtool")
    for out in kits:
        done = subprocess.run(
            [promtool, "check", "config", out / "compose/prometheus.yml"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        # A rule of each query, for promtool to parse.
        dashboard = json.loads((out / "compose/grafana/sentei.json").read_text())
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
        (out / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
        done = subprocess.run(
            [promtool, "check", "rules", out / "rules.yml"], capture_output=True, text=True, timeout=60
        )
        assert f"{len(queries)} rules found" in done.stdout, done.stderr


def test_grafana(kits):
    """What Grafana's own types know comes back from them; what they do not know would be lost."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()

    def contained(part: Any, whole: Any) -> bool:
        if isinstance(part, dict):
            return all(key in whole and contained(value, whole[key]) for key, value in part.items())
        if isinstance(part, list):
            return len(part) == len(whole) and all(map(contained, part, whole))
        return part == whole

    for out in kits:
        written = json.loads((out / "compose/grafana/sentei.json").read_text())
        assert contained(written, json.loads(JSONEncoder().encode(Dashboard.from_json(written))))


def test_envoy_takes_its_configuration(kits):
    envoy = program("envoy")
    for out in kits:
        place = out / "here.yaml"
        place.write_text((out / "envoy/envoy.yaml").read_text().replace("/etc/envoy", str(out / "envoy")))
        done = subprocess.run([envoy, "--mode", "validate", "-c", place], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]


class Upstream:
    """A server that says who it is, until it breaks, gets stuck or dies."""

    def __init__(self, role: str) -> None:
        self.is_broken, self.is_ill = False, False
        self.num_inside = 0
        self._moves = threading.Event()
        self._moves.set()
        self._connections: list[socket.socket] = []
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                upstream._connections.append(self.connection)

            def do_GET(self) -> None:
                upstream._moves.wait()
                self._answer(503 if upstream.is_ill else 200, b"")

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                upstream.num_inside += 1
                upstream._moves.wait()
                self._answer(503 if upstream.is_broken else 200, role.encode())

            def _answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 100

            def handle_error(self, *_: Any) -> None:
                """Whoever asked a dead server is gone."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """It takes requests and answers none, not even of its health."""
        self.num_inside = 0
        self._moves.clear()
        try:
            yield
        finally:
            self._moves.set()

    def die(self) -> None:
        """As a killed process does: nobody listens any more, and connections end."""
        self._server.shutdown()
        self._server.server_close()
        for each in self._connections:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextmanager
def router(out: Path, ports: dict[str, int], timeout_s: float = 10) -> Iterator[Callable[[], str]]:
    """Envoy with the kit's files; only addresses differ. Yields what asks it once: who answered, or the status."""
    settings = yaml.safe_load((out / "envoy/envoy.yaml").read_text().replace("/etc/envoy", str(out / "envoy")))
    port = free_port()
    settings["static_resources"]["listeners"][0]["address"]["socket_address"] |= {
        "address": "127.0.0.1", "port_value": port,
    }  # fmt: skip
    del settings["admin"]
    for cluster in settings["static_resources"]["clusters"]:
        if cluster["name"] in ports:
            (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
            endpoint["endpoint"]["address"]["socket_address"] |= {
                "address": "127.0.0.1", "port_value": ports[cluster["name"]],
            }  # fmt: skip
    (out / "here.yaml").write_text(json.dumps(settings))
    command = [program("envoy"), "-c", out / "here.yaml", "--concurrency", "1", "--disable-hot-restart"]
    with (out / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def ask() -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", data=b"{}")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            return str(error.code)
        except OSError as error:
            return str(error)

    try:
        wait_for(lambda: ask() == "original", 60)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def switch(out: Path, share: int) -> None:
    """Gives the candidate this share, by the runbook's own command."""
    command = f"cp {share}.yaml next.yaml && mv next.yaml current.yaml"
    assert command in (out / "runbook.en.md").read_text()
    subprocess.run(command, shell=True, check=True, cwd=out / "envoy/routes")


def test_a_canary_by_the_runbook_loses_no_request(tmp_path):
    out = tmp_path / "kit"
    write_kit(kit(*PAIR), out)
    original, candidate = Upstream("original"), Upstream("candidate")

    with router(out, {"original": original.port, "candidate": candidate.port}) as ask:

        def answers(number: int) -> Counter[str]:
            return Counter(ask() for _ in range(number))

        assert answers(50) == {"original": 50}
        switch(out, 100)
        wait_for(lambda: ask() == "candidate", 30)
        assert answers(50) == {"candidate": 50}
        switch(out, 50)
        wait_for(lambda: ask() == "original", 30)
        found = answers(200)
        assert set(found) == set(PAIR) and 60 <= found["candidate"] <= 140
        candidate.is_broken = True  # it answers 503, and says that it is healthy
        assert answers(100) == {"original": 100}
        candidate.is_broken = False
        assert answers(60)["candidate"] > 10
        candidate.die()
        assert answers(200) == {"original": 200}
        begun = time.monotonic()
        switch(out, 0)
        assert answers(50) == {"original": 50}
        assert time.monotonic() - begun < 60
    original.die()


AT_ONCE = 60


def test_all_that_a_stuck_candidate_holds_is_answered_by_the_original_when_it_is_killed(tmp_path):
    """Envoy alone would try 3 of these requests again, and lose the others."""
    out = tmp_path / "kit"
    write_kit(kit(*PAIR), out)
    original, candidate = Upstream("original"), Upstream("candidate")
    with router(out, {"original": original.port, "candidate": candidate.port}, timeout_s=100) as ask:
        switch(out, 100)
        wait_for(lambda: ask() == "candidate", 30)
        with candidate.stuck(), ThreadPoolExecutor(AT_ONCE) as pool:
            answers = [pool.submit(ask) for _ in range(AT_ONCE)]
            wait_for(lambda: candidate.num_inside == AT_ONCE, 30)
            time.sleep(40)  # two checks of its health of 10 s each, 5 s before each
            assert Counter(ask() for _ in range(20)) == {"original": 20}
            assert not any(each.done() for each in answers)
            candidate.die()
            assert Counter(each.result() for each in answers) == {"original": AT_ONCE}
    original.die()


def test_an_original_that_looks_ill_is_asked_all_the_same(tmp_path):
    """There is nobody else: an answer of a server that is slow to say that it is well is better than none."""
    out = tmp_path / "kit"
    write_kit(kit(*PAIR), out)
    original, candidate = Upstream("original"), Upstream("candidate")
    original.is_ill = True
    with router(out, {"original": original.port, "candidate": candidate.port}) as ask:
        time.sleep(12)  # two checks of health
        assert Counter(ask() for _ in range(20)) == {"original": 20}
    original.die()
