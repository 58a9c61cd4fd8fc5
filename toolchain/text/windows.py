"""Text becomes token windows: the first N consecutive stretches of the tokenised text, in order, not shuffled."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.plan.document import TextSourceRecord
from toolchain.text.chats import tokenize_chats
from toolchain.text.fingerprints import hash_passages, merge_hashes
from toolchain.text.sources import Chat, Text, TextSource, read_joined, text_name

_FIRST_GUESS_CHARS_PER_TOKEN = 6
# Where a text is cut, the last tokens may differ from those of the whole text: of a word that is cut in two and, for a
# tokenizer that knows no words, a few before it.
_CUT_TOKENS = 256
# So many windows of calibration ask for one that is kept apart.
_ONE_APART_FOR = 8
_Kind = TypeVar("_Kind", str, Chat)


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """Windows of token ids.

    Attributes:
        ids: int64 ``[num_samples, seq_len]``. Of a mixture, the first window of every source comes first; the others
            follow in an order that spreads each source evenly.
        bos: The token that each of them begins with and that is not of the text, if there is one.
        holds_chats: Whether some of the text are chats, read through the chat template.
        source: Name of the text, or of the texts of a mixture.
        sources: What each text gave.
        stretches: The windows of each text as they follow one another in it, without the BOS token; int64
            ``[num_windows, text_len]``.
    """

    ids: torch.Tensor
    bos: int | None
    holds_chats: bool
    source: str
    sources: tuple[TextSourceRecord, ...]
    stretches: tuple[torch.Tensor, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids as int64 bytes."""
        return _sha256(self.ids)

    @property
    def passage_hashes(self) -> NDArray[np.uint64]:
        """By which the text is known again, see :mod:`toolchain.text.fingerprints`."""
        return reduce(merge_hashes, (hash_passages(stretch.flatten().numpy()) for stretch in self.stretches))

    @property
    def text_ids(self) -> torch.Tensor:
        """The windows without the BOS token, int64 ``[num_samples, text_len]``."""
        return self.ids if self.bos is None else self.ids[:, 1:]

    @property
    def first_of_each(self) -> torch.Tensor:
        """The first window of every source, int64 ``[num_sources, seq_len]``: what a search measures on."""
        return self.ids[: len(self.sources)]


def load_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, num_samples: int | None, seq_len: int, bos: int | None = None
) -> TokenWindows:
    """Tokenises a text and cuts it into windows, each of which begins as a prompt does where the model is served.

    Only as much of it is read and tokenised as the windows need.

    Args:
        text: See :func:`toolchain.text.sources.read_joined`; documents are joined by two newlines, and chats follow
            one another as their template ends and begins them.
        tokenizer: The model's own.
        num_samples: How many windows; ``None`` for all there are.
        seq_len: Tokens a window.
        bos: The first of them, see :func:`toolchain.model.loading.bos_of`; ``None`` if all are of the text. Windows of
            chats begin with it if the chat template begins with it.

    Raises:
        SenteiError: Missing or damaged text, or too few tokens.
    """
    _check_sizes(num_samples, seq_len)
    return _together([TextSource(text)], [_cut(text, tokenizer, num_samples, seq_len, bos, fewest=num_samples or 1)])


def _text_len(seq_len: int, bos: int | None) -> int:
    """How many tokens of a window are of the text."""
    return seq_len if bos is None else seq_len - 1


def begin_with(bos: int | None, ids: torch.Tensor) -> torch.Tensor:
    """Rows of token ids, each with ``bos`` in front unless it is ``None``."""
    return ids if bos is None else torch.cat([ids.new_full((len(ids), 1), bos), ids], dim=1)


