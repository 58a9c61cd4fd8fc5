"""Asks one server over HTTP, and nobody else: no proxy, and nobody that it refers to."""

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from typing import Any

_MOST_ERROR_BYTES = 10_000
_LONGEST_SAID = 300


class RefusedError(Exception):
    """The server's answer is an error.

    Attributes:
        status: Of HTTP.
        content: What it said, cut off where it is long.
    """

    def __init__(self, status: int, reason: str, content: bytes) -> None:
        super().__init__(reason)
        self.status, self.content = status, content


class UnreachableError(Exception):
    """There is no server, or it does not speak HTTP, or is too slow; the message says which."""


def is_url(url: str) -> bool:
    """Whether this is the URL of a server, with a path or without."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
    return is_good and not (parts.query or parts.fragment or not url.isascii() or any(map(str.isspace, url)))


def has_secret(url: str) -> bool:
    """Whether a URL holds a name or a password."""
    return urllib.parse.urlsplit(url).username is not None


def ask(
    url: str, *, timeout_s: float, most_bytes: int, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """Asks once.

    Args:
        url: What; see :func:`is_url`, but it may have a query.
        timeout_s: For each part of the answer.
        most_bytes: So many bytes of it are read, and one more of a longer one.
        body: Makes it a POST.
        headers: To send along.

    Raises:
        RefusedError: The answer is an error, or refers to somebody else.
        UnreachableError: There is none.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}))
    try:
        with opener.open(request, timeout=timeout_s) as response:
            content: bytes = response.read(most_bytes + 1)
            return content
    except urllib.error.HTTPError as error:
        said = b""
        with error, suppress(OSError, HTTPException):
            said = error.read(_MOST_ERROR_BYTES)
        raise RefusedError(error.code, error.reason, said) from error
    except (OSError, HTTPException, ValueError) as error:
        raise UnreachableError(shown(getattr(error, "reason", error))) from error  # urllib wraps the system's


def shown(value: object) -> str:
    """A stranger's words in one line, cut off where they are long."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_SAID else f"{text[:_LONGEST_SAID]}…"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Ends with the answer that says where else to ask."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """See urllib."""
        return
