"""Text becomes token windows: the first N consecutive stretches of the tokenised text, in order, not shuffled."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from toolchain import embedded_text
from toolchain.errors import MissingDependencyError, SenteiError

DOCUMENT_SEPARATOR = "\n\n"
_FIRST_GUESS_CHARS_PER_TOKEN = 6


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """Windows of token ids.

    Attributes:
        ids: int64 ``[num_samples, seq_len]``.
        source: Name of the file or the embedded text they come from.
    """

    ids: torch.Tensor
    source: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids as int64 bytes."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()


def load_windows(
    path: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int | None,
    seq_len: int,
    fewer_will_do: bool = False,
) -> TokenWindows:
    """Tokenises text without special tokens and cuts it into windows.

    Only as much of the file is read and tokenised as the windows need.

    Args:
        path: ``.txt`` (as it is), ``.jsonl`` or ``.parquet`` (field ``text``; documents joined by two newlines);
            ``None`` for the text of :mod:`toolchain.embedded_text`.
        tokenizer: The model's own.
        num_samples: How many windows; ``None`` for all there are.
        seq_len: Tokens a window.
        fewer_will_do: Take as many windows as there are, up to ``num_samples``, and at least one.

    Raises:
        SenteiError: Missing file, unknown ending, a record without ``text``, or too few tokens.
    """
    if seq_len < 2 or (num_samples is not None and num_samples < 1):
        raise SenteiError(f"{num_samples} windows of {seq_len} tokens make no sense.", "Use at least 1 of at least 2.")
    needed = None if num_samples is None else num_samples * seq_len
    documents = iter(embedded_text.documents()) if path is None else read_documents(path)
    ids = _tokenize(documents, tokenizer, needed)
    fewest = 1 if num_samples is None or fewer_will_do else num_samples
    if len(ids) < fewest * seq_len:
        wanted = f"{fewest} windows of {seq_len} tokens need {fewest * seq_len}"
        raise SenteiError(
            f"{path or embedded_text.SOURCE} is too short: it has {len(ids)} tokens, and {wanted}.",
            "Give more text, or fewer or shorter windows.",
        )
    count = min(num_samples or len(ids), len(ids) // seq_len)
    windows = torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)
    return TokenWindows(ids=windows, source=embedded_text.SOURCE if path is None else path.name)


def read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a text file one by one.

    Raises:
        SenteiError: Missing file, unknown ending, or a record without a string field ``text``.
        MissingDependencyError: A parquet file, and no pyarrow.
    """
    if not path.is_file():
        raise SenteiError(f"Text file {path} does not exist.")
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SenteiError(f"{path}: unknown kind of text file.", f"Known endings: {', '.join(readers)}.")
    return reader(path)


def _tokenize(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> list[int]:
    """Token ids of the joined documents, at least ``needed`` of them if the text has as many."""
    text, limit = "", None if needed is None else needed * _FIRST_GUESS_CHARS_PER_TOKEN
    while True:
        exhausted = True
        for document in documents:
            text += DOCUMENT_SEPARATOR + document if text else document
            if limit is not None and len(text) >= limit:
                exhausted = False
                break
        # A cut at the end of a document leaves all tokens before it as they would be in the whole text.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if exhausted or (needed is not None and len(ids) > needed + 16):
            return ids
        assert limit is not None
        limit *= 2


def _read_txt(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SenteiError(f"{path} is not UTF-8 text ({error}).") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise SenteiError(f'{path} line {number} is not a JSON object with a field "text".') from error
            if not isinstance(text, str):
                raise SenteiError(f'{path} line {number}: field "text" is not a string.')
            yield text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingDependencyError("pyarrow, which reads parquet,", "eval") from error
    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise SenteiError(f"{path} is not a parquet file ({error}).") from error
    if "text" not in file.schema_arrow.names:
        raise SenteiError(f'{path} has no column "text"; it has {", ".join(file.schema_arrow.names)}.')
    for batch in file.iter_batches(columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)
