"""What an engine answers to prompts, and how far that is from what a reference answers: measured, not judged."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from serving.engines.transformers import Engine, top_of

TOP_K = 10
GREEDY_TOKENS = 16
_GREEDY_PROMPTS = 4
# One sensitive token must not decide: after some commas the first choice of a model without its first attention is 9.5
# nats apart in Transformers' own float32 and bfloat16.
_LARGEST_MARGIN = 1.0

Sequences = Sequence[Sequence[int]]


class Reference(Protocol):
    """A model that is taken to be right."""

    def log_probabilities(self, sequences: Sequences) -> Iterable[torch.Tensor]:
        """Log-probabilities after each prefix of each sequence: float32 ``[len(sequence), vocab_size]``, in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an engine said: log-probabilities for each prompt, greedy tokens after the first few (or after none)."""

    log_probabilities: list[list[dict[int, float]]]
    greedy: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How an engine's answers differ from the reference's, in nats.

    Log-probabilities are those of the engine's ten likeliest tokens and of the prompt's actual next one. A margin is
    how much less likely than its own first choice the reference finds the engine's; one token counts as 1 at most.

    Attributes:
        max_difference: Of any log-probability, absolute.
        mean_difference: Of log-probabilities, absolute, on average. Few very sensitive tokens can dominate it.
        median_difference: Of log-probabilities, absolute.
        kl_divergence: Of the engine's next-token distribution from the reference's, on average over positions; all
            tokens but the engine's likeliest count as one, so this is at most the divergence of the whole.
        top1_agreement: Fraction of positions with the same likeliest token.
        choice_margin: Of the engine's likeliest token, on average over the prompts' positions.
        greedy_margin: Of the greedy tokens, on average; ``None`` where there are none.
        greedy_agreement: Fraction of greedy tokens that are the reference's own first choice.
        perplexity_ratio: Perplexity of the prompts' own tokens, over the reference's.
    """

    max_difference: float
    mean_difference: float
    median_difference: float
    kl_divergence: float
    top1_agreement: float
    choice_margin: float
    greedy_margin: float | None
    greedy_agreement: float | None
    perplexity_ratio: float


def ask(engine: Engine, prompts: Sequences) -> Answers:
    """Takes the answers and closes the engine, so that only one model is in memory at a time."""
    try:
        return Answers(
            log_probabilities=engine.top_log_probabilities(prompts, TOP_K),
            greedy=[engine.generate(prompt, GREEDY_TOKENS) for prompt in prompts[:_GREEDY_PROMPTS]],
        )
    finally:
        engine.close()


def answers_of(reference: Reference, prompts: Sequences) -> Answers:
    """What a reference itself answers, without greedy tokens."""
    rows = zip(reference.log_probabilities(prompts), prompts, strict=True)
    return Answers(log_probabilities=[top_of(row, prompt, TOP_K) for row, prompt in rows], greedy=[])


def compare(reference: Reference, prompts: Sequences, *answers: Answers) -> list[Differences]:
    """Measures answers to the same prompts against a reference, which is asked once for all of them.

    Args:
        reference: The model that is taken to be right.
        prompts: Token ids.
        answers: Of one engine each.
    """
    continued = [[[*prompt, *tokens] for prompt, tokens in zip(prompts, each.greedy, strict=False)] for each in answers]
    rows = iter(reference.log_probabilities([*prompts, *(sequence for some in continued for sequence in some)]))
    found = [_Found() for _ in answers]
    for index, prompt in enumerate(prompts):
        expected = next(rows).cpu()
        for each, differences in zip(answers, found, strict=True):
            differences.at_prompt(prompt, expected, each.log_probabilities[index])
    for each, differences in zip(answers, found, strict=True):
        for prompt, tokens in zip(prompts, each.greedy, strict=False):
            differences.after_prompt(tokens, next(rows).cpu()[len(prompt) - 1 : -1])
    return [each.summary() for each in found]


@dataclass
class _Found:
    """What is collected position by position."""

    differences: list[float] = field(default_factory=list)
    surprises: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    choices: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def at_prompt(self, prompt: Sequence[int], expected: torch.Tensor, positions: list[dict[int, float]]) -> None:
        """Compares with float ``[len(prompt), vocab_size]``."""
        for actual, row, found in zip(prompt[1:], expected, positions, strict=False):
            right = dict(zip(found, row[list(found)].tolist(), strict=True))
            self.surprises.append(right[actual] - found[actual])
            self.differences += [abs(value - right[token]) for token, value in found.items()]
            self.divergences.append(_divergence(right, found))
            # A NaN is nobody's first choice, and must not pass for one.
            chosen = max(found, key=found.__getitem__)
            self.choices.append(min(float(row.max()) - right[chosen], _LARGEST_MARGIN))

    def after_prompt(self, tokens: list[int], expected: torch.Tensor) -> None:
        """Looks at greedy tokens, with float ``[len(tokens), vocab_size]``."""
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        self.margins += (expected.max(-1).values - chosen).clamp(max=_LARGEST_MARGIN).tolist()

    def summary(self) -> Differences:
        return Differences(
            max_difference=max(self.differences),
            mean_difference=statistics.fmean(self.differences),
            median_difference=statistics.median(self.differences),
            kl_divergence=statistics.fmean(self.divergences),
            top1_agreement=statistics.fmean(margin == 0 for margin in self.choices),
            choice_margin=statistics.fmean(self.choices),
            greedy_margin=statistics.fmean(self.margins) if self.margins else None,
            greedy_agreement=statistics.fmean(margin == 0 for margin in self.margins) if self.margins else None,
            perplexity_ratio=math.exp(statistics.fmean(self.surprises)),
        )


def _divergence(expected: Mapping[int, float], found: Mapping[int, float]) -> float:
    """KL divergence of ``found`` from ``expected``: log-probabilities of some tokens; all others count as one."""

    def with_rest(of_tokens: Mapping[int, float]) -> list[float]:
        rest = 1 - sum(math.exp(value) for value in of_tokens.values())
        # What is left of 1 in float32 is noise below this.
        return [*(of_tokens[token] for token in expected), math.log(max(rest, 1e-7))]

    return sum(math.exp(p) * (p - q) for p, q in zip(with_rest(expected), with_rest(found), strict=True))
