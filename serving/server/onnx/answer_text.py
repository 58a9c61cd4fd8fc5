"""From tokens to the text of an answer, which ends at a token, at a string, or at a length."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

_PROMPT_TAIL = 8  # tokens of the prompt that are decoded too: some leave out a space where a text begins
_CHARACTER_BYTES = 4  # at most; a token can be one byte
# What bytes are decoded to that are no character, or not yet one.
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD = 32  # tokens that may wait for the end of a character: a model can go on for ever with bytes that are none


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one token added.

    Attributes:
        text: May be empty: a token can end within a character, or within what may become a stop string.
        finish_reason: Of the last piece; ``stop`` is a token or a string, ``length`` the limit.
    """

    text: str
    finish_reason: Literal["stop", "length"] | None = None


class AnswerText:
    """Decodes the tokens of one answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        stop_strings: Sequence[str],
        emit: Callable[[Piece], None],
    ) -> None:
        """Starts an answer.

        Args:
            tokenizer: Whose tokens they are.
            prompt: What is continued.
            max_tokens: The limit.
            stop_ids: Tokens that end it.
            stop_strings: Strings that end it, and are not in it.
            emit: Is given one piece for each token.
        """
        self._emit, self._tokens_left = emit, max_tokens
        self._stop_ids, self._stop_strings = stop_ids, stop_strings
        self._continuation = _Continuation(tokenizer, prompt)
        self._held_length = max(map(len, stop_strings), default=1) - 1
        self._held = ""

    def take(self, token: int) -> bool:
        """Takes the next token; returns whether another is wanted."""
        self._tokens_left -= 1
        if token in self._stop_ids:
            self._finish("stop")
            return False
        self._held += self._continuation.add(token)
        found = [place for place in map(self._held.find, self._stop_strings) if place >= 0]
        if found:
            self._held = self._held[: min(found)]
            self._finish("stop")
            return False
        if not self._tokens_left:
            self._finish("length")
            return False
        ready = max(0, len(self._held) - self._held_length)
        text, self._held = self._held[:ready], self._held[ready:]
        self._emit(Piece(text=text))
        return True

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._emit(Piece(text=self._held, finish_reason=reason))


class _Continuation:
    """Decodes tokens one by one, as what follows a prompt.

    A tokenizer with byte fallback decodes each run of byte tokens as a whole. One byte that belongs to no character
    turns all of the run into replacement characters, even the part whose text was given before. ``DecodeStream`` of
    tokenizers then raises an error; and if a prompt ends with a replacement character, it returns text of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """Starts after a prompt. Decodes nothing yet: if that fails, it must end this answer alone."""
        self._tokenizer, self._prompt = tokenizer, prompt
        self._context: list[int] = []  # tokens whose text was given, or is the prompt's
        self._given: tuple[str, ...] = ()  # what the context's text may be, the likeliest first
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The text that a token adds; none while it ends within a character."""
        if not self._given:
            self._begin()
        self._new.append(token)
        whole = self._text(self._context + self._new)
        if whole.endswith(_NO_CHARACTER) and len(self._new) < _MOST_HELD:
            return ""
        given = next(filter(whole.startswith, self._given), None)
        # Where the new tokens changed the text before them, they are decoded without it.
        text = self._text(self._new) if given is None else whole[len(given) :]
        if text:
            self._context, self._new = self._new, []
            self._given = (self._text(self._context),)
        return text

    def _begin(self) -> None:
        """Finds a tail of the prompt that begins between two characters.

        If the prompt ends within a character and the answer completes it, the character belongs to the answer.
        """
        for incomplete in range(_CHARACTER_BYTES):
            end = len(self._prompt) - incomplete
            for length in range(_PROMPT_TAIL, _PROMPT_TAIL + _CHARACTER_BYTES):
                begin = max(0, end - length)
                text = self._text(self._prompt[begin:end])
                if not text.endswith(_NO_CHARACTER):
                    self._context = list(self._prompt[begin:])
                    self._given = (self._text(self._context), text)
                    return
        self._context = list(self._prompt[-_PROMPT_TAIL:])
        self._given = (self._text(self._context),)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
