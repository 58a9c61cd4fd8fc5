"""Hashes of what sentei writes, to show that a change of the code changes no output.

    python benchmarks/output_hashes.py -o before.json     # on the commit before
    python benchmarks/output_hashes.py -o after.json      # on the commit after
    diff before.json after.json

Prunes the demo model with small settings by the default method, by 2SSP alone and by two block methods, exports one
result for vLLM and ONNX Runtime, and evaluates it. Every file is hashed. JSON files are hashed key by key, so that a
difference names the key; durations, versions and places are left out. Model cards (README.md) are left out.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer

_SENTEI = str(Path(sys.executable).with_name("sentei"))
_SETTINGS = ("--samples", "4", "--seq-len", "64", "--sparsity", "0.25")
_METHODS = {
    "default": (),
    "2ssp": ("--method", "2ssp"),
    "shortgpt": ("--method", "shortgpt"),
    "sliding-window": ("--method", "sliding-window"),
}
_LEFT_OUT = {"duration_s", "pruning_s", "sentei_version", "environment", "versions", "date", "created"}
# A part of an evaluation holds what it was computed from, which includes the times of files, and has its hash in its
# name. Both differ between two runs.
_IDENTITY = "identity"
_HASH_IN_NAME = re.compile(r"-[0-9a-f]{16}(?=\.json)")


def main(out: Annotated[Path, typer.Option("-o", help="JSON file to write.")]) -> None:
    """Writes the hashes."""
    with tempfile.TemporaryDirectory() as scratch:
        _make(Path(scratch))
        hashes = {
            name: value
            for path in sorted(Path(scratch).rglob("*"))
            if path.is_file() and path.name != "README.md"
            for name, value in _hashes(path, _HASH_IN_NAME.sub("", str(path.relative_to(scratch))), scratch)
        }
    out.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _make(scratch: Path) -> None:
    """Runs the commands, each as a program of its own."""
    (scratch / "text.txt").write_text("\n\n".join(topics.values())[:60_000], encoding="utf-8")
    _run("import", "-o", scratch / "model")
    for name, options in _METHODS.items():
        _run(
            "prune",
            scratch / "model",
            "-o",
            scratch / name,
            *options,
            *_SETTINGS,
            "--calibration",
            scratch / "text.txt",
        )
    for kind in ("vllm", "onnx"):
        _run("export", kind, scratch / "default", "-o", scratch / kind)
    _run(
        "evaluate", scratch / "default", "--against", scratch / "model", "--text", scratch / "text.txt",
        "--seq-len", 64, "--windows", 4, "--generations", 1, "-o", scratch / "evaluation",
    )  # fmt: skip


def _run(*words: object) -> None:
    command = [_SENTEI, *map(str, words), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _hashes(path: Path, name: str, scratch: str) -> Iterator[tuple[str, str]]:
    if path.suffix != ".json" or path.name.startswith(("tokenizer", "vocab")):
        yield name, hashlib.sha256(path.read_bytes()).hexdigest()
        return
    for key, value in _leaves(json.loads(path.read_text(encoding="utf-8"))):
        text = json.dumps(value).replace(scratch, "")
        yield f"{name}{key}", text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()


def _leaves(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The values of a JSON document that have no keys of their own; other lists than lists of documents are one."""
    if isinstance(value, dict) and depth < 4:
        for name, each in value.items():
            if name not in _LEFT_OUT and name != _IDENTITY:
                yield from _leaves(each, f"{key}.{name}", depth + 1)
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value) and depth < 4:
        for number, each in enumerate(value):
            yield from _leaves(each, f"{key}.{number}", depth + 1)
    else:
        yield key, value


if __name__ == "__main__":
    typer.run(main)
