"""Where text comes from: files, directories, data sets of the Hugging Face hub, or what ships with Python."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from toolchain.errors import MissingDependencyError, SenteiError, is_out_of_memory, reason_of
from toolchain.json_files import read_json_lines
from toolchain.text import embedded

_HUB = "hub:"
# With or without the mark that some editors put in front.
_ROW_HINT = 'Each line must be a JSON object with a field "text" or "messages".'
_PARQUET_ROWS = 1000
# What is read of a plain text file at a time.
_PIECE_CHARS = 2**16
DOCUMENT_SEPARATOR = "\n\n"
# A row may be a whole book, or all of a company's minutes.
_LONGEST_ROW = 64 * 1024 * 1024
UTF8 = "utf-8-sig"


@dataclass(frozen=True)
class HubDataset:
    """A data set that the ``datasets`` library reads, row after row, so that no more is downloaded than is used.

    Attributes:
        name: On the hub, such as ``wikimedia/wikipedia``; or a directory that holds a copy of one.
        config: One of its configurations, such as ``20231101.ja``; ``None`` for the only one.
        split: Such as ``train``.
    """

    name: str
    config: str | None = None
    split: str = "train"


# A file or directory; a data set of the hub; None for the text of toolchain.text.embedded.
Text = Path | HubDataset | None


@dataclass(frozen=True)
class Chat:
    """A conversation as OpenAI's API and the field's training data have it.

    Attributes:
        messages: Each with a ``role``, and what else the chat template knows, such as ``content``.
        tools: What the model could call; likewise.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TextSource:
    """One text of a mixture; ``weight`` is relative to the others'."""

    text: Text
    weight: float = 1.0


def parse_text(given: str) -> Text:
    """What a person means by ``PATH`` or ``hub:NAME[:CONFIG[:SPLIT]]``.

    Raises:
        SenteiError: It is empty, or begins with ``hub:`` and goes on in another way.
    """
    if not given.strip():
        # As a path it would be the working directory, with every text file below it.
        raise SenteiError("A text is empty.", "Give a file, a directory, or hub:NAME.")
    if not given.startswith(_HUB):
        return Path(given)
    name, *more = given.removeprefix(_HUB).split(":")
    if not name or len(more) > 2:
        raise SenteiError(
            f"{given!r} names no data set.", "Write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT, split train."
        )
    config, split = (*more, "", "")[:2]
    return HubDataset(name, config or None, split or "train")


def parse_sources(given: Sequence[str]) -> tuple[TextSource, ...]:
    """What a person means by several texts, each with a weight or none: ``0.5:ja.txt``.

    The weight stands in front: a number before a colon is no drive letter, no ``hub:`` and no name on the hub.

    Raises:
        SenteiError: A weight is not above 0 or not finite, only some have one, or a text is given twice.
    """
    weights, texts = zip(*map(_split_weight, given), strict=True) if given else ((), ())
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        without = given[weights.index(None)]
        raise SenteiError(f"{without} has no weight, and other texts have.", "Give each text a weight, or none.")
    if repeated := [text for text in texts if texts.count(text) > 1]:
        raise SenteiError(f"{text_name(repeated[0])} is given twice.", "Give it once, with a higher weight.")
    return tuple(
        TextSource(text, 1.0 if weight is None else weight) for weight, text in zip(weights, texts, strict=True)
    )


def _split_weight(given: str) -> tuple[float | None, Text]:
    before, colon, text = given.partition(":")
    try:
        weight = float(before) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        return None, parse_text(given)
    if not 0 < weight < math.inf:
        raise SenteiError(f"{given}: weight {before} makes no sense.", "Give a number above 0, as in 0.5:text.txt.")
    if not text.strip():
        raise SenteiError(f"{given!r} is a weight without a text.", "Write it as in 0.5:text.txt.")
    return weight, parse_text(text)


def text_name(text: Text) -> str:
    """What plans and reports call it: never the path of a file, which may be private."""
    if text is None:
        return embedded.SOURCE
    if isinstance(text, Path):
        return text.resolve().name
    return ":".join((text.name, text.config or "", text.split)) if text.config else f"{text.name}:{text.split}"


def local_paths(texts: Iterable[Text]) -> list[Path]:
    """Files and directories that texts are read from: what no command may replace by its output."""
    given = [text if isinstance(text, Path) else Path(text.name) for text in texts if text is not None]
    return [path for path in given if path.exists()]


def read_documents(text: Text) -> Iterator[str | Chat]:
    """Yields a text's documents one by one: ``.txt`` as it is, ``.jsonl``, ``.parquet`` and rows by field.

    A record's field ``text`` is a document. Where there is none, ``messages`` are a chat, with ``tools`` if there are.

    Raises:
        SenteiError: Missing, of an unknown kind, or a record without a string ``text`` and without ``messages``.
        MissingDependencyError: A parquet file without pyarrow, or a data set without datasets.
    """
    if text is None:
        return iter(embedded.documents())
    if isinstance(text, HubDataset):
        return _read_hub(text)
    files = text_files(text)
    return (document for file in files for document in _READERS[file.suffix.lower()](file))


def read_joined(text: Text) -> Iterator[str | Chat]:
    """Yields chats one by one, or pieces that make up the text's documents, joined by two newlines.

    No more of a plain text file is read than is asked for: it may hold a whole corpus.

    Raises:
        SenteiError: See :func:`read_documents`.
    """
    is_empty = True
    for document in _documents_in_pieces(text):
        begins = True
        for piece in document:
            if isinstance(piece, str):
                if begins and not is_empty:
                    yield DOCUMENT_SEPARATOR
                begins, is_empty = False, is_empty and not piece
            yield piece


