"""An ONNX graph with KV cache, for onnxruntime-genai and for plain ONNX Runtime."""

import hashlib
import io
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from export.finish import carry_over
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.checkpoint.export_document import EXPORT_FILE, ExportRecord, FileRecord
from toolchain.checkpoint.verification_document import VERIFICATION_FILE
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.json_files import read_json_object
from toolchain.outputs import check_output_directory, new_directory, writes_directory

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Device = Literal["cpu", "cuda"]
_WRITTEN_LATER = (EXPORT_FILE, VERIFICATION_FILE, "README.md")


@writes_directory
def export_onnx(
    directory: Path,
    out: Path,
    *,
    precision: Precision = "fp32",
    device: Device = "cpu",
    force: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes ``model.onnx`` with external weights, ``genai_config.json``, tokenizer and ``sentei_export.json``.

    Batch and length are dynamic, logits are given for every position, and only layers that attend have cache inputs.
    Holds the whole model in memory; docs/decisions/onnx-size.md says how much that takes.

    Args:
        directory: A checkpoint, pruned or not.
        out: The directory to create.
        precision: Of the matrices. On the CPU, activations and KV cache are float32; on CUDA they are of the same
            precision, and for int8 and int4 float16, or bfloat16 for Gemma 3.
        device: Whose kernels the graph is for; CUDA need not be there.
        force: Replace ``out`` if it is not empty.
        on_progress: Called with a line of text now and then.

    Returns:
        What ``sentei_export.json`` holds.

    Raises:
        SenteiError: Not a good checkpoint, one whose ``verification.json`` says failed, no tokenizer, a precision that
            the device has not, or an architecture detail that the builder cannot express.
        MissingDependencyError: The ``onnx`` extra is not installed.
    """
    check_output_directory(out, force=force, inputs=[directory])
    checkpoint = open_checkpoint(directory)
    _refuse_failed(directory)
    with new_directory(out, force=force) as partial:
        _build(checkpoint, partial, precision, device, on_progress)
        on_progress("Hashing")
        summary = _summary(checkpoint, partial, precision, device)
        (partial / EXPORT_FILE).write_text(summary.to_json(), encoding="utf-8")
    return summary.content()


def _refuse_failed(directory: Path) -> None:
    """Refuses a checkpoint that is itself an export and that ``sentei verify`` found wrong."""
    path = directory / VERIFICATION_FILE
    if not path.is_file():
        return
    try:
        passed = read_json_object(path)["passed"]
    except (SenteiError, KeyError) as error:
        raise SenteiError(f"{path} is damaged ({type(error).__name__}: {error}).", "Verify again.") from error
    if passed is not True:
        raise SenteiError(
            f"{path} says that {directory} differs from the checkpoint it was made from.",
            "Export that checkpoint instead.",
        )


def _build(
    checkpoint: Checkpoint, out: Path, precision: Precision, device: Device, on_progress: Callable[[str], None]
) -> None:
    # The heavy imports wait until the cheap checks have passed.
    with _unchanged_logging():
        try:
            from export.genai_builder import builder_class, check_supported
        except ModuleNotFoundError as error:
            raise MissingDependencyError(str(error.name), "onnx") from error
        except ImportError as error:
            raise SenteiError(
                f"ONNX export cannot start ({error}).", "Install again: pip install 'sentei[onnx]'"
            ) from error
    from transformers import AutoConfig

    from toolchain.model.loading import load_model, load_tokenizer

    plain = {key: value for key, value in checkpoint.config.items() if key != "per_layer_config"}
    config = AutoConfig.for_model(**plain)
    config.architectures = [checkpoint.family.architecture]
    config.name_or_path = str(checkpoint.directory)  # where the builder looks for generation_config.json and tokenizer
    check_supported(config, precision, device)
    load_tokenizer(checkpoint.directory).save_pretrained(out)
    carry_over(checkpoint.directory, out, card=False)
    on_progress("Loading the model")
    try:
        with tempfile.TemporaryDirectory(dir=out) as temporary, redirect_stdout(_Lines(on_progress)):
            builder = builder_class(config)(
                config,
                load_model(checkpoint),
                checkpoint.layout,
                precision=precision,
                device=device,
                temporary=temporary,
            )
            builder.make_model(str(checkpoint.directory))
            builder.save(out, _metadata(checkpoint))
            builder.make_genai_config(config, {"local_files_only": True}, str(out))
    except (NotImplementedError, ValueError) as error:
        raise SenteiError(f"{checkpoint.directory}: ONNX export does not support this model ({error}).") from error


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the graph says about where it comes from."""
    facts = {"sentei.version": version("sentei"), "sentei.source_fingerprint": checkpoint.fingerprint}
    plan = checkpoint.directory / "plan.json"
    if plan.is_file():
        try:
            base = read_json_object(plan)["base_model"]
            facts["sentei.base_model"], facts["sentei.base_model_sha256"] = (
                str(base["name"]),
                str(base["weights_sha256"]),
            )
        except (SenteiError, KeyError, TypeError) as error:
            raise SenteiError(
                f"{plan} is damaged ({type(error).__name__}: {error}).", "Prune or apply again."
            ) from error
        facts["sentei.plan_sha256"] = _sha256(plan)
    return facts


def _summary(checkpoint: Checkpoint, out: Path, precision: Precision, device: Device) -> ExportRecord:
    layout = checkpoint.layout
    return ExportRecord(
        schema_version=1,
        format="onnx",
        precision=precision,
        device=device,
        sentei_version=version("sentei"),
        onnx_ir_version=version("onnx-ir"),
        source_fingerprint=checkpoint.fingerprint,
        num_hidden_layers=len(layout),
        removed_attention=[index for index, layer in enumerate(layout) if not layer.attention],
        removed_ffn=[index for index, layer in enumerate(layout) if layer.intermediate_size == 0],
        intermediate_size=[layer.intermediate_size for layer in layout],
        files=_hashes(out),
    )


def _hashes(out: Path) -> dict[str, FileRecord]:
    """Size and hash of every file that stays as it is, by its path inside the export."""
    paths = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {
        name: FileRecord(bytes=path.stat().st_size, sha256=_sha256(path))
        for name, path in sorted(paths.items())
        if name not in _WRITTEN_LATER
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _unchanged_logging() -> Iterator[None]:
    """Undoes what ONNX Runtime's quantiser does on import: it sends everybody's INFO messages to the terminal."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


class _Lines(io.TextIOBase):
    """Takes the builder's prints off stdout, which belongs to the command's result, and passes the useful ones on."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line, self._stdout, self._pending = on_line, sys.stdout, ""

    def write(self, text: str) -> int:
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            if line.startswith(("Reading", "Warning", "WARNING")):
                with redirect_stdout(self._stdout):
                    self._on_line(line)
        return len(text)
