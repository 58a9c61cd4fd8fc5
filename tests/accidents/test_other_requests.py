"""Requests to the ONNX server beyond the issue's table: heads without end, clients that dawdle, misleading refusals."""

import socket
import time
from urllib.parse import urlsplit

import pytest

from serving.server.onnx import http_connections
from tests.accidents.onnx_service import KEY, Service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def connect(service: Service) -> socket.socket:
    address = urlsplit(service.url)
    connection = socket.create_connection((address.hostname, address.port))
    connection.settimeout(20)
    return connection


@pytest.mark.parametrize("start", [b"GET /health HTTP/1.1\r\nX: ", b"GET /", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_the_head_of_a_request_is_bounded(service: Service, start: bytes):
    sent = 0
    with connect(service) as connection:
        try:
            connection.sendall(start)
            for _ in range(64):
                connection.sendall(b"X: a\r\n" * 10_000 if start.endswith(b"\r\n") else b"a" * 2**16)
                sent += 2**16
            answer = connection.recv(100)
        except ConnectionError:
            answer = b"reset"
    assert answer == b"reset" or b" 400 " in answer or answer == b""
    assert service.answers()


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch):
    """In this process, where the limit can be lowered."""
    import threading

    import uvicorn

    monkeypatch.setattr(http_connections, "_HEADER_TIMEOUT_S", 0.3)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, http=http_connections.BoundedConnection, ws="none", lifespan="off", timeout_keep_alive=1)
    )
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        for first in (b"", b"GET / HTTP/1.1\r\nX: ", request, request + b"GET / HTTP/1.1\r\nX: "):
            with socket.create_connection(listener.getsockname()) as connection:
                connection.settimeout(10)
                connection.sendall(first)
                start, received = time.monotonic(), b""
                while piece := connection.recv(1000):
                    received += piece
                assert time.monotonic() - start < 5
                assert received.count(b" 200 ") == first.count(request)
    finally:
        server.should_exit = True
        thread.join(10)


def test_a_key_may_be_followed_by_a_space(service: Service):
    body = b'{"prompt": "The", "max_tokens": 1}'
    with connect(service) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %s \r\nContent-Length: %d\r\n\r\n%s" % (KEY.encode(), len(body), body)
        )
        assert b" 200 " in connection.recv(20)


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 65}, "stop: List should have at most 64 items"),
        (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop.0: "),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt.0: "),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt."),
        (COMPLETIONS, {"prompt": "a", "n": 2}, "n: Input should be 1"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]}, "parts of type text"),
    ],
)
def test_a_refusal_names_what_is_wrong(service: Service, path: str, body: object, part: str):
    status, message = service.refusal(path, body)
    assert status == 400
    assert part in message
