"""A directory for servers that take no plugin: ``DeciLMForCausalLM``, at the price of ``trust_remote_code``."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolchain.checkpoint.directory import (
    Checkpoint,
    copy_companions,
    open_checkpoint,
    read_headers,
    same_bits,
    write_config,
    write_weights,
)
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, CheckRecord, ExportVerification
from toolchain.errors import CheckFailedError
from toolchain.json_files import read_json_object
from toolchain.model.decilm import ARCHITECTURE, CONFIG_CLASS_FILE, NasForm, config_class_source, nas_form
from toolchain.outputs import check_output_directory, new_directory, writes_directory


@writes_directory
def export_nemotron_nas(
    directory: Path,
    out: Path,
    *,
    force: bool = False,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Writes the checkpoint in DeciLM's form, reads it back, and compares every tensor bit by bit with its source.

    Weights keep their dtype; fused projections are split. Holds one tensor in memory at a time.

    Args:
        directory: A checkpoint, pruned or not.
        out: The directory to create.
        force: Replace ``out`` if it is not empty.
        on_tensor: Called with each tensor's name once it is written, and again once it is compared.

    Returns:
        What ``verification.json`` holds.

    Raises:
        SenteiError: Not a good checkpoint, or one that the form cannot express.
        CheckFailedError: What was read back differs from what should have been written.
    """
    check_output_directory(out, force=force, inputs=[directory])
    checkpoint = open_checkpoint(directory)
    form = nas_form(checkpoint)
    with new_directory(out, force=force) as partial:
        tensors = {name: (rows.shape, rows.dtype) for name, rows in form.tensors.items()}
        write_weights(partial, tensors, lambda name: form.tensors[name].read(checkpoint), on_tensor=on_tensor)
        write_config(partial, form.config)
        (partial / CONFIG_CLASS_FILE).write_bytes(config_class_source())
        copy_companions(directory, partial)
        _drop_remote_tokenizer(partial)
        if (directory / "plan.json").is_file():
            shutil.copyfile(directory / "plan.json", partial / "plan.json")
        (partial / "README.md").write_text(_readme(checkpoint, form), encoding="utf-8")
        _compare(checkpoint, form, partial, on_tensor)
        verification = ExportVerification(
            schema_version=1,
            sentei_version=version("sentei"),
            passed=True,
            engine="safetensors",
            dtype=form.config["dtype"],
            source_fingerprint=checkpoint.fingerprint,
            num_tensors=len(form.tensors),
            llama_cpp_obstacle=form.llama_cpp_obstacle,
            checks={"differing_tensors": CheckRecord(passed=True, value=0, limit=0)},
        )
        (partial / VERIFICATION_FILE).write_text(verification.to_json(), encoding="utf-8")
    return verification.content()


def _drop_remote_tokenizer(directory: Path) -> None:
    """Takes out of the tokenizer's settings what would make a server with trust_remote_code run code of others."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = read_json_object(path)
    if settings.pop("auto_map", None):
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _compare(checkpoint: Checkpoint, form: NasForm, out: Path, on_tensor: Callable[[str], None]) -> None:
    written = Checkpoint(out, form.config, checkpoint.family, checkpoint.layout, read_headers(out))
    for name, rows in form.tensors.items():
        if not same_bits(rows.read(checkpoint), written.read(name)):
            raise CheckFailedError(
                f"{name} reads back different from {checkpoint.directory}: the disk may be failing.", "Export again."
            )
        on_tensor(name)


def _readme(checkpoint: Checkpoint, form: NasForm) -> str:
    removed = [index for index, layer in enumerate(checkpoint.layout) if not layer.attention]
    widths = [layer.intermediate_size for layer in checkpoint.layout]
    if form.llama_cpp_obstacle:
        llama_cpp = f"llama.cpp cannot have it: {form.llama_cpp_obstacle}."
    else:
        llama_cpp = """llama.cpp's `convert_hf_to_gguf.py DIR --outfile model.gguf` reads it and runs no code of it. For
this form it takes tokenizers of Llama 2's and Llama 3's kind, and stops at others."""
    return f"""---
tags: [sentei, pruned]
---
# A pruned {checkpoint.family.model_type} model as `{ARCHITECTURE}`

For servers that take no plugin. **It needs `trust_remote_code`:** the server then runs `{CONFIG_CLASS_FILE}` of this
directory, which makes `block_configs` readable as attributes and does nothing else. Read it before you trust it. With
sentei's plugin no code of a model's directory is run: `sentei export vllm`.

    vllm serve DIR --trust-remote-code

{llama_cpp}

- FFN widths: {min(widths)} to {max(widths)}, layer by layer (`block_configs` in `config.json`).
- Attention removed in layers: {", ".join(map(str, removed)) or "none"}.

Written by sentei {version("sentei")}. `sentei verify DIR --against CHECKPOINT` compares it with what it was made from.
"""
