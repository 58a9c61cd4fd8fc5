"""How the next token of an answer is picked."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from toolchain.errors import SenteiError

# Below, logits would overflow; vLLM takes the likeliest token, too.
_SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: Sample among the likeliest tokens that together have this probability.
        top_k: Sample among this many; 0 is all.
        seed: Of the random numbers; ``None`` is another every time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            SenteiError: A number is out of range.
        """
        if not 0 <= self.temperature <= 2:
            raise SenteiError(f"temperature {self.temperature} is not between 0 and 2.")
        if not 0 < self.top_p <= 1:
            raise SenteiError(f"top_p {self.top_p} is not above 0 and at most 1.")
        if self.top_k < 0:
            raise SenteiError(f"top_k {self.top_k} is negative; 0 is all tokens.")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, and not the likeliest taken."""
        return self.temperature >= _SMALLEST_TEMPERATURE


GREEDY = Sampling()
NOT_A_NUMBER = "The model computes NaN in place of a next token: its weights or its config.json are damaged."


class Sampler:
    """Picks the tokens of one answer."""

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        """Starts the random numbers."""
        self._draws = sampling.draws
        if not self._draws:
            return
        self._warpers = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits float32 ``[vocab_size]``.

        Raises:
            SenteiError: A logit is no number.
        """
        if math.isnan(logits.max()):
            raise SenteiError(NOT_A_NUMBER)
        if not self._draws:
            return int(logits.argmax())
        scores = torch.from_numpy(logits)[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._random))
