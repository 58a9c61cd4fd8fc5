"""Verifies an export in DeciLM's form: the same weights as its checkpoint's, and no code but sentei's own."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serving.engines.vllm import VllmEngine
from toolchain.checkpoint.directory import Checkpoint, read_config, read_headers, same_bits
from toolchain.errors import SenteiError
from toolchain.json_files import read_json
from toolchain.model.decilm import AUTO_MAP, CONFIG_CLASS_FILE, config_class_source, nas_form


def open_nas(directory: Path, source: Checkpoint) -> Checkpoint:
    """Opens an export as far as its weights go.

    Args:
        directory: The export.
        source: The checkpoint it was made from.
    """
    config = read_config(directory)
    return Checkpoint(directory, config, source.family, source.layout, read_headers(directory))


def start_vllm(directory: Path, source: Checkpoint, **options: Any) -> VllmEngine:
    """Starts vLLM with ``trust_remote_code``, after checking that the code it will run is sentei's own.

    Args:
        directory: The export.
        source: The checkpoint it was made from.
        options: Further ones of ``vllm.LLM``.

    Raises:
        SenteiError: The directory would make vLLM run other code, or vLLM cannot load it.
        MissingDependencyError: vLLM is not installed.
    """
    _check_code(directory)
    # Without its tokenizer, which trust_remote_code concerns too: prompts are token ids.
    trusting = {"trust_remote_code": True, "skip_tokenizer_init": True, **options}
    return VllmEngine(directory, options=trusting, described_by=source.directory)


def count_differing(source: Checkpoint, exported: Checkpoint) -> int:
    """Tensors of the export that are not what their source makes them, and tensors that only one of them has."""
    tensors = nas_form(source).tensors
    shared = set(tensors) & set(exported.tensors)
    differing = sum(not same_bits(tensors[name].read(source), exported.read(name)) for name in shared)
    return differing + len(set(tensors) ^ set(exported.tensors))


def _check_code(directory: Path) -> None:
    advice = "Export again, and never serve it with trust_remote_code before you have read what it holds."
    written = directory / CONFIG_CLASS_FILE
    if not written.is_file() or written.read_bytes() != config_class_source():
        raise SenteiError(f"{written} is not the file that this version of sentei writes.", advice)
    for path in sorted(directory.rglob("*.py")):
        if path != written:
            raise SenteiError(f"{path} is none of the files that sentei writes.", advice)
    for name, auto_map in _auto_maps(directory):
        if name != "config.json" or auto_map != AUTO_MAP:
            raise SenteiError(f"{directory / name} names code to run (auto_map), which sentei does not write.", advice)


def _auto_maps(directory: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(directory.glob("*.json")):
        if path.name == "tokenizer.json":  # large, and nobody looks there for code
            continue
        said = read_json(path)
        if isinstance(said, Mapping) and "auto_map" in said:
            yield path.name, said["auto_map"]
