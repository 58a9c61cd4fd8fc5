"""What pruning does to text a model writes itself, which multiple choice and perplexity hide."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from toolchain.model.loading import end_tokens

PROMPT_TOKENS, NEW_TOKENS = 32, 64
_REPEATED_NGRAM = 4
# Token ids: int64 [num_prompts, prompt_tokens]; or, of several lengths, [prompt_tokens] each.
Prompts = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the original wrote, and how sure it was of every token.

    Attributes:
        continuations: Token ids, one list a prompt, up to :data:`NEW_TOKENS` or with an end-of-sequence token.
        log_probabilities: float32 ``[num_tokens, vocab_size]`` a prompt, on the CPU: the next token's distribution at
            each place of the continuation.
    """

    continuations: list[list[int]]
    log_probabilities: list[torch.Tensor]


def choose_prompts(ids: torch.Tensor, count: int) -> torch.Tensor:
    """Stretches of a text, evenly spaced.

    Args:
        ids: int64 ``[num_windows, seq_len]``.
        count: How many at most; fewer where the text has fewer that do not overlap.

    Returns:
        int64 ``[num_prompts, prompt_tokens]``.
    """
    stretch = ids.flatten()
    length = min(PROMPT_TOKENS, len(stretch))
    count = min(count, len(stretch) // length)
    starts = torch.linspace(0, len(stretch) - length, count, dtype=torch.float64).long().tolist()
    return torch.stack([stretch[start : start + length] for start in starts])


@torch.inference_mode()
def describe_original(model: PreTrainedModel, prompts: Prompts) -> Reference:
    """Lets the original continue the prompts greedily."""
    continuations = continue_greedily(model, prompts)
    return Reference(
        continuations=continuations,
        log_probabilities=next_token_log_probabilities(model, prompts, continuations),
    )


@torch.inference_mode()
def continue_greedily(model: PreTrainedModel, prompts: Prompts) -> list[list[int]]:
    """Token ids after each prompt, up to and with the first end-of-sequence token.

    Args:
        model: Original or pruned.
        prompts: See :data:`Prompts`.
    """
    if not isinstance(prompts, torch.Tensor):
        # One by one: what a prompt is padded with would change what follows it in the last digits.
        return [row for prompt in prompts for row in continue_greedily(model, prompt[None])]
    inputs = prompts.to(model.device)
    ends = end_tokens(model.generation_config)
    written = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        # A checkpoint may carry sampling settings and penalties, which would hide how the model repeats itself.
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=ends[0] if ends else 0,
    )[:, prompts.shape[1] :].tolist()
    return [_until_end(row, ends) for row in written]


@torch.inference_mode()
def next_token_log_probabilities(
    model: PreTrainedModel, prompts: Prompts, continuations: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """The model's distributions along given continuations.

    Args:
        model: Original or pruned.
        prompts: See :data:`Prompts`.
        continuations: Token ids, one sequence a prompt.

    Returns:
        float32 ``[num_tokens, vocab_size]`` on the CPU, one a prompt.
    """
    found = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        ids = torch.cat([prompt, torch.tensor(continuation)])[None].to(model.device)
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.float().log_softmax(-1).cpu())
    return found


def repetition(tokens: Sequence[int]) -> float | None:
    """Share of 4-grams that were there before: seq-rep-4 of Welleck et al. (arXiv 1908.04319).

    ``None`` for a continuation shorter than four tokens.
    """
    grams = _ngrams(tokens, _REPEATED_NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(continuations: Sequence[Sequence[int]], size: int) -> float | None:
    """Different n-grams a generated token, over all continuations: distinct-n of Li et al. (arXiv 1510.03055).

    ``None`` if nothing was generated.
    """
    num_tokens = sum(map(len, continuations))
    grams = {gram for tokens in continuations for gram in _ngrams(tokens, size)}
    return len(grams) / num_tokens if num_tokens else None


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two continuations share before they part."""
    length = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        length += 1
    return length


def divergence(original: torch.Tensor, pruned: torch.Tensor) -> float:
    """Mean KL(original ‖ pruned) in nats per token, from log-probabilities ``[num_tokens, vocab_size]``."""
    return float((original.exp() * (original - pruned)).sum(-1).double().mean())


def agreement(original: torch.Tensor, pruned: torch.Tensor) -> float:
    """Share of places where both would write the same next token, given the original's text so far."""
    return float((original.argmax(-1) == pruned.argmax(-1)).double().mean())


def _ngrams(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
