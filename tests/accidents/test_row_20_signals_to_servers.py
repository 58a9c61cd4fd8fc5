"""Row 20, Ctrl-C on ``serve``: it is an interruption (130); SIGTERM is a stop that was asked for (0)."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from serving.server.process import free_port, is_healthy
from tests.accidents.onnx_service import Service
from tests.accidents.processes import descendants, exists, wait_for
from tests.command_line import PROGRAM


def test_exit_codes_and_nothing_left(service: Service, tmp_path: Path):
    signals = (signal.SIGINT, signal.SIGTERM)
    ports = [free_port() for _ in signals]
    logs = [tmp_path / each.name for each in signals]
    servers = []
    for port, log in zip(ports, logs, strict=True):
        command = [PROGRAM, "serve", str(service.model), "--", "--port", str(port)]
        with log.open("wb") as output:
            servers.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
    try:
        wait_for(lambda: all(is_healthy(f"http://127.0.0.1:{port}") for port in ports), 120)
        helpers = [descendants(server.pid) for server in servers]
        assert all(helpers)  # each renders templates in a process of its own
        for server, each in zip(servers, signals, strict=True):
            os.kill(server.pid, each)
        assert [server.wait(timeout=20) for server in servers] == [130, 0]
        wait_for(lambda: not any(exists(pid) for each in helpers for pid in each), 15)
        said = [log.read_text() for log in logs]
        assert "Interrupted." in said[0] and not any("Traceback" in each for each in said)
    finally:
        for server in servers:
            server.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_leaves_the_handlers_as_they_were(service: Service, number: int):
    from serving.server.onnx.server import serve
    from toolchain.errors import SenteiError

    before = signal.getsignal(number)
    with pytest.raises(SenteiError, match="9000 tokens are asked for"):
        serve(service.model, ["--max-model-len", "9000", "--port", str(free_port())])
    assert signal.getsignal(number) is before
