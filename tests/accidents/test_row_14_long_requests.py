"""Row 14: a long prompt is refused before it costs anything, and nobody waits for the one who sends it."""

import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator

import pytest

from tests.accidents.onnx_service import KEY, Service

PATH = "/v1/completions"


def longest_wait_s(service: Service, busy: threading.Thread) -> float:
    """How long the slowest of many other requests takes while a thread is busy."""
    longest = 0.0
    busy.start()
    while busy.is_alive():
        started = time.monotonic()
        assert service.ask("/health", key=None)[0] == 200
        longest = max(longest, time.monotonic() - started)
    return longest


@pytest.mark.parametrize("prompt", ["word " * 1_000_000, [1] * 1_000_000, [["word"]] * 500_000])
def test_a_prompt_of_megabytes_is_refused_and_nobody_waits(service: Service, prompt: object):
    found: list[tuple[int, str]] = []
    body = json.dumps({"prompt": prompt}).encode()
    asking = threading.Thread(target=lambda: found.append(service.refusal(PATH, body)))
    assert longest_wait_s(service, asking) < 1
    ((status, message),) = found
    assert status == 413 and "bytes" in message


def test_the_length_is_counted_where_it_is_not_announced(service: Service):
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(64):
            yield b"x" * 65_536

    address = urllib.parse.urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in pieces():
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in connection.recv(4096)


def test_what_is_far_too_long_is_not_even_read(service: Service):
    address = urllib.parse.urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Content-Length: 99999999999\r\n\r\n{")
        assert b" 413 " in connection.recv(4096)


def test_more_characters_than_the_context_can_hold_are_not_tokenised(service: Service):
    status, message = service.refusal(PATH, {"prompt": "word " * 150_000})  # the context holds 256 tokens
    assert status == 400 and "750,000 characters" in message and "256 tokens" in message


def test_tokenising_does_not_hold_up_others(service: Service):
    # Fits by its characters, and takes as long as the context allows.
    asking = threading.Thread(target=lambda: service.refusal(PATH, {"prompt": "w " * 10_000}))
    assert longest_wait_s(service, asking) < 1


def test_who_sends_or_reads_slowly_waits_alone(service: Service):
    address = urllib.parse.urlsplit(service.url)
    body = json.dumps({"prompt": "The", "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    slow = [socket.create_connection((address.hostname, address.port or 0)) for _ in range(8)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(head + (body if number % 2 else body[:5]))  # half never read, half never send
        started = time.monotonic()
        assert service.answers()
        assert time.monotonic() - started < 10
    finally:
        for connection in slow:
            connection.close()
