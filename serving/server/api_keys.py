"""The keys that a server asks for, and a warning where it asks for none and others can reach it."""

import hashlib
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Sequence

from toolchain.errors import SenteiError

KEY_VARIABLE = "VLLM_API_KEY"


def api_keys(given: Sequence[str] | None) -> tuple[str, ...]:
    """The keys that open a server: those of ``--api-key``, else the environment's, as in vLLM.

    Raises:
        SenteiError: A key that is given is empty, as an unset variable is: vLLM would then let everybody in. Or no
            header can carry it.
    """
    if given and not all(given):
        raise SenteiError("--api-key is empty.", f"Give a key, or set {KEY_VARIABLE}, which other users cannot see.")
    return tuple(map(sendable, given or filter(None, [os.environ.get(KEY_VARIABLE)])))


def sendable(key: str) -> str:
    """The key itself.

    Raises:
        SenteiError: No header can carry it.
    """
    if key != key.strip() or any(ord(character) < 32 for character in key):
        raise SenteiError("The API key begins or ends with a space, or holds a line break.", "Set it without.")
    return key


def is_let_in(authorization: bytes, keys: Sequence[str]) -> bool:
    """Whether a server answers: it has no key, or the header ``Authorization`` holds one of its own: ``Bearer KEY``."""
    scheme, _, given = authorization.partition(b" ")
    # All are compared, whichever is right, and digests have one length: the time tells nothing.
    matches = [secrets.compare_digest(_digest(given), _digest(key.encode("utf-8", "surrogateescape"))) for key in keys]
    return not keys or (scheme.lower() == b"bearer" and any(matches))


def warn_if_open(host: str | None, keys: Sequence[str]) -> None:
    """Says on stderr that a server answers everybody who reaches this machine.

    Args:
        host: Where it listens; ``None`` or an empty one is everywhere.
        keys: What it asks for.
    """
    if not keys and not _is_loopback(host or ""):
        print(
            f"WARNING: the server listens on {host or 'every address'} and asks for no key: whoever reaches this "
            f"machine can use it. Set {KEY_VARIABLE} (--api-key is visible to other users in the list of processes).",
            file=sys.stderr,
            flush=True,
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_loopback(host: str) -> bool:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}
        return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    except (OSError, ValueError):  # the server will say so
        return False