def load_mixture(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    bos: int | None = None,
    fewer_will_do: bool = False,
) -> TokenWindows:
    """Windows from several texts, of each as many as its weight says, see :func:`split_by_weight`.

    Args:
        sources: None of them is the text of :mod:`toolchain.text.embedded`.
        tokenizer: The model's own.
        num_samples: How many windows in all.
        seq_len: Tokens a window.
        bos: See :func:`load_windows`.
        fewer_will_do: Take as many windows as there are in these proportions, up to ``num_samples``.

    Raises:
        SenteiError: Missing or damaged text, one too short for its share, or with a share of less than a window.
    """
    _check_sizes(num_samples, seq_len)
    sources = sources or [TextSource(None)]
    weights = [source.weight for source in sources]
    counts = split_by_weight(weights, num_samples)
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise SenteiError(
                f"{text_name(source.text)} gets none of {num_samples} windows at weight {source.weight:g}.",
                "Raise its weight, or take more windows.",
            )
    found = [
        _cut(source.text, tokenizer, count, seq_len, bos, fewest=1 if fewer_will_do else count)
        for source, count in zip(sources, counts, strict=True)
    ]
    if fewer_will_do:
        counts = _within(weights, [len(each.ids) for each in found], num_samples)
        found = [replace(each, ids=each.ids[:count]) for each, count in zip(found, counts, strict=True)]
    return _together(sources, found)


