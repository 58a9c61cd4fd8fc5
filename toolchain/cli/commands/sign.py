"""``sentei sign``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import Output
from toolchain.cli.options import ForceOption, JsonOption, QuietOption
from toolchain.cli.terminal import printable
from toolchain.outputs import held_in_place


def sign(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What sentei export wrote, verified.")],
    *,
    key: Annotated[
        str,
        typer.Option(
            metavar="KEY.pem",
            help="The private key: a PEM file or a PKCS#11 URI. Its password: SENTEI_KEY_PASSWORD, else a prompt.",
        ),
    ],
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Sign every file of an export, with a record of where it came from and a bill of materials. Do this last."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.signing.keys import open_signing_key, readable_by_others
    from serving.signing.sign import sign as run

    signing_key = open_signing_key(key, _ask)
    if warning := readable_by_others(signing_key):
        typer.echo(printable(warning), err=True)
    output.note(f"Checking and signing {directory} ...")
    with held_in_place(directory):
        result = run(directory, signing_key, force=force)
    if not result["licences"]:
        output.note(f"{directory} states no licence, in its card or as a file, and so does its bill of materials.")
    output.result({"directory": str(directory), **result}, lambda console: _show(console, directory, result))


def _ask() -> str | None:
    """Asks for the password of a key where a person sits at a terminal."""
    if not sys.stdin.isatty():
        return None
    return str(typer.prompt("Password of the key", hide_input=True, err=True))


def _show(console: Console, directory: Path, result: dict[str, Any]) -> None:
    console.print(f"{directory}: signed, {result['files']} files, key {result['key_sha256'][:16]}")
    console.print("Any change to the directory ends the signature. sentei verify DIR --signature KEY.pub checks it.")
