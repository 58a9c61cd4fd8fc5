"""What stands before the endpoints of the ONNX server: keys, sizes, and one form for every error."""

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from serving.server.api_keys import is_let_in
from toolchain.errors import SenteiError
from toolchain.json_files import parse_json

_BODY_TIMEOUT_S = 60.0
# Of a body that is too long, so much is read and forgotten: most clients do not listen before they have sent all.
_SWALLOWED_BYTES = 64 * 2**20
_KINDS = ("str", "function-after")
_GUARDED = "/v1"  # as in vLLM: /health, /ready and /metrics answer everybody
_ERROR_KINDS = {
    408: "timeout_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
}

BodyT = TypeVar("BodyT", bound=BaseModel)


class AnswerFailedError(Exception):
    """The model failed to answer one request. What failed has been logged; the client is not told."""

    def __str__(self) -> str:
        """What the client is told."""
        return "The server failed to answer this request; its log says why."


class KeyGuard:
    """Middleware that answers 401 below ``/v1`` to whoever does not send one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        """``keys``: no key opens the server to everybody."""
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        guarded = scope["type"] == "http" and scope["path"].startswith(_GUARDED) and scope["method"] != "OPTIONS"
        if not guarded or is_let_in(dict(scope["headers"]).get(b"authorization", b""), self._keys):
            await self._app(scope, receive, send)
            return
        message = "The API key is missing or wrong: send the header 'Authorization: Bearer KEY'."
        await error_response(401, message, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


async def read_request(request: Request, body_type: type[BodyT], max_bytes: int) -> BodyT:
    """Reads and checks the body of a request; parsing is done beside the event loop.

    Args:
        request: Whose body has not been read.
        body_type: What it must be.
        max_bytes: A longer one is refused, and no more than this is kept of it.

    Raises:
        HTTPException: It is too long, too slow, or not announced as JSON.
        SenteiError: It is no JSON, or not what is asked for.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # a page in a browser can send other types to a server on loopback
        raise HTTPException(415, "Send the header 'Content-Type: application/json'.")
    content = await _read(request, max_bytes)
    return await asyncio.to_thread(_parse, content, body_type)


def error_handlers() -> dict[Any, ExceptionHandler]:
    """By exception type, what answers: every error in OpenAI's form."""
    return {
        SenteiError: _refused,
        HTTPException: _refused,
        ClientDisconnect: _gone,
        AnswerFailedError: _told_so,
        Exception: _failed,
    }


def error_content(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = _ERROR_KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An answer with an error in OpenAI's form."""
    # The message may repeat what was sent; half a character could not be sent back.
    content = error_content(status, message.encode("utf-8", "replace").decode())
    return JSONResponse(content, status, headers)


async def _read(request: Request, max_bytes: int) -> bytes:
    too_long = HTTPException(413, f"The request has more than {max_bytes:,} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > _SWALLOWED_BYTES:
        raise too_long
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                size += len(piece)
                if size > _SWALLOWED_BYTES:
                    raise too_long
                if size <= max_bytes:
                    content += piece
    except TimeoutError as error:
        raise HTTPException(408, f"The request did not arrive within {_BODY_TIMEOUT_S:.0f} s.") from error
    if size > max_bytes:
        raise too_long
    return bytes(content)


def _parse(content: bytes, body_type: type[BodyT]) -> BodyT:
    try:
        return body_type.model_validate(parse_json(content, "The request"))
    except ValidationError as error:
        # A field that takes several kinds has an error per kind. The kind that fits best went wrong furthest inside.
        found = error.errors(include_input=False, include_url=False)
        worst = max(found, key=lambda each: (len(each["loc"]), each["type"] not in ("string_type", "list_type")))
        place = ".".join(str(part) for part in worst["loc"] if not _is_kind(part)) or "body"
        raise SenteiError(f"{place}: {worst['msg']}.") from error


def _is_kind(part: int | str) -> bool:
    """Whether a part of an error's place names a type of ours, not something in the request."""
    return isinstance(part, str) and (part in _KINDS or "[" in part)


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail), dict(error.headers or {}))
    return error_response(400, str(error))


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


async def _told_so(_: Request, error: Exception) -> Response:
    return error_response(500, str(error))


async def _failed(_: Request, error: Exception) -> Response:
    """The last handler; Starlette raises the error again behind it, and uvicorn logs the trace."""
    return error_response(500, str(AnswerFailedError()))
