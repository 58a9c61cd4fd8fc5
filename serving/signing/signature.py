"""Signs every file of a directory, and checks that a directory is what was signed.

Both are model-signing's work: ``model.sig`` is a Sigstore bundle, which that library's own command line checks as well.
Nothing is sent anywhere. The library may leave files out (those of git, and what a signature says); here all count.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, Field

from serving.signing.keys import KeyFile, SigningKey, TokenKey, public_key_sha256
from serving.signing.signed_files import SIGNATURE_FILE, signed_files
from toolchain.documents import check_document, read_document
from toolchain.errors import CheckFailedError, MissingDependencyError, SenteiError, is_out_of_memory, reason_of
from toolchain.json_files import parse_json
from toolchain.outputs import whole_file

_NOT_TO_BE_SERVED = "Do not serve it; get it again from whoever signed it."
_NO_SIGNATURE = "Get the directory again from whoever signed it."
_MOST_NAMED, _LONGEST_NAME = 3, 100


class _Key(BaseModel):
    hint: str


class _Material(BaseModel):
    public_key: _Key = Field(alias="publicKey")


class _Envelope(BaseModel):
    payload: str


class _Bundle(BaseModel):
    """What is looked at in ``model.sig``, beside what the library looks at."""

    material: _Material = Field(alias="verificationMaterial")
    envelope: _Envelope = Field(alias="dsseEnvelope")


class _Resource(BaseModel):
    name: str
    digest: str


class _Predicate(BaseModel):
    resources: list[_Resource]


class _Statement(BaseModel):
    predicate: _Predicate


@dataclass(frozen=True, kw_only=True)
class Signed:
    """What a signature says; only worth something once it was checked.

    Attributes:
        key_sha256: Of the public key in PEM form.
        files: The SHA-256 of each file that it covers, by name, sorted by names.
    """

    key_sha256: str
    files: Mapping[str, str]


def file_hashes(directory: Path, *, without: tuple[str, ...]) -> dict[str, str]:
    """The SHA-256 of each file of a directory by its name, sorted by names; ``without`` are left out.

    Raises:
        MissingDependencyError: model-signing is not installed.
    """
    manifest = _all_files(_library(), without).hash(directory)
    return {each.identifier: each.digest.digest_hex for each in manifest.resource_descriptors()}


def write_signature(directory: Path, key: SigningKey) -> Signed:
    """Signs all files of a directory but ``model.sig``, and writes that.

    Raises:
        SenteiError: See :func:`signed_files`; or the token's key cannot be used.
        MissingDependencyError: A library is not installed.
    """
    library, home = _library(), directory.resolve()
    files = signed_files(home)
    config = library.signing.Config().set_hashing_config(_all_files(library, (SIGNATURE_FILE,)))
    if isinstance(key, KeyFile):
        config.use_elliptic_key_signer(private_key=key.path, password=key.password)
    else:
        _use_token(config, key)
    with whole_file(home / SIGNATURE_FILE) as path:
        # The library hashes before it writes, so that this file is not among those that it hashes.
        config.sign(home, path)
    signed = read_signature(home)
    if list(signed.files) != files:
        raise SenteiError(f"{directory} changed while it was being signed.", "Sign it again.")
    return signed


def check_signature(directory: Path, public_key: Path) -> Signed:
    """Checks that a directory holds what the owner of a key signed: every byte, no file more and none less.

    Args:
        directory: With ``model.sig`` in it; may itself be a link.
        public_key: Of the signer, in PEM form.

    Returns:
        What was signed, and by which key.

    Raises:
        CheckFailedError: A file was changed, added or removed, or another key signed it.
        SenteiError: There is no readable signature or public key, or the directory holds what cannot be signed.
        MissingDependencyError: model-signing is not installed.
    """
    library = _library()
    key_sha256 = public_key_sha256(public_key)
    files = signed_files(directory)
    signed = read_signature(directory)
    if signed.key_sha256 != key_sha256:
        raise CheckFailedError(
            f"{directory} was signed by another key than {public_key} (by {signed.key_sha256[:12]}…, and this is "
            f"{key_sha256[:12]}…).",
            _NOT_TO_BE_SERVED,
        )
    config = library.verifying.Config().set_hashing_config(_all_files(library, (SIGNATURE_FILE,)))
    config.use_elliptic_key_verifier(public_key=public_key)
    home = directory.resolve()  # the library refuses links, and the directory itself may be one
    try:
        with redirect_stdout(io.StringIO()):  # it prints warnings there
            config.verify(home, home / SIGNATURE_FILE)
        # What the signature itself says may be left out is not there either.
        different = _different(files, signed, [])
    except OSError:
        raise
    except Exception as error:  # a signature of a stranger may hold anything: the library's errors are of many kinds
        if is_out_of_memory(error):
            raise
        raise CheckFailedError(
            f"{directory} is not what was signed: {_refusal(home, files, signed, error)}.", _NOT_TO_BE_SERVED
        ) from error
    if different:
        raise CheckFailedError(f"{directory} is not what was signed: {different}.", _NOT_TO_BE_SERVED)
    return signed


def read_signature(directory: Path) -> Signed:
    """Reads what ``model.sig`` says, without checking it.

    Raises:
        SenteiError: There is none, or it is damaged or in another form.
    """
    path = directory / SIGNATURE_FILE
    if not path.exists():
        raise SenteiError(f"{directory} is not signed: it has no {SIGNATURE_FILE}.", _NO_SIGNATURE)
    bundle = read_document(path, _Bundle, hint=_NO_SIGNATURE)
    try:
        payload = base64.b64decode(bundle.envelope.payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SenteiError(f"{path} is damaged ({reason_of(error)}).", _NO_SIGNATURE) from error
    content = parse_json(payload, str(path), hint=_NO_SIGNATURE)
    statement = check_document(content, str(path), _Statement, hint=_NO_SIGNATURE)
    resources = sorted(statement.predicate.resources, key=lambda each: each.name)
    return Signed(key_sha256=bundle.material.public_key.hint, files={each.name: each.digest for each in resources})


def _refusal(home: Path, files: list[str], signed: Signed, error: Exception) -> str:
    """Says why the library refused; ``files`` are hashed again to name those that changed."""
    from cryptography.exceptions import InvalidSignature

    if not isinstance(error, InvalidSignature):
        found = file_hashes(home, without=(SIGNATURE_FILE,))
        changed = [name for name in files if name in signed.files and found.get(name) != signed.files[name]]
        if different := _different(files, signed, changed):
            return different
    return f"{SIGNATURE_FILE} is not as its key made it"


def _different(files: list[str], signed: Signed, changed: list[str]) -> str:
    """In which way files are not those that were signed, in a few words; empty if they are."""
    kinds = {
        "changed": changed,
        "added": [name for name in files if name not in signed.files],
        "missing": [name for name in signed.files if name not in files],
    }
    return ", ".join(f"{_named(names)} {kind}" for kind, names in kinds.items() if names)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{', '.join(map(_shown, names[:_MOST_NAMED]))}{more}"


def _shown(name: str) -> str:
    """A name that a stranger may have chosen."""
    short = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
    return short if short.isprintable() else ascii(short)


def _all_files(library: Any, without: tuple[str, ...]) -> Any:
    """How the library hashes: every file, hidden and git's too, no links followed."""
    config = library.hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return config.set_ignored_paths(paths=without, ignore_git_paths=False).set_allow_symlinks(False)


def _use_token(config: Any, key: TokenKey) -> None:
    try:
        import PyKCS11  # noqa: F401 (the library's own message does not name sentei's extra)
    except ModuleNotFoundError as error:
        raise MissingDependencyError("PyKCS11", "pkcs11") from error
    try:
        config.use_pkcs11_signer(pkcs11_uri=key.uri)
    except Exception as error:  # PyKCS11's errors are its own, and modules of makers fail in their ways
        raise SenteiError(
            f"The key of the PKCS#11 token cannot be used ({reason_of(error)}).",
            "Check token, object, module-path and pin-source in the URI; a PIN's file ends without a line break.",
        ) from error


def _library() -> Any:
    try:
        from model_signing import hashing, signing, verifying
    except ModuleNotFoundError as error:
        raise MissingDependencyError("model-signing", "sign") from error
    return SimpleNamespace(hashing=hashing, signing=signing, verifying=verifying)
