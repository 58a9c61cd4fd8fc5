"""Connections of the ONNX server: bounds on what comes before a request's body."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# As much as most servers take; a client on the slowest line has sent it by then.
MOST_HEADER_BYTES = 64 * 1024
_HEADER_TIMEOUT_S = 30.0


class BoundedConnection(H11Protocol):
    """HTTP/1.1 with a time limit for the head of each request, which uvicorn does not have.

    Without one, whoever opens a thousand connections and sends nothing takes all files that the server may open. Of
    uvicorn's two implementations it is the one that bounds the size of a head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See uvicorn."""
        super().__init__(*args, **kwargs)
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None:  # the head of the next request has begun
            self._wait()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(_HEADER_TIMEOUT_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
