"""An answer on its way from the batch's thread to the client, whole or in pieces, for as long as the client waits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving.server.onnx.answer_text import Piece
from serving.server.onnx.http_guards import AnswerFailedError, error_content
from serving.server.onnx.openai_protocol import Reply


class Pieces:
    """Pieces of one answer; an error is the last of them. Made in the event loop."""

    def __init__(self, done: Callable[[], None]) -> None:
        """``done`` is called in the event loop when the last one has come."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._first: Piece | None = None
        self._done = done

    def put(self, piece: Piece | Exception) -> None:
        """Adds one, from any thread."""
        with suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._arrive, piece)

    def _arrive(self, piece: Piece | Exception) -> None:
        self._queue.put_nowait(piece)
        if isinstance(piece, Exception) or piece.finish_reason:
            self._done()

    async def begun(self) -> None:
        """Waits for the first piece, which stays where it is.

        Raises:
            HTTPException, AnswerFailedError: See :meth:`__aiter__`.
        """
        self._first = await self._next()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Each piece.

        Raises:
            HTTPException: The answer took too long, or the server stops.
            AnswerFailedError: The model failed to give the next token; the log says why.
        """
        while True:
            piece, self._first = self._first or await self._next(), None
            yield piece
            if piece.finish_reason:
                return

    async def _next(self) -> Piece:
        piece = await self._queue.get()
        if isinstance(piece, HTTPException):
            raise piece
        if isinstance(piece, Exception):
            raise AnswerFailedError from piece
        return piece


async def whole(reply: Reply, pieces: Pieces) -> Response:
    """The answer as one object.

    Raises:
        HTTPException, AnswerFailedError: See :meth:`Pieces.__aiter__`.
    """
    text, num_tokens = "", 0
    async for piece in pieces:
        text, num_tokens = text + piece.text, num_tokens + 1
        if piece.finish_reason:
            return JSONResponse(reply.whole(text, piece.finish_reason, num_tokens))
    raise AssertionError("pieces end with a finish reason or an error")


async def stream(reply: Reply, pieces: Pieces, *, include_usage: bool, ended: Callable[[], None]) -> StreamingResponse:
    """The answer in pieces, as soon as there is one.

    Until then an error still has a status, and a router can ask another server.

    Args:
        reply: Makes its events.
        pieces: What they hold.
        include_usage: Whether numbers of tokens come last.
        ended: Is called at the end of the stream, also where the client has gone.

    Raises:
        HTTPException, AnswerFailedError: It ended before the first piece; see :meth:`Pieces.__aiter__`.
    """
    await pieces.begun()
    content = _events(reply, pieces, include_usage=include_usage, ended=ended)
    return StreamingResponse(content, media_type="text/event-stream")


async def _events(
    reply: Reply, pieces: Pieces, *, include_usage: bool, ended: Callable[[], None]
) -> AsyncIterator[str]:
    """Server-sent events, one for each token."""
    num_tokens = 0
    try:
        async for piece in pieces:
            num_tokens += 1
            yield _event(reply.chunk(piece.text, piece.finish_reason, first=num_tokens == 1))
        if include_usage:
            yield _event(reply.usage_chunk(num_tokens))
        yield "data: [DONE]\n\n"
    except HTTPException as error:  # too late for a status; behind this generator there is no handler any more
        yield _event(error_content(error.status_code, error.detail))
    except AnswerFailedError as error:
        yield _event(error_content(500, str(error)))
    finally:
        ended()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def unless_gone(
    connection: Request, answer: Coroutine[Any, Any, Response], *, ended: Callable[[], None]
) -> Response:
    """Waits for an answer for as long as the client does; ``ended`` is called where there will be none."""
    gone, done = asyncio.create_task(_disconnection(connection)), asyncio.create_task(answer)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        ended()
        return Response(status_code=499)  # which nobody reads
    except BaseException:
        ended()
        raise
    finally:
        gone.cancel()
        done.cancel()


async def _disconnection(connection: Request) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass
