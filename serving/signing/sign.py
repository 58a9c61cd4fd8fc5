"""Signs an export: checks it, writes where it came from and what is in it beside it, and then signs all of that."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.signing.bill_of_materials import BOM_FILE, bill_of_materials
from serving.signing.exported import open_exported
from serving.signing.keys import KeyFile, SigningKey
from serving.signing.provenance import provenance_of
from serving.signing.provenance_document import PROVENANCE_FILE
from serving.signing.signature import file_hashes, write_signature
from serving.signing.signed_files import SIGNATURE_FILE, signed_files
from toolchain.checkpoint.licences import stated_licences
from toolchain.errors import SenteiError
from toolchain.outputs import beside, write_text
from toolchain.outputs.names import PARTIAL

_WRITTEN = (PROVENANCE_FILE, BOM_FILE, SIGNATURE_FILE)


def sign(directory: Path, key: SigningKey, *, force: bool) -> dict[str, Any]:
    """Writes ``provenance.json``, ``bom.cdx.json`` and last ``model.sig``, which covers every other file.

    Where anything fails, the directory is as it was before.

    Args:
        directory: An export that was verified.
        key: The private key.
        force: Whether a signature that is there may be replaced.

    Returns:
        ``files``, how many are covered; ``key_sha256``, of the public key; ``licences`` that the directory states; and
        ``provenance``, as the file has it.

    Raises:
        CheckFailedError: The export failed its verification.
        SenteiError: It is no export, was never verified, is damaged, is signed already, holds a link or the key; or a
            key on a token cannot be used.
        MissingDependencyError: A library is not installed.
    """
    signed_files(directory)  # refuses what cannot be signed before anything is read
    secret = key.path if isinstance(key, KeyFile) else key.pin_file
    if secret is not None and secret.resolve().is_relative_to(directory.resolve()):
        raise SenteiError(
            f"{secret} lies in the directory that is to be signed, and would be given away with it.",
            "Move it elsewhere.",
        )
    if (directory / SIGNATURE_FILE).exists() and not force:
        raise SenteiError(f"{directory} is signed already.", "Add --force to sign it again.")
    exported = open_exported(directory)
    with _as_it_was(directory):
        _clear_away(directory)
        names = set(signed_files(directory))
        provenance = provenance_of(exported)
        write_text(directory / PROVENANCE_FILE, provenance.to_json())
        without = (BOM_FILE, SIGNATURE_FILE)
        hashes = file_hashes(directory, without=without)
        if set(hashes) != (names | {PROVENANCE_FILE}) - {BOM_FILE}:
            raise SenteiError(f"{directory} changed while it was being signed.", "Sign it again.")
        write_text(directory / BOM_FILE, bill_of_materials(exported, hashes))
        signed = write_signature(directory, key)
        changed = [name for name, sha256 in hashes.items() if signed.files[name] != sha256]
        if changed:
            raise SenteiError(f"{directory / changed[0]} changed while it was being signed.", "Sign it again.")
    return {
        "files": len(signed.files),
        "key_sha256": signed.key_sha256,
        "licences": [licence.name for licence in stated_licences(directory)],
        "provenance": provenance.content(),
    }


def _clear_away(directory: Path) -> None:
    """Deletes what a signing that was killed had half written; else it would be signed as a part of the model."""
    for name in _WRITTEN:
        beside(directory / name, PARTIAL).unlink(missing_ok=True)


@contextmanager
def _as_it_was(directory: Path) -> Iterator[None]:
    """Puts back the files that signing writes, or takes them away again, if it fails."""
    paths = [directory / name for name in _WRITTEN]
    before = {path: path.read_bytes() for path in paths if path.exists()}
    try:
        yield
    except BaseException:
        for path in paths:
            if path in before:
                path.write_bytes(before[path])
            else:
                path.unlink(missing_ok=True)
        raise
