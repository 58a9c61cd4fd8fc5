"""Keys that sign and check: files in PEM form, or a key that never leaves a PKCS#11 token.

No message holds anything of a key but its path.
"""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.json_files import read_bytes

PASSWORD_VARIABLE = "SENTEI_KEY_PASSWORD"
TOKEN_PREFIX = "pkcs11:"
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_MAX_BYTES = 64 * 1024
_MAKE_ONE = "docs/guides/signing.md shows how to make a pair of keys."


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """A private key in a file.

    Attributes:
        path: The file.
        password: What opens it; ``None`` if nothing is needed.
        sha256: Of its public key in PEM form. Signatures name their key by it.
    """

    path: Path
    password: bytes | None = field(repr=False)
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TokenKey:
    """A private key on a PKCS#11 token.

    Attributes:
        uri: Which token, and which key on it (RFC 7512); holds no PIN.
        pin_file: What the URI says the PIN is read from.
    """

    uri: str
    pin_file: Path | None


SigningKey = KeyFile | TokenKey


def open_signing_key(key: str, ask: Callable[[], str | None]) -> SigningKey:
    """Opens the key that is to sign.

    Args:
        key: A path, or a PKCS#11 URI.
        ask: Returns the password of an encrypted file, or ``None`` where nobody can be asked.

    Raises:
        SenteiError: It is no private key on one of the curves P-256, P-384 and P-521, is encrypted and the password is
            missing or wrong, or is a URI that holds a PIN.
        MissingDependencyError: A library is not installed.
    """
    if key.startswith(TOKEN_PREFIX):
        return _token_key(key)
    return _open_file(Path(key), ask)


def public_key_sha256(path: Path) -> str:
    """The SHA-256 of a public key in PEM form, by which signatures name their key.

    Raises:
        SenteiError: It is no public key on one of the curves P-256, P-384 and P-521.
        MissingDependencyError: cryptography is not installed.
    """
    serialization = _serialization()
    content = read_bytes(path, hint=_MAKE_ONE, max_bytes=_MAX_BYTES)
    try:
        public = serialization.load_pem_public_key(content)
    except Exception as error:  # ValueError, and another for what its OpenSSL does not know
        what = "a private key, which belongs on the machine that signs" if b"PRIVATE KEY-" in content else None
        raise SenteiError(f"{path} is {what or 'no public key in PEM form'}.", f"Give KEY.pub. {_MAKE_ONE}") from error
    return _sha256(path, public)


def readable_by_others(key: SigningKey) -> str | None:
    """A warning where other users of the machine can read the file of a key, or of a token's PIN."""
    path = key.path if isinstance(key, KeyFile) else key.pin_file
    if path is None or not path.exists() or not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return None
    return f"WARNING: {path} is open to other users of this machine. Close it: chmod 600 {path}"


def _open_file(path: Path, ask: Callable[[], str | None]) -> KeyFile:
    serialization = _serialization()
    content = read_bytes(path, hint=_MAKE_ONE, max_bytes=_MAX_BYTES)
    password: bytes | None = None
    try:
        try:
            private = serialization.load_pem_private_key(content, None)
        except TypeError:  # it is encrypted
            password = _password(path, ask)
            private = serialization.load_pem_private_key(content, password)
    except SenteiError:
        raise
    except Exception as error:  # ValueError, and another for what its OpenSSL does not know
        if password is not None:
            raise SenteiError(f"The password does not open {path}.", f"Check {PASSWORD_VARIABLE}.") from error
        what = "a public key" if b"PUBLIC KEY-" in content else "no private key in PEM form"
        raise SenteiError(f"{path} is {what}.", f"Give the private key. {_MAKE_ONE}") from error
    public = getattr(private, "public_key", lambda: None)()
    return KeyFile(path=path, password=password, sha256=_sha256(path, public))


def _password(path: Path, ask: Callable[[], str | None]) -> bytes:
    given = os.environ.get(PASSWORD_VARIABLE)
    given = ask() if given is None else given
    if not given:
        raise SenteiError(
            f"{path} is encrypted, and there is no password.",
            f"Set {PASSWORD_VARIABLE}, or run the command in a terminal, where it asks.",
        )
    return given.encode()


def _sha256(path: Path, public: Any) -> str:
    serialization = _serialization()
    curve = getattr(getattr(public, "curve", None), "name", None)
    if curve not in _CURVES:
        raise SenteiError(
            f"{path} is not a key of an elliptic curve that can sign here ({', '.join(_CURVES.values())}).", _MAKE_ONE
        )
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _token_key(uri: str) -> TokenKey:
    given = parse_qs(uri.partition("?")[2])
    if "pin-value" in given:
        raise SenteiError(
            "The PKCS#11 URI holds the PIN, which other users can read in the list of processes.",
            "Write pin-source=/path/of/a/file instead of pin-value.",
        )
    sources = given.get("pin-source", [])
    pin_file = Path(sources[0].removeprefix("file:").removeprefix("//")) if sources else None
    return TokenKey(uri=uri, pin_file=pin_file)


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ModuleNotFoundError as error:
        raise MissingDependencyError("cryptography", "sign") from error
    return serialization
