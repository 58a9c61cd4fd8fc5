"""OpenAI's HTTP endpoints for an ONNX export, on loopback unless told otherwise.

``python -m serving.server.onnx.server DIR [options]``. The endpoints are in :mod:`serving.server.onnx.api`.
"""

import argparse
import asyncio
import math
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
from serving.server.onnx.api import OnnxApi, ServerLimits
from serving.server.onnx.http_connections import MOST_HEADER_BYTES, BoundedConnection
from serving.server.process import HOST, START_TIMEOUT_S, free_port, running_process
from toolchain.errors import INTERRUPTED, SenteiError
from toolchain.lifetime import end_with_parent

DEFAULT_MAX_NUM_SEQS = ServerLimits().max_num_seqs
_INTERRUPTED_DRAIN_S = 1.0  # of who presses Ctrl-C
# `docker stop` kills after 10 s, Kubernetes after 30.
_DEFAULT_DRAIN_S = 8.0
_MOST_SECONDS = 86400.0
# Until what was given up has been told.
_LAST_WORDS_S = 1.0


def serve(directory: Path, options: Sequence[str]) -> None:
    """Serves an export until a signal comes.

    SIGTERM, with which service managers and containers stop a server, is what was asked for: exit code 0, and requests
    under way have ``--drain-seconds``. Ctrl-C is an interruption as of any command, and leaves them a second. What is
    not finished then ends with an error.

    Args:
        directory: The export.
        options: ``--help`` lists them; most are vLLM's.

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
        limits = ServerLimits(
            max_num_seqs=given.max_num_seqs,
            max_model_len=given.max_model_len,
            max_num_queued_reqs=given.max_num_queued_reqs,
            request_timeout_s=given.request_timeout,
        )
        api = OnnxApi(directory, limits, names=given.served_model_name or ())
        config = uvicorn.Config(
            api.app(keys),
            http=BoundedConnection,
            ws="none",
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            access_log=False,
        )
        # At its end it raises the signal that it was stopped by.
        DrainingServer(config, api, drain_s=given.drain_seconds).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)


class DrainingServer(uvicorn.Server):
    """Lets requests under way end when it is told to stop, for so long; then ends them with an error."""

    def __init__(self, config: uvicorn.Config, api: OnnxApi, *, drain_s: float) -> None:
        """Prepares a server; ``drain_s`` is for SIGTERM, Ctrl-C leaves a second at most."""
        super().__init__(config)
        self._api, self._drain_s = api, drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the door, and waits for who is inside."""
        drain_s = self._drain_s
        if self._captured_signals[-1:] == [signal.SIGINT]:
            drain_s = min(drain_s, _INTERRUPTED_DRAIN_S)
        self.config.timeout_graceful_shutdown = drain_s + _LAST_WORDS_S  # type: ignore[assignment]
        giving_up = asyncio.get_running_loop().call_later(drain_s, self._api.give_up)
        try:
            await super().shutdown(sockets)
        finally:
            giving_up.cancel()


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
    """Runs :func:`serve` in a process of its own; see :func:`serving.server.vllm.server.running_server`."""
    port = port or free_port()
    program = [sys.executable, "-m", "serving.server.onnx.server"]
    command = [*program, str(directory.resolve()), *options, "--port", str(port)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with running_process("ONNX", command, environment, port=port, log=log, timeout_s=timeout_s) as base_url:
        yield base_url


def _parse(options: Sequence[str]) -> argparse.Namespace:
    defaults = ServerLimits()
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
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        type=_name,
        help="what clients call the model, the first one in answers; default: the directory's name",
    )
    parser.add_argument(
        "--max-num-queued-reqs",
        type=_not_negative,
        default=defaults.max_num_queued_reqs,
        help="requests that wait; further ones are answered 429",
    )
    parser.add_argument(
        "--request-timeout",
        type=_some_seconds,
        default=defaults.request_timeout_s,
        help="seconds from a request to its last token; later ones are answered 408",
    )
    parser.add_argument(
        "--drain-seconds",
        type=_seconds,
        default=_DEFAULT_DRAIN_S,
        help="how long requests under way have after SIGTERM",
    )
    return parser.parse_args(options)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _not_negative(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {_MOST_SECONDS:.0f}")
    return found


def _some_seconds(text: str) -> float:
    found = _seconds(text)
    if not found:
        raise argparse.ArgumentTypeError("no request is answered in 0 seconds")
    return found


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a name is empty")
    return text


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
