"""From tokens to the text of an answer, which ends at a token, at a string, or at a length."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_PROMPT_TAIL = 8  # tokens of the prompt that the decoder is told of: some leave out a space where a text begins


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
        self._tokenizer, self._emit, self._tokens_left = tokenizer, emit, max_tokens
        self._stop_ids, self._stop_strings = stop_ids, stop_strings
        self._decoder = DecodeStream(ids=list(prompt[-_PROMPT_TAIL:]), skip_special_tokens=True)
        self._held_length = max(map(len, stop_strings), default=1) - 1
        self._held = ""

    def take(self, token: int) -> bool:
        """Takes the next token; returns whether another is wanted."""
        self._tokens_left -= 1
        if token in self._stop_ids:
            self._finish("stop")
            return False
        self._held += self._decoder.step(self._tokenizer, token) or ""
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
