"""What every engine can do, and the Transformers engine, the reference that the others are compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from toolchain.model.loading import CACHE_ARGUMENT, load_model


class Engine(Protocol):
    """A loaded model that answers token ids with log-probabilities or greedy tokens."""

    name: str

    def top_log_probabilities(self, prompts: Sequence[Sequence[int]], k: int) -> list[list[dict[int, float]]]:
        """Teacher-forced log-probabilities (natural logarithm).

        Args:
            prompts: Token ids of each prompt.
            k: How many of the likeliest next tokens to return.

        Returns:
            For each prompt and each position ``p`` from 0 to ``len(prompt) - 2``: the engine's ``k`` likeliest tokens
            after ``prompt[: p + 1]`` with their log-probabilities, and the one of ``prompt[p + 1]`` itself.
        """
        ...

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy tokens after ``prompt``, exactly ``max_new_tokens`` of them (end-of-sequence is ignored)."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


class TransformersEngine:
    """A checkpoint, pruned or not, in Transformers."""

    name = "transformers"

    def __init__(self, directory: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        """Loads the checkpoint; see :func:`toolchain.model.loading.load_model`."""
        self.model = load_model(directory, dtype=dtype, device=device)

    @torch.inference_mode()
    def log_probabilities(self, prompt: Sequence[int]) -> torch.Tensor:
        """Log-probabilities after each prefix of ``prompt``: float32 ``[len(prompt), vocab_size]``."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        return self.model(ids, use_cache=False).logits[0].float().log_softmax(-1)

    def top_log_probabilities(self, prompts: Sequence[Sequence[int]], k: int) -> list[list[dict[int, float]]]:
        """See :class:`Engine`."""
        return [top_of(self.log_probabilities(prompt), prompt, k) for prompt in prompts]

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """See :class:`Engine`."""
        # Not Transformers' own generate: told to go on, it forbids the end-of-sequence token instead of ignoring it.
        tokens: list[int] = []
        cache, step = None, list(prompt)
        while len(tokens) < max_new_tokens:
            ids = torch.tensor([step], device=self.model.device)
            out = self.model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
            cache, step = out[CACHE_ARGUMENT], [int(out.logits[0, -1].argmax())]
            tokens += step
        return tokens

    def close(self) -> None:
        """See :class:`Engine`."""
        del self.model


def top_of(log_probabilities: torch.Tensor, prompt: Sequence[int], k: int) -> list[dict[int, float]]:
    """Picks what :meth:`Engine.top_log_probabilities` returns out of float32 ``[len(prompt), vocab_size]``."""
    picked = []
    for position in range(len(prompt) - 1):
        row = log_probabilities[position]
        top = row.topk(k)
        entry = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        entry[prompt[position + 1]] = float(row[prompt[position + 1]])
        picked.append(entry)
    return picked