def windows_apart(
    sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, windows: TokenWindows
) -> tuple[torch.Tensor, tuple[TextSourceRecord, ...]]:
    """Windows that follow those of :func:`load_mixture` in each text: what nothing was scored on or fitted to.

    Args:
        sources: As for the mixture.
        tokenizer: The same.
        windows: What the mixture gave.

    Returns:
        int64 ``[num_windows, seq_len]``, text after text: one for each eight of the mixture's, at least one of each
        text. And what each text gave.

    Raises:
        SenteiError: A text is too short.
    """
    found = []
    for source, given in zip(sources or [TextSource(None)], windows.sources, strict=True):
        extra = -(-given.num_windows // _ONE_APART_FOR)
        try:
            more = load_windows(
                source.text,
                tokenizer,
                num_samples=given.num_windows + extra,
                seq_len=windows.ids.shape[1],
                bos=windows.bos,
            )
        except SenteiError as error:
            raise SenteiError(
                f"A limit is checked on text of its own, {extra} windows after the {given.num_windows} of calibration: "
                f"{error.message}",
                error.hint,
            ) from error
        found.append((given, more.ids[given.num_windows :]))
    records = tuple(
        TextSourceRecord(source=each.source, weight=each.weight, num_windows=len(ids), sha256=_sha256(ids))
        for each, ids in found
    )
    return torch.cat([ids for _, ids in found]), records


def split_by_weight(weights: Sequence[float], count: int) -> list[int]:
    """Splits ``count`` in proportion to ``weights`` by largest remainder (Hamilton's method); ties to the first."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(each) for each in exact]
    by_remainder = sorted(range(len(weights)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: count - sum(shares)]:
        shares[place] += 1
    return shares


def _within(weights: Sequence[float], available: Sequence[int], most: int) -> list[int]:
    """The largest split that no text is too short for, and with something of each."""
    for count in range(min(most, sum(available)), 0, -1):
        shares = split_by_weight(weights, count)
        if all(1 <= share <= limit for share, limit in zip(shares, available, strict=True)):
            return shares
    raise SenteiError(
        "One of the texts is too short for its weight: it does not have a window for any number of windows.",
        "Give more of it, or shorter windows.",
    )


def _check_sizes(num_samples: int | None, seq_len: int) -> None:
    if seq_len < 2 or (num_samples is not None and num_samples < 1):
        raise SenteiError(f"{num_samples} windows of {seq_len} tokens make no sense.", "Use at least 1 of at least 2.")


@dataclass(frozen=True, kw_only=True)
class _Stretches:
    """What one text gave: see :class:`TokenWindows`. ``ids`` are int64 ``[num_windows, text_len]``, without BOS."""

    ids: torch.Tensor
    bos: int | None
    holds_chats: bool


def _cut(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int | None,
    seq_len: int,
    bos: int | None,
    *,
    fewest: int,
) -> _Stretches:
    """Up to ``num_samples`` windows of ``seq_len`` tokens with BOS, ``None`` for all; at least ``fewest``."""
    pieces = read_joined(text)
    first = next(pieces, "")
    together = chain([first], pieces)
    if holds_chats := isinstance(first, Chat):
        chats = tokenize_chats(_of_one_kind(together, Chat, text), tokenizer, text_name(text))
        begin = next(chats)
        bos = bos if begin[:1] == [bos] else None
    length = _text_len(seq_len, bos)
    needed = None if num_samples is None else num_samples * length
    if holds_chats:
        ids = _join_chats(chain([begin], chats), bos, needed)
    else:
        ids = tokenize(_of_one_kind(together, str, text), tokenizer, needed)
    if len(ids) < fewest * length:
        wanted = f"{fewest} windows of {length} tokens need {fewest * length}"
        raise SenteiError(
            f"{text_name(text)} is too short: it has {len(ids)} tokens, and {wanted}.",
            "Give more text, or fewer or shorter windows.",
        )
    count = min(num_samples or len(ids), len(ids) // length)
    stretches = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    return _Stretches(ids=stretches, bos=bos, holds_chats=holds_chats)


def _of_one_kind(pieces: Iterable[str | Chat], kind: type[_Kind], text: Text) -> Iterator[_Kind]:
    """The pieces, all of them text or all of them chats."""
    for piece in pieces:
        if not isinstance(piece, kind):
            raise SenteiError(
                f"{text_name(text)} holds both texts and chats.",
                "Give them as two texts: one does not read as the other.",
            )
        yield piece


def _join_chats(chats: Iterable[list[int]], bos: int | None, needed: int | None) -> list[int]:
    """Token ids of chats in a row, each without BOS in front; at least ``needed`` of them if there are as many."""
    joined: list[int] = []
    for ids in chats:
        joined += ids[1:] if bos is not None and ids[:1] == [bos] else ids
        if needed is not None and len(joined) >= needed:
            break
    return joined


def _together(sources: Sequence[TextSource], found: Sequence[_Stretches]) -> TokenWindows:
    """The windows of several sources in the order of :class:`TokenWindows`."""
    bos = found[0].bos
    if any(each.bos != bos for each in found):
        raise SenteiError(
            "Texts begin with BOS and chats do not, by the model's tokenizer and its chat template.",
            "Give either texts or chats.",
        )
    stretches = [each.ids for each in found]
    windows = [begin_with(bos, stretch) for stretch in stretches]
    others = sorted(
        ((window + 0.5) / len(ids), number, window)
        for number, ids in enumerate(windows)
        for window in range(1, len(ids))
    )
    order = [*((number, 0) for number in range(len(windows))), *((number, window) for _, number, window in others)]
    total = sum(source.weight for source in sources)
    names = [text_name(source.text) for source in sources]
    return TokenWindows(
        ids=torch.stack([windows[number][window] for number, window in order]),
        bos=bos,
        holds_chats=any(each.holds_chats for each in found),
        source=" + ".join(names),
        sources=tuple(
            TextSourceRecord(source=name, weight=source.weight / total, num_windows=len(ids), sha256=_sha256(ids))
            for name, source, ids in zip(names, sources, windows, strict=True)
        ),
        stretches=tuple(stretches),
    )


def _sha256(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def tokenize(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> list[int]:
    """The first tokens of a text, and no more of it is read and tokenised than they need.

    Args:
        pieces: Of the text, one after the other.
        tokenizer: The model's own.
        needed: How many tokens; ``None`` for all.

    Returns:
        At least ``needed`` token ids if the text has as many; the first ``needed`` are those of the whole text.
    """
    if needed is None:
        return _encode(tokenizer, "".join(pieces))
    text, limit = "", (needed + _CUT_TOKENS) * _FIRST_GUESS_CHARS_PER_TOKEN
    while True:
        while len(text) <= limit and (piece := next(pieces, None)) is not None:
            text += piece
        ids = _encode(tokenizer, text[:limit])
        if len(text) <= limit or len(ids) >= needed + _CUT_TOKENS:
            return ids
        limit *= 2


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
