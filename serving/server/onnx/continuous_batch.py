"""Continuous batching in plain ONNX Runtime: requests join and leave the batch between any two tokens.

Each request has a row of one KV cache, so decoding reads the weights once for all of them. Prompts are run in pieces,
one between two tokens of the others, so that a long prompt does not hold up the answers that are under way.

A request is let in when a row is free and the cache has memory for all of its tokens, prompt and answer: memory is
never promised twice. What fails in one request ends that one alone. What fails in a step of several rows is tried
again, each row by itself, so that only the one that is at fault ends.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.engines.onnxruntime import Cache, OnnxEngine
from serving.engines.sampling import Sampler
from toolchain.errors import SenteiError, is_panic

_LOG = logging.getLogger("uvicorn.error")
_PROMPT_PIECE = 256  # tokens; logits are float32 [_PROMPT_PIECE, vocab_size]
# Memory comes in pages, which hold 16 tokens of a head with 64 values: requests are counted in blocks of tokens.
_KV_BLOCK = 32


@dataclass(kw_only=True, eq=False)
class BatchRequest:
    """What is to be continued.

    Attributes:
        prompt: Token ids, at least one.
        take: Is given each new token and says whether another is wanted.
        fail: Is told why there will be no more.
        joined: Is called when a row has been given to it.
        sampler: Picks the tokens; its random numbers are this request's own.
        max_tokens: How many tokens it may take; ``None`` is as many as a row holds.
        cancelled: Set it, from any thread, to leave the batch.
    """

    prompt: Sequence[int]
    take: Callable[[int], bool]
    fail: Callable[[Exception], None] = lambda error: None
    joined: Callable[[], None] = lambda: None
    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int | None = None
    cancelled: bool = False


@dataclass(eq=False)
class _Row:
    request: BatchRequest
    waiting: Sequence[int]  # of the prompt
    reserved: int  # tokens of the cache
    token: int = 0  # the latest, which has not been run yet


class OnnxBatch:
    """The rows of one KV cache. One thread at a time may use it; the numbers may be read from any.

    Attributes:
        prompt_tokens: That have been run.
        generation_tokens: That have been given.
        failures: Times that the engine failed, or computed no number, since it last gave a token.
    """

    def __init__(
        self, engine: OnnxEngine, *, max_num_seqs: int, max_model_len: int, kv_tokens: int | None = None
    ) -> None:
        """Allocates the cache; on a CPU the system gives memory only as a row gets longer.

        Args:
            engine: Runs the tokens.
            max_num_seqs: Requests at once.
            max_model_len: Tokens of a request, prompt and answer.
            kv_tokens: Tokens that there is memory for; by default for all rows at their longest.

        Raises:
            SenteiError: The context in which rows do not depend on each other is shorter.
        """
        if max_model_len > engine.batch_context_length:
            raise SenteiError(
                f"{max_model_len} tokens are asked for; a batch's context holds {engine.batch_context_length}."
            )
        self._engine = engine
        self._cache = engine.new_cache(max_num_seqs, max_model_len)
        self._probe_cache: Cache | None = None
        self._rows: list[_Row | None] = [None] * max_num_seqs
        self._prefilling: deque[int] = deque()
        everything = max_num_seqs * _in_blocks(max_model_len)
        self._kv_tokens = everything if kv_tokens is None else min(everything, kv_tokens)
        self.prompt_tokens = self.generation_tokens = self.failures = 0

    @property
    def has_room(self) -> bool:
        """Whether there is a free row."""
        return None in self._rows

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return sum(row is not None for row in self._rows)

    @property
    def kv_usage(self) -> float:
        """The share of the cache's memory that is promised to the requests that have a row."""
        return self._reserved / self._kv_tokens

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not any(self._rows)

    def fits(self, request: BatchRequest) -> bool:
        """Whether a request can join: there is a row, and memory for all that it may come to hold.

        A request that is alone always can.
        """
        return self.has_room and (self.is_empty or self._reserved + self._needed(request) <= self._kv_tokens)

    def join(self, request: BatchRequest) -> None:
        """Takes a request into a free row."""
        index = self._rows.index(None)
        self._rows[index] = _Row(request, request.prompt, self._needed(request))
        self._prefilling.append(index)
        request.joined()

    @property
    def _reserved(self) -> int:
        return sum(row.reserved for row in self._rows if row)

    def _needed(self, request: BatchRequest) -> int:
        most = self._cache.capacity
        tokens = most if request.max_tokens is None else min(most, len(request.prompt) + request.max_tokens)
        return _in_blocks(tokens)

    def probe(self) -> None:
        """Has the engine give a token, beside all requests.

        Raises:
            SenteiError: It refuses, or computes no number.
        """
        if self._probe_cache is None:
            self._probe_cache = self._engine.new_cache(1, 1)
        self._probe_cache.lengths[:] = 0
        self._pick(Sampler(), self._run(self._probe_cache, [[0]])[0][-1])

    def step(self) -> None:
        """Runs a piece of one prompt, then one token of every answer."""
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
            logits = self._run(self._cache.rows(index, index + 1), [piece])[0][-1]
        except Exception as error:  # of this prompt: the others go on
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
        try:
            given = self._run_rows(busy)
        except Exception as error:
            if len(busy) == 1:
                self._end(next(iter(busy)), error)
                return
            _LOG.warning("A step of %d answers failed; each is tried alone.", len(busy), exc_info=error)
            given = self._run_each_alone(busy)
        for index, logits in given.items():
            self._give(index, logits)

    def _run_each_alone(self, busy: Mapping[int, _Row]) -> dict[int, NDArray[np.float32]]:
        """Like :meth:`_run_rows`; ends the requests whose rows fail."""
        given: dict[int, NDArray[np.float32]] = {}
        for index, row in busy.items():
            try:
                given |= self._run_rows({index: row})
            except Exception as error:
                self._end(index, error)
        return given

    def _run_rows(self, busy: Mapping[int, _Row]) -> dict[int, NDArray[np.float32]]:
        """Runs the latest token of some rows, all or none; returns logits, float32 ``[vocab_size]``, by row.

        Raises:
            Exception: The engine fails; the rows are as they were.
        """
        # Rows in between run along with any token. It comes to lie behind their own, where their next one will be.
        first = min(busy)
        cache = self._cache.rows(first, max(busy) + 1)
        lengths = cache.lengths.copy()
        indices = range(first, first + len(lengths))
        logits = self._run(cache, [[busy[index].token if index in busy else 0] for index in indices])
        for place, index in enumerate(indices):
            if index not in busy:
                cache.lengths[place] = lengths[place]
        return {index: logits[place][-1] for place, index in enumerate(indices) if index in busy}

    def _run(self, cache: Cache, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        try:
            return self._engine.step(cache, rows)
        except Exception:
            self.failures += 1
            raise

    def _pick(self, sampler: Sampler, logits: NDArray[np.float32]) -> int:
        try:
            token = sampler.pick(logits)
        except SenteiError:  # no number
            self.failures += 1
            raise
        self.failures = 0
        return token

    def _give(self, index: int, logits: NDArray[np.float32]) -> None:
        row = self._rows[index]
        assert row
        try:
            row.token = self._pick(row.request.sampler, logits)
            self.generation_tokens += 1
            goes_on = row.request.take(row.token)
        except BaseException as error:  # in what is this request's own: the others go on
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            self._end(index, error)
            return
        if not goes_on:
            self._leave(index)

    def _end(self, index: int, error: BaseException) -> None:
        row = self._rows[index]
        assert row
        self._leave(index)
        _LOG.error("A request failed.", exc_info=error)
        row.request.fail(error if isinstance(error, Exception) else RuntimeError("A library panicked."))

    def _leave(self, index: int) -> None:
        self._rows[index] = None
        self._cache.forget(index)
        if index in self._prefilling:
            self._prefilling.remove(index)


def _in_blocks(tokens: int) -> int:
    return -(-tokens // _KV_BLOCK) * _KV_BLOCK
