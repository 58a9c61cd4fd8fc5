"""A kit that runs on this machine: two real servers, Envoy and Prometheus, each from the kit's own files.

What differs from the files: addresses, ports and paths; and Prometheus scrapes each second.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving.server.process import HOST, free_port
from tests.accidents.processes import wait_for
from tests.serving.deploy_kit.kits import program

KEY = "key-of-the-test"
SIDES = ("original", "candidate")
_START_S, _STOP_S = 300.0, 30.0


@dataclass(frozen=True)
class Machine:
    """What runs.

    Attributes:
        kit: The kit.
        url: The router's.
        prometheus: Its URL.
        ports: Of the servers.
        candidate: Its process.
        faults: The file by which its engine is broken.
    """

    kit: Path
    url: str
    prometheus: str
    ports: Mapping[str, int]
    candidate: subprocess.Popen[bytes]
    faults: Path

    def step(self, share: int) -> None:
        """Gives the candidate this share of the traffic, by the runbook's own command."""
        command = f"cp {share}.yaml next.yaml && mv next.yaml current.yaml"
        assert command in (self.kit / "runbook.en.md").read_text()
        subprocess.run(command, shell=True, check=True, cwd=self.kit / "envoy/routes")

    def break_candidate(self, **fault: float) -> None:
        """Has the candidate's engine fail or take longer; without arguments it is whole again."""
        (self.faults.parent / "next").write_text(json.dumps(fault))
        (self.faults.parent / "next").replace(self.faults)

    def kill_candidate(self, sent: signal.Signals) -> None:
        """Sends a signal to the candidate's process."""
        os.killpg(self.candidate.pid, sent)

    def ask(self, side: str, body: Mapping[str, Any]) -> str:
        """What a side answers when it is asked directly."""
        request = urllib.request.Request(
            f"http://{HOST}:{self.ports[side]}/v1/completions", data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(json.load(response)["choices"][0]["text"])


@contextmanager
def machine(kit: Path, exports: Mapping[str, Path], place: Path) -> Iterator[Machine]:
    """Runs a kit; all that it starts ends with the context.

    Args:
        kit: What ``sentei deploy-kit`` wrote of two ONNX exports.
        exports: Their directories.
        place: For logs and Prometheus' data.
    """
    faults = place / "faults"
    ports = {side: free_port() for side in SIDES}
    envoy_port, prometheus_port = free_port(), free_port()
    with ExitStack() as running:
        servers = {}
        for side in SIDES:
            words = _server_command(kit, side, exports[side], ports[side])
            entry = [sys.executable, "-m", "tests.serving.canary.breakable_server", str(faults)]
            if side == "original":
                entry = [sys.executable, "-c", "from toolchain.cli.entry import main; main()"]
            environment = {**os.environ, "VLLM_API_KEY": KEY}
            servers[side] = running.enter_context(_process([*entry, *words[1:]], place / f"{side}.log", environment))
        for side in SIDES:
            wait_for(lambda side=side: _answers(f"http://{HOST}:{ports[side]}/ready"), _START_S)
        envoy = [program("envoy"), "-c", str(_envoy(kit, place, ports, envoy_port)), "--disable-hot-restart"]
        running.enter_context(_process([*envoy, "--concurrency", "1"], place / "envoy.log"))
        prometheus = [
            program("prometheus"), f"--config.file={_prometheus(kit, place, ports)}",
            f"--storage.tsdb.path={place / 'data'}", f"--web.listen-address={HOST}:{prometheus_port}",
        ]  # fmt: skip
        running.enter_context(_process(prometheus, place / "prometheus.log"))
        url, prometheus_url = f"http://{HOST}:{envoy_port}", f"http://{HOST}:{prometheus_port}"
        wait_for(lambda: _answers(f"{url}/v1/models"), _START_S)
        wait_for(lambda: _answers(f"{prometheus_url}/-/ready"), _START_S)
        yield Machine(kit, url, prometheus_url, ports, servers["candidate"], faults)


def _server_command(kit: Path, side: str, export: Path, port: int) -> list[str]:
    words = yaml.safe_load((kit / "compose/compose.yaml").read_text())["services"][side]["command"]
    words = [str(export) if word == "/model" else word for word in words]
    words[words.index("--host") + 1], words[words.index("--port") + 1] = HOST, str(port)
    return words


def _envoy(kit: Path, place: Path, ports: Mapping[str, int], port: int) -> Path:
    settings = yaml.safe_load((kit / "envoy/envoy.yaml").read_text().replace("/etc/envoy", str(kit / "envoy")))
    settings["admin"]["address"]["socket_address"]["port_value"] = free_port()
    address = settings["static_resources"]["listeners"][0]["address"]["socket_address"]
    address |= {"address": HOST, "port_value": port}
    for cluster in settings["static_resources"]["clusters"]:
        if cluster["name"] in ports:
            (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
            address = endpoint["endpoint"]["address"]["socket_address"]
            address |= {"address": HOST, "port_value": ports[cluster["name"]]}
    (place / "envoy.yaml").write_text(json.dumps(settings))
    return place / "envoy.yaml"


def _prometheus(kit: Path, place: Path, ports: Mapping[str, int]) -> Path:
    text = (kit / "compose/prometheus.yml").read_text()
    for side, port in ports.items():
        assert f"{side}:8000" in text
        text = text.replace(f"{side}:8000", f"{HOST}:{port}")
    settings = yaml.safe_load(text)
    settings["global"]["scrape_interval"] = "1s"
    (place / "prometheus.yml").write_text(json.dumps(settings))
    return place / "prometheus.yml"


@contextmanager
def _process(
    command: list[Any], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_STOP_S)


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=40) as response:
            return bool(response.status == 200)
    except OSError:
        return False
