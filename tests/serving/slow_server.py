"""Middleware for ``vllm serve --middleware``: everything a completion takes takes a known factor longer."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

FACTOR = 1.25

Message = MutableMapping[str, Any]


class SlowDown:
    """Holds every part of an answer back until ``FACTOR`` times its age; the engine itself is not disturbed."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/completions":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        parts: asyncio.Queue[tuple[float, Message] | None] = asyncio.Queue()

        async def keep(message: Message) -> None:
            parts.put_nowait((began_s + FACTOR * (time.monotonic() - began_s), message))

        async def release() -> None:
            while part := await parts.get():
                due_s, message = part
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                await send(message)

        releasing = asyncio.create_task(release())
        try:
            await self._app(scope, receive, keep)
        finally:
            parts.put_nowait(None)
            await releasing
