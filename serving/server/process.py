"""A server's process: started on loopback, waited for until it is healthy, asked, and always stopped."""

import os
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from serving.child_process import child_process
from serving.server.api_keys import sendable
from toolchain.errors import SenteiError

HOST = "127.0.0.1"
_TAIL_LINES = 30
START_TIMEOUT_S = 900.0
# What programs end with that do not understand their options: another start would end alike.
_USAGE_EXIT_CODE = 2
_STOP_TIMEOUT_S = 20.0
# vLLM reports the engine process's exception in its log, far above the last line; the ONNX server as the last one.
_REFUSAL = re.compile(r"(?:toolchain\.errors\.\w+|^Error): (.+)", re.MULTILINE)


class ServerEndedError(SenteiError):
    """A server ended before it was ready, and did not say in sentei's words why: another start may succeed."""


@contextmanager
def running_process(
    name: str, command: Sequence[str], environment: Mapping[str, str], *, port: int, log: Path, timeout_s: float
) -> Iterator[str]:
    """Runs a server with ``/health`` while the context lasts; it dies with this process, however that ends."""
    with child_process(command, environment, log) as process:
        try:
            base_url = f"http://{HOST}:{port}"
            _wait_until_healthy(name, base_url, process, log, timeout_s)
            yield base_url
        finally:
            _ask_to_stop(process)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _wait_until_healthy(
    name: str, base_url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_healthy(base_url):
        if (code := process.poll()) is not None:
            said = _text_of(log)
            is_final = code == _USAGE_EXIT_CODE or refusal(said) is not None
            kind = SenteiError if is_final else ServerEndedError
            raise kind(f"The {name} server ended with exit code {code} before it was ready{_cause(said)}")
        if time.monotonic() > deadline:
            raise SenteiError(
                f"The {name} server was not ready after {timeout_s:.0f} s. The end of its log:\n{tail(_text_of(log))}",
                "sentei benchmark --start-timeout gives it longer.",
            )
        time.sleep(0.5)


def is_healthy(base_url: str, api_key: str | None = None) -> bool:
    """Whether a server says that it can answer."""
    try:
        with open_url(f"{base_url}/health", api_key) as response:
            return response.status == 200
    except (OSError, HTTPException):
        return False


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine."""
    return urllib.parse.urlsplit(url).hostname in (HOST, "localhost", "::1")


def key_for(url: str, api_key: str | None = None) -> str | None:
    """The key given, else the environment's: that is for a server of this machine, never for one somewhere else."""
    own = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY") if is_loopback(url) else None
    return api_key or own


def open_url(url: str, api_key: str | None = None) -> Any:
    """Opens a URL of a server, without any proxy: most are on this machine.

    Raises:
        SenteiError: No header can carry the key.
    """
    key = key_for(url, api_key)
    headers: Any = {"Authorization": b"Bearer " + sendable(key).encode("utf-8", "surrogateescape")} if key else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, headers=headers), timeout=5)


def _ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a server as its users do, if it does not take too long."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_STOP_TIMEOUT_S)


def refusal(text: str) -> str | None:
    """Our own sentence in a log: of the launcher, the plugin or the ONNX server."""
    refused = _REFUSAL.findall(text)
    return refused[-1] if refused else None


def _cause(text: str) -> str:
    """What ended a server: our own sentence if there is one, else the end of the log."""
    if refused := refusal(text):
        return f": {refused}"
    return f". The end of its log:\n{tail(text)}"


def _text_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def tail(text: str) -> str:
    """The last lines of a log."""
    return "\n".join(text.splitlines()[-_TAIL_LINES:]) or "(nothing)"
