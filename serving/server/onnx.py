"""OpenAI's HTTP endpoints for an ONNX export, on loopback unless told otherwise.

``python -m serving.server.onnx DIR [options]``. The endpoints are in :mod:`serving.server.onnx_api`.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import uvicorn

from serving.server.api_keys import KEY_VARIABLE, api_keys, warn_if_open
from serving.server.http_connections import MOST_HEADER_BYTES, BoundedConnection
from serving.server.onnx_api import OnnxApi
from serving.server.vllm import HOST, START_TIMEOUT_S, free_port, running_process
from toolchain.errors import INTERRUPTED, SenteiError
from toolchain.lifetime import end_with_parent

DEFAULT_MAX_NUM_SEQS = 8


def serve(directory: Path, options: Sequence[str]) -> None:
    """Serves an export until a signal comes.

    SIGTERM, with which service managers and containers stop a server, is what was asked for: exit code 0. Ctrl-C is an
    interruption as of any command. Both stop in the same way: answers under way get a second.

    Args:
        directory: The export.
        options: ``--host``, ``--port``, ``--api-key``, ``--max-num-seqs`` and ``--max-model-len``, as vLLM calls them.

    Raises:
        SenteiError: The export is damaged or does not fit, or the address is taken.
        MissingDependencyError: onnxruntime is not installed.
        KeyboardInterrupt: Ctrl-C.
    """
    before = signal.signal(signal.SIGTERM, _end_well)
    try:
        given = _parse(options)
        keys = api_keys(given.api_key)
        warn_if_open(given.host, keys)
        listener = _bind(given.host, given.port)  # before the model is loaded: an address that is taken is told at once
        api = OnnxApi(directory, max_num_seqs=given.max_num_seqs, max_model_len=given.max_model_len)
        # An answer under way does not keep the server from stopping.
        config = uvicorn.Config(
            api.app(keys),
            http=BoundedConnection,
            ws="none",
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])  # at its end it raises the signal that it was stopped by
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_well(_signal: int, _frame: object) -> NoReturn:
    sys.exit(0)


@contextmanager
def running_server(
    directory: Path,
    *,
    port: int | None = None,
    options: Sequence[str] = (),
    log: Path,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """Runs :func:`serve` in a process of its own; see :func:`serving.server.vllm.running_server`."""
    port = port or free_port()
    command = [sys.executable, "-m", "serving.server.onnx", str(directory.resolve()), *options, "--port", str(port)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with running_process("ONNX", command, environment, port=port, log=log, timeout_s=timeout_s) as base_url:
        yield base_url


def _parse(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sentei serve DIR --engine onnx --", allow_abbrev=False)
    parser.add_argument("--host", default=HOST, help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        help=f"keys, one of which a client must send; better set {KEY_VARIABLE}: options are visible in the list of "
        "processes",
    )
    parser.add_argument(
        "--max-num-seqs", type=_positive, default=DEFAULT_MAX_NUM_SEQS, help="answers at once; more wait"
    )
    parser.add_argument("--max-model-len", type=_positive, help="tokens of prompt and answer; default: the context")
    return parser.parse_args(options)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _bind(host: str, port: int) -> socket.socket:
    """A socket with an address, which does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address[0], port, *address[2:]))  # getaddrinfo takes a port modulo 65536
    except (OSError, OverflowError) as error:
        raise SenteiError(f"{host}:{port} cannot be listened on ({error}).", "Give another --port.") from error
    return bound


def main() -> None:
    """Runs :func:`serve` with this process's arguments."""
    end_with_parent()
    try:
        serve(Path(sys.argv[1]), sys.argv[2:])
    except SenteiError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