def _documents_in_pieces(text: Text) -> Iterator[Iterable[str | Chat]]:
    for file in text_files(text) if isinstance(text, Path) else [None]:
        if file is not None and _READERS[file.suffix.lower()] is _read_txt:
            yield _txt_pieces(file)
        else:
            yield from ([document] for document in read_documents(file or text))


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files in a directory and below, by name.

    Raises:
        SenteiError: There is none, or a directory cannot be read, so that some would be missing.
    """
    known = ", ".join(_READERS)
    if path.is_dir():
        below = (Path(folder, name) for folder, _, names in os.walk(path, onerror=_refuse_folder) for name in names)
        files = sorted(file for file in below if file.is_file() and file.suffix.lower() in _READERS)
        if not files:
            raise SenteiError(f"Directory {path} holds no text file.", f"Known endings: {known}.")
        return files
    if not path.is_file():
        raise SenteiError(f"Text file {path} does not exist.", f"A data set of the hub is written {_HUB}NAME.")
    if path.suffix.lower() not in _READERS:
        raise SenteiError(f"{path}: unknown kind of text file.", f"Known endings: {known}.")
    return [path]


def _refuse_folder(error: OSError) -> NoReturn:
    raise SenteiError(
        f"Directory {error.filename} of texts cannot be read ({error.strerror}).", "Make it readable, or leave it out."
    ) from error


@contextmanager
def utf8_expected(path: Path) -> Iterator[None]:
    """Says in one sentence that a file, which is read meanwhile, is not UTF-8.

    Raises:
        SenteiError: It is not.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise SenteiError(f"{path} is not UTF-8 text ({error}).") from error


def _read_txt(path: Path) -> Iterator[str | Chat]:
    yield "".join(_txt_pieces(path))


def _txt_pieces(path: Path) -> Iterator[str]:
    """A plain text file from its beginning; one empty piece of an empty one."""
    with utf8_expected(path), path.open(encoding=UTF8) as file:
        yield file.read(_PIECE_CHARS)
        while piece := file.read(_PIECE_CHARS):
            yield piece


def _read_jsonl(path: Path) -> Iterator[str | Chat]:
    for where, row in read_json_lines(path, hint=_ROW_HINT, max_bytes=_LONGEST_ROW):
        if not isinstance(row, dict) or not row.keys() & {"text", "messages"}:
            raise SenteiError(f'{where} is not a JSON object with a field "text" or "messages".')
        if "text" not in row:
            yield _chat(where, row)
            continue
        if not isinstance(row["text"], str):
            raise SenteiError(f'{where}: field "text" is not a string.')
        yield row["text"]


def _chat(where: str, row: dict[str, Any]) -> Chat:
    messages, tools = row["messages"], row.get("tools") or None
    if not isinstance(messages, list) or not messages:
        raise SenteiError(f'{where}: field "messages" is not a list of messages.')
    if not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages):
        raise SenteiError(f'{where}: a message is not an object with a "role", such as user, and "content".')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) for each in tools)):
        raise SenteiError(f'{where}: field "tools" is not a list of objects.')
    # Tables have a null where a message has no such field.
    return Chat(
        [{key: each[key] for key in each if each[key] is not None or key == "content"} for each in messages], tools
    )


def _read_parquet(path: Path) -> Iterator[str | Chat]:
    try:
        from pyarrow import types
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingDependencyError("pyarrow, which reads parquet,", "eval") from error
    try:
        file = ParquetFile(path)
        schema = file.schema_arrow
        if "text" not in schema.names and "messages" in schema.names:
            columns = [name for name in ("messages", "tools") if name in schema.names]
            for number, row in enumerate(_rows(file, columns), 1):
                yield _chat(f"{path} row {number}", row)
            return
        if "text" not in schema.names:
            raise SenteiError(f'{path} has no column "text" or "messages"; it has {", ".join(schema.names)}.')
        kind = schema.field("text").type
        values = kind.value_type if types.is_dictionary(kind) else kind  # as pandas writes categories
        if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
            raise SenteiError(f'{path}: column "text" holds {kind}, not texts.')
        yield from (row["text"] for row in _rows(file, ["text"]) if row["text"] is not None)
    except (SenteiError, GeneratorExit):
        raise
    # Arrow's own errors, those of each compression, and of texts that are not UTF-8 have no common class.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SenteiError(f"{path} is not a parquet file, or damaged ({reason_of(error)}).") from error


def _rows(file: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file that pyarrow has opened."""
    return (row for batch in file.iter_batches(columns=columns, batch_size=_PARQUET_ROWS) for row in batch.to_pylist())


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_hub(data: HubDataset) -> Iterator[str | Chat]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError("datasets, which reads data sets of the hub,", "eval") from error
    where = f"Data set {text_name(data)}"
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(data.name, data.config, split=data.split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = row.get("text")
            if text is None and "messages" in row:
                yield _chat(f"{where} row {number}", row)
                continue
            if not isinstance(text, str):
                raise SenteiError(f'{where} has no column "text" of strings; it has {", ".join(row)}.')
            yield text
    except SenteiError:
        raise
    # Of no common class: the library's own errors, those of the hub's client, of HTTP, and of each file's reader.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SenteiError(f"{where} cannot be read: {reason[0]}", "It is written hub:NAME:CONFIG:SPLIT.") from error
