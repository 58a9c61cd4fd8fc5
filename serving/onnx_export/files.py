"""What an ONNX export's files say of themselves, and whether they are still what was written."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.onnx_export.genai_config import parse_genai_config
from serving.onnx_export.graph_check import load_graph
from serving.onnx_export.members import member
from toolchain.checkpoint.export_document import EXPORT_FILE, ExportRecord
from toolchain.documents import read_document
from toolchain.errors import SenteiError
from toolchain.json_files import read_json_object

_SETTINGS_FILE = "genai_config.json"
_MAX_SETTINGS_BYTES = 256 * 1024
# Where it is, onnxruntime-genai takes the directory for a package and reads its settings elsewhere.
_PACKAGE_FILE = "manifest.json"
_AGAIN = "Export the model again."
_ORIGINAL_CONTEXT = "sentei.original_context_length"
_DECIMAL = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True, kw_only=True)
class OnnxSettings:
    """What the runtimes need to know.

    Attributes:
        filename: Of the graph.
        head_size: Of the KV cache and the queries.
        num_attention_heads: Of the queries.
        num_key_value_heads: Of the KV cache.
        context_length: In tokens, prompt and answer.
        window: Tokens that sliding attention sees; 0 if no layer slides.
        vocab_size: Token ids are below it.
        eos_token_ids: Each ends an answer.
        device: cpu or cuda.
    """

    filename: str
    head_size: int
    num_attention_heads: int
    num_key_value_heads: int
    context_length: int
    window: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    device: str

    def cache_length(self, num_tokens: int) -> int:
        """The ``max_length`` to give to onnxruntime-genai, which allocates the KV cache for it at once.

        Never the whole context without need. Attention over a window refuses a cache that is shorter than the window,
        so this may be more than is wanted: count the tokens.
        """
        return min(self.context_length, max(num_tokens, self.window))


def is_onnx_export(directory: Path) -> bool:
    """Whether a directory is an ONNX export, ours or the vendor's, and no checkpoint."""
    return (directory / _SETTINGS_FILE).is_file()


def read_settings(directory: Path) -> OnnxSettings:
    """Reads ``genai_config.json``; see :mod:`serving.onnx_export.genai_config` for what may be in it.

    Call this, and :func:`check_files` or :func:`check_graph`, before a runtime sees the directory.

    Raises:
        SenteiError: It is missing or damaged, or has what sentei does not know.
    """
    path = directory / _SETTINGS_FILE
    if not path.is_file():
        raise SenteiError(f"{directory} has no {_SETTINGS_FILE}.", "Give a directory that sentei export onnx wrote.")
    if (directory / _PACKAGE_FILE).exists():
        raise SenteiError(
            f"{directory / _PACKAGE_FILE} is not known to sentei and could run code.", "Remove it, or export again."
        )
    member(directory, _SETTINGS_FILE)
    content = read_json_object(path, hint=_AGAIN, max_bytes=_MAX_SETTINGS_BYTES)
    model = parse_genai_config(content, str(path)).model
    decoder, eos = model.decoder, model.eos_token_id
    return OnnxSettings(
        filename=decoder.filename,
        head_size=decoder.head_size,
        num_attention_heads=decoder.num_attention_heads,
        num_key_value_heads=decoder.num_key_value_heads,
        context_length=model.context_length,
        window=decoder.sliding_window.window_size if decoder.sliding_window else 0,
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        device="cuda" if any(each.cuda for each in decoder.session_options.provider_options) else "cpu",
    )


def check_graph(directory: Path) -> Any:
    """Checks settings and graph, and reads no weights; see :func:`serving.onnx_export.graph_check.load_graph`."""
    return load_graph(directory, read_settings(directory).filename)


def check_files(directory: Path) -> None:
    """Checks everything that is checked before a runtime sees an export.

    These are its settings, its graph, and the sizes and hashes of its files that ``sentei export`` wrote down, where it
    did.

    Raises:
        SenteiError: A file is missing or not what was written, the list of them is damaged, or settings or graph have
            what sentei does not know.
        MissingDependencyError: onnx is not installed.
    """
    read_settings(directory)
    for name, (size, sha256) in listed_files(directory).items():
        file = member(directory, name)
        if file.stat().st_size != size:
            raise SenteiError(
                f"{file} is damaged: {file.stat().st_size} bytes, not {size}.", "Copy or export the model again."
            )
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != sha256:
            raise SenteiError(
                f"{file} is damaged: its SHA-256 is {found[:12]}…, not {sha256[:12]}….",
                "Copy or export the model again.",
            )
    check_graph(directory)


def listed_files(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file that ``sentei export`` wrote; empty for the vendor's own exports.

    Exports of earlier versions list the graph and its weights only.

    Raises:
        SenteiError: The list is damaged.
    """
    path = directory / EXPORT_FILE
    if not path.is_file():
        return {}
    record = read_document(path, ExportRecord, hint=_AGAIN)
    return {name: (file.bytes, file.sha256) for name, file in record.files.items()}


def original_context(directory: Path, metadata: Mapping[str, str]) -> int:
    """Tokens within which the short factors of Phi-3's LongRoPE hold, from a graph's metadata; 0 without LongRoPE.

    Raises:
        SenteiError: It is no number of tokens.
    """
    if (original := metadata.get(_ORIGINAL_CONTEXT)) is None:
        return 0
    if not _DECIMAL.fullmatch(original):
        raise SenteiError(f"{directory}: the graph's original context is {original[:20]!r}.", _AGAIN)
    return int(original)


def damaged(directory: Path, error: Exception) -> SenteiError:
    """What to say when a runtime cannot load an export."""
    return SenteiError(
        f"{directory} cannot be loaded by ONNX Runtime ({first_line(error)}).", "Export the model again."
    )


def first_line(error: Exception) -> str:
    """The runtime's own reason, short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
