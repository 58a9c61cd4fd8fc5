"""Connections of the ONNX server: bounds on what comes before a request's body, and on readers that do not read."""

import asyncio
import json
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.server.onnx.http_guards import error_content

# As much as most servers take; a client on the slowest line has sent it by then.
MOST_HEADER_BYTES = 64 * 1024
_HEADER_TIMEOUT_S = 30.0
# What is sent goes to the system's buffers first. When these are full, so long nothing was read of them.
_READER_TIMEOUT_S = 60.0


class BoundedConnection(H11Protocol):
    """HTTP/1.1 with time limits that uvicorn does not have, for the head of each request and for a reader that stalls.

    Without them, whoever opens a thousand connections and sends nothing, or reads nothing, takes all files that the
    server may open. Of uvicorn's two implementations it is the one that bounds the size of a head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See uvicorn."""
        super().__init__(*args, **kwargs)
        self._waiting: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._stop_waiting()
        self._stop_stalling()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None:  # the head of the next request has begun
            self._wait()

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().pause_writing()
        self._stop_stalling()
        self._stalled = self.loop.call_later(_READER_TIMEOUT_S, self.transport.abort)  # to close would wait for ever

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        self._stop_stalling()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP; uvicorn's own answer is plain text."""
        body = json.dumps(error_content(400, msg)).encode()
        size = b"%d" % len(body)
        head = [(b"content-type", b"application/json"), (b"content-length", size), (b"connection", b"close")]
        with suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (h11.Response(status_code=400, headers=head), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_stalling(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(_HEADER_TIMEOUT_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
