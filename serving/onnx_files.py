"""What an ONNX export's files say of themselves, and whether they are still what was written."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import SenteiError

SUMMARY_FILE = "sentei_export.json"
_SETTINGS_FILE = "genai_config.json"


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


def is_onnx_export(directory: Path) -> bool:
    """Whether a directory is an ONNX export, ours or the vendor's, and no checkpoint."""
    return (directory / _SETTINGS_FILE).is_file()


def read_settings(directory: Path) -> OnnxSettings:
    """Reads ``genai_config.json``.

    Raises:
        SenteiError: It is missing or damaged.
    """
    path = directory / _SETTINGS_FILE
    if not path.is_file():
        raise SenteiError(f"{directory} has no {_SETTINGS_FILE}.", "Give a directory that sentei export onnx wrote.")
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        eos = model["eos_token_id"]
        providers = {name for each in decoder["session_options"]["provider_options"] for name in each}
        return OnnxSettings(
            filename=str(decoder["filename"]),
            head_size=int(decoder["head_size"]),
            num_attention_heads=int(decoder["num_attention_heads"]),
            num_key_value_heads=int(decoder["num_key_value_heads"]),
            context_length=int(model["context_length"]),
            window=int(decoder.get("sliding_window", {}).get("window_size", 0)),
            vocab_size=int(model["vocab_size"]),
            eos_token_ids=frozenset(eos if isinstance(eos, list) else [eos]),
            device="cuda" if "cuda" in providers else "cpu",
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SenteiError(f"{path} is damaged ({type(error).__name__}: {error}).", "Export the model again.") from error


def check_files(directory: Path) -> None:
    """Compares graph and weights with the sizes and hashes that ``sentei export`` wrote down, where it did.

    Raises:
        SenteiError: A file is missing or not what was written, or the list of them is damaged.
    """
    path = directory / SUMMARY_FILE
    if not path.is_file():
        return  # the vendor's own export
    try:
        listed = json.loads(path.read_bytes())["files"]
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SenteiError(f"{path} is damaged ({type(error).__name__}: {error}).", "Export the model again.") from error
    for name, (size, sha256) in files.items():
        file = directory / name
        if not file.is_file():
            raise SenteiError(f"{file} does not exist.", "Export the model again.")
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


def damaged(directory: Path, error: Exception) -> SenteiError:
    """What to say when a runtime cannot load an export."""
    return SenteiError(
        f"{directory} cannot be loaded by ONNX Runtime ({first_line(error)}).", "Export the model again."
    )


def first_line(error: Exception) -> str:
    """The runtime's own reason, short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
