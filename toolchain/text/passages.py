"""Which passages of a text a pruned model reads worst: its documents, or windows where the text is one document."""

from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from toolchain.text.chats import tokenize_chats
from toolchain.text.sources import DOCUMENT_SEPARATOR, Chat, Text, read_documents, text_name
from toolchain.text.windows import tokenize

# A mean over fewer tokens says little about a document.
_FEWEST_TOKENS = 16
_EXCERPT_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One passage, read by both models.

    Attributes:
        unit: ``document`` or ``window``.
        number: Which one, from 0 on.
        num_tokens: Tokens predicted in it.
        original_loss: Mean negative log-likelihood, nats per token.
        pruned_loss: The same of the pruned model.
        excerpt: How it begins.
    """

    unit: str
    number: int
    num_tokens: int
    original_loss: float
    pruned_loss: float
    excerpt: str

    @property
    def increase(self) -> float:
        """Pruned minus original, nats per token."""
        return self.pruned_loss - self.original_loss


def number_passages(
    text: Text, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor
) -> tuple[Literal["document", "window"], torch.Tensor]:
    """Numbers each token by its document, or by its window if there is but one document or they cannot be told apart.

    Args:
        text: The text that the windows are from, see :func:`toolchain.text.windows.load_windows`.
        tokenizer: The one they were made with.
        windows: Their tokens of the text, int64 ``[num_windows, text_len]``.

    Returns:
        ``document`` or ``window``, and int64 of the windows' shape.
    """
    numbers = torch.arange(len(windows))[:, None].expand_as(windows)
    documents = read_documents(text)
    first = next(documents, "")
    if isinstance(first, Chat):
        return _number_chats(text, tokenizer, windows)
    if not tokenizer.is_fast:
        return "window", numbers
    joined, starts, num_tokens = "", [], 0
    for document in chain([first], documents):
        assert isinstance(document, str)
        joined += DOCUMENT_SEPARATOR if joined else ""
        starts.append(len(joined))
        joined += document
        num_tokens += len(tokenize(iter([document]), tokenizer, windows.numel()))
        if num_tokens >= windows.numel():
            break
    if len(starts) < 2:
        return "window", numbers
    encoded = tokenizer(joined, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    if encoded["input_ids"][: windows.numel()] != windows.flatten().tolist():
        return "window", numbers
    places = torch.tensor([begin for begin, _ in encoded["offset_mapping"][: windows.numel()]])
    return "document", (torch.bucketize(places, torch.tensor(starts), right=True) - 1).view_as(windows)


def _number_chats(
    text: Text, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor
) -> tuple[Literal["document"], torch.Tensor]:
    """See :func:`number_passages`; each chat is a document, and they follow one another without more between them."""
    numbers: list[int] = []
    bos: int | None = None
    chats = (each for each in read_documents(text) if isinstance(each, Chat))
    for number, ids in enumerate(tokenize_chats(chats, tokenizer, text_name(text))):
        if not number and ids[0] != windows[0, 0]:
            bos = ids[0]  # which stands before each window instead
        numbers += [number] * (len(ids) - (bos is not None and ids[0] == bos))
        if len(numbers) >= windows.numel():
            break
    return "document", torch.tensor(numbers[: windows.numel()]).view_as(windows)


def worst_passages(
    unit: str,
    numbers: torch.Tensor,
    windows: torch.Tensor,
    losses: tuple[torch.Tensor, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
) -> list[Passage]:
    """Passages whose loss rose most, the worst first.

    Args:
        unit: From :func:`number_passages`.
        numbers: Likewise.
        windows: Likewise.
        losses: Of the original and the pruned model, ``[num_windows, seq_len - 1]`` each: of all tokens of the text
            where windows begin with a BOS token, and of all but each window's first otherwise.
        tokenizer: The one the windows were made with.
        count: How many at most; those with fewer than 16 tokens are left out, and those that did not get worse.
    """
    of_token, ids = (each[:, -losses[0].shape[1] :].flatten() for each in (numbers, windows))
    sizes = torch.bincount(of_token)
    original, pruned = (torch.bincount(of_token, each.flatten().double()) / sizes for each in losses)
    rise = torch.where(sizes >= _FEWEST_TOKENS, pruned - original, -torch.inf)
    passages = []
    for number in rise.argsort(descending=True)[:count].tolist():
        if rise[number] <= 0:
            break
        beginning = ids[of_token == number][:_EXCERPT_TOKENS]
        passages.append(
            Passage(
                unit=unit,
                number=number,
                num_tokens=int(sizes[number]),
                original_loss=float(original[number]),
                pruned_loss=float(pruned[number]),
                excerpt=tokenizer.decode(beginning).strip(),
            )
        )
    return passages
