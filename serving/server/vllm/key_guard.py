"""What stands before all of vLLM's endpoints where its server has a key.

vLLM itself asks for the key below a few prefixes, such as ``/v1``. ``/invocations`` (chat and completions, too),
``/tokenize``, what ``VLLM_SERVER_DEV_MODE`` adds, and more answer everybody. ``sentei serve`` puts this middleware
there; plain ``vllm serve`` takes it as ``--middleware serving.server.vllm.key_guard.KeyGuard``.
"""

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.server.api_keys import api_keys, is_let_in

# What tells whether a server is well, and which version it is.
_OPEN = frozenset({"/health", "/metrics", "/ping", "/version"})


class KeyGuard:
    """Middleware that answers 401 to whoever does not send one of the server's keys, as vLLM does below ``/v1``."""

    def __init__(self, app: ASGIApp) -> None:
        """``app``: vLLM's, whose state holds the options that it was started with."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if _is_guarded(scope):
            # As vLLM reads it: headers are Latin-1, keys are UTF-8.
            authorization = Headers(scope=scope).get("authorization", "").encode()
            if not is_let_in(authorization, api_keys(scope["app"].state.args.api_key)):
                await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_guarded(scope: Scope) -> bool:
    # Browsers ask by OPTIONS, without a key, whether they may send one. WebSockets have no method.
    if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
        return False
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) not in _OPEN
