"""Continuous batching in plain ONNX Runtime: requests join and leave the batch between any two tokens.

Each request has a row of one KV cache, so decoding reads the weights once for all of them. Prompts are run in pieces,
one between two tokens of the others, so that a long prompt does not hold up the answers that are under way.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.engines.onnxruntime import OnnxEngine
from serving.engines.sampling import Sampler
from toolchain.errors import SenteiError

_PROMPT_PIECE = 256  # tokens; logits are float32 [_PROMPT_PIECE, vocab_size]


@dataclass(kw_only=True, eq=False)
class BatchRequest:
    """What is to be continued.

    Attributes:
        prompt: Token ids, at least one.
        take: Is given each new token and says whether another is wanted.
        fail: Is told why there will be no more.
        sampler: Picks the tokens; its random numbers are this request's own.
        cancelled: Set it, from any thread, to leave the batch.
    """

    prompt: Sequence[int]
    take: Callable[[int], bool]
    fail: Callable[[Exception], None] = lambda error: None
    sampler: Sampler = field(default_factory=Sampler)
    cancelled: bool = False


@dataclass(eq=False)
class _Row:
    request: BatchRequest
    waiting: Sequence[int]  # of the prompt
    token: int = 0  # the latest, which has not been run yet


class OnnxBatch:
    """The rows of one KV cache. One thread at a time may use it."""

    def __init__(self, engine: OnnxEngine, *, max_num_seqs: int, max_model_len: int) -> None:
        """Allocates the cache; on a CPU the system gives memory only when a row gets that long.

        Args:
            engine: Runs the tokens.
            max_num_seqs: Requests at once.
            max_model_len: Tokens of a request, prompt and answer.

        Raises:
            SenteiError: The context in which rows do not depend on each other is shorter.
        """
        if max_model_len > engine.batch_context_length:
            raise SenteiError(
                f"{max_model_len} tokens are asked for; a batch's context holds {engine.batch_context_length}."
            )
        self._engine = engine
        self._cache = engine.new_cache(max_num_seqs, max_model_len)
        self._rows: list[_Row | None] = [None] * max_num_seqs
        self._prefilling: deque[int] = deque()
        self.prompt_tokens = self.generation_tokens = 0  # that have been run, and given

    @property
    def has_room(self) -> bool:
        """Whether another request can join."""
        return None in self._rows

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not any(self._rows)

    def join(self, request: BatchRequest) -> None:
        """Takes a request into a free row."""
        index = self._rows.index(None)
        self._rows[index] = _Row(request, request.prompt)
        self._prefilling.append(index)

    def step(self) -> None:
        """Runs a piece of one prompt, then one token of every answer.

        Raises:
            SenteiError: ONNX Runtime refuses.
        """
        for index, row in enumerate(self._rows):
            if row and row.request.cancelled:
                self._leave(index)
        if self._prefilling:
            self._prefill(self._prefilling[0])
        self._decode()

    def fail(self, error: Exception) -> None:
        """Ends every request."""
        for index, row in enumerate(self._rows):
            if row:
                self._end(index, error)

    def _prefill(self, index: int) -> None:
        row = self._rows[index]
        assert row
        piece, row.waiting = row.waiting[:_PROMPT_PIECE], row.waiting[_PROMPT_PIECE:]
        try:
            logits = self._engine.step(self._cache.rows(index, index + 1), [piece])[0][-1]
        except SenteiError as error:
            self._end(index, error)
            return
        self.prompt_tokens += len(piece)
        if not row.waiting:
            self._prefilling.popleft()
            self._give(index, logits)

    def _decode(self) -> None:
        busy = {index: row for index, row in enumerate(self._rows) if row and not row.waiting}
        if not busy:
            return
        # Rows in between run along with any token. It comes to lie behind their own, where their next one will be.
        cache = self._cache.rows(0, max(busy) + 1)
        lengths = cache.lengths.copy()
        tokens = [[busy[index].token if index in busy else 0] for index in range(len(lengths))]
        logits = self._engine.step(cache, tokens)
        for index in range(len(lengths)):
            if index in busy:
                self._give(index, logits[index][-1])
            else:
                cache.lengths[index] = lengths[index]

    def _give(self, index: int, logits: NDArray[np.float32]) -> None:
        row = self._rows[index]
        assert row
        try:
            row.token = row.request.sampler.pick(logits)
            self.generation_tokens += 1
            goes_on = row.request.take(row.token)
        except Exception as error:  # in what is this request's own: the others go on
            self._end(index, error)
            return
        if not goes_on:
            self._leave(index)

    def _end(self, index: int, error: Exception) -> None:
        row = self._rows[index]
        assert row
        self._leave(index)
        row.request.fail(error)

    def _leave(self, index: int) -> None:
        self._rows[index], self._cache.lengths[index] = None, 0
        if index in self._prefilling:
            self._prefilling.remove(index)
