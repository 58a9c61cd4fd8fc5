"""EvoPress (arXiv 2410.14649) for depth pruning: which attentions and FFNs go is found by evolution.

The numbers are those of the paper's public code (``evo_drop_search.py``). That rounds the number of blocks down where
we round it up, and may read a part of a calibration window where we read all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import torch

from toolchain.architecture.parts import PARTS, SubBlock, layers_of
from toolchain.metrics.token_metrics import KLDivergence, finite
from toolchain.model.layer_walk import LayerWalk
from toolchain.prune.search.candidates import last_states

Removed = frozenset[SubBlock]
# Fitnesses, lower is better, of several models on the calibration windows with these numbers.
Fitness = Callable[[Sequence[Removed], Sequence[int]], list[float]]

_MAX_SWITCHES = 3
# So many draws in vain, on average for each model wanted, and there are no more to be found.
_DRAWS_PER_MODEL = 50


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is tried.

    Attributes:
        generations_divisor: Of n layers, k lose their attention and k their FFN; k (n - k) by this is how many
            generations there are.
        initially_generated: Random models to begin with.
        offspring: Mutations a generation.
        survivors: Of the first selection of a generation; of the second, one survives.
        tokens: Read in the first and in the second selection.
    """

    generations_divisor: float
    initially_generated: int
    offspring: int
    survivors: int
    tokens: tuple[int, int]

    def generations(self, num_layers: int, num_blocks: int) -> int:
        """How many generations there are."""
        return max(1, int(num_blocks * (num_layers - num_blocks) / self.generations_divisor))


BUDGETS = {
    "paper": Budget(generations_divisor=1.5, initially_generated=64, offspring=32, survivors=2, tokens=(2048, 32768)),
    "small": Budget(generations_divisor=6, initially_generated=16, offspring=8, survivors=2, tokens=(2048, 8192)),
}


@dataclass(frozen=True, kw_only=True)
class Best:
    """The model that survived a generation; generation 0 is the random start."""

    generation: int
    removed: Removed
    fitness: float


def evolve(
    fitness: Fitness,
    budget: Budget,
    *,
    num_layers: int,
    num_blocks: int,
    window_tokens: int,
    num_windows: int,
    seed: int,
    after: tuple[int, Removed] | None = None,
) -> Iterator[Best]:
    """Evolves which ``num_blocks`` attentions and ``num_blocks`` FFNs are gone (algorithm 1 with one parent).

    Args:
        fitness: KL divergence from the unpruned model.
        budget: How much is tried.
        num_layers: Of the model.
        num_blocks: How many attentions go, and how many FFNs.
        window_tokens: Tokens of a calibration window.
        num_windows: How many windows there are; each selection draws its own.
        seed: Of the draws. Each generation has its own, so that it can be resumed.
        after: The generation to go on from and its best, instead of the random start.

    Yields:
        The best of each generation.
    """

    def select(generation: Random, models: Sequence[Removed], tokens: int, count: int) -> list[tuple[float, Removed]]:
        chosen = generation.sample(range(num_windows), max(1, min(num_windows, tokens // window_tokens)))
        scored = zip(fitness(models, chosen), models, strict=True)
        return sorted(scored, key=lambda pair: pair[0])[:count]

    if after is None:
        draw = _generation(seed, 0)
        start = _distinct(budget.initially_generated, partial(random_removal, draw, num_layers, num_blocks))
        [(value, parent)] = select(draw, start, budget.tokens[0], 1)
        last = 0
        yield Best(generation=0, removed=parent, fitness=value)
    else:
        last, parent = after
    for number in range(last + 1, budget.generations(num_layers, num_blocks) + 1):
        draw = _generation(seed, number)
        offspring = _distinct(budget.offspring, partial(mutate, draw, parent, num_layers), but=parent)
        survivors = [model for _, model in select(draw, offspring, budget.tokens[0], budget.survivors)]
        [(value, parent)] = select(draw, [*survivors, parent], budget.tokens[1], 1)
        yield Best(generation=number, removed=parent, fitness=value)


def random_removal(draw: Random, num_layers: int, num_blocks: int) -> Removed:
    """Attentions of ``num_blocks`` random layers, and FFNs of as many."""
    return frozenset(SubBlock(layer, part) for part in PARTS for layer in draw.sample(range(num_layers), num_blocks))


def mutate(draw: Random, parent: Removed, num_layers: int) -> Removed:
    """Level-switch mutation: one to three times, a removed part comes back and one of the same kind goes instead.

    The number of switches is the smaller of two draws, so that few are likelier than many.
    """
    removed = set(parent)
    for _ in range(min(draw.randint(1, _MAX_SWITCHES), draw.randint(1, _MAX_SWITCHES))):
        part = draw.choice(PARTS)
        gone = layers_of(part, removed)
        back = SubBlock(draw.choice(gone), part)
        goes = SubBlock(draw.choice([layer for layer in range(num_layers) if layer not in gone]), part)
        removed = removed - {back} | {goes}
    return frozenset(removed)


class KLFitness:
    """Mean KL divergence of the next token's distribution from the unpruned model's, in nats: the paper's fitness."""

    def __init__(self, walk: LayerWalk, windows: torch.Tensor) -> None:
        """Takes calibration windows, int64 ``[num_samples, seq_len]``; ``walk`` stays unpruned."""
        self._walk = walk
        self._metrics = [KLDivergence(window) for window in windows.split(1)]

    @torch.inference_mode()
    def __call__(self, models: Sequence[Removed], windows: Sequence[int]) -> list[float]:
        """See ``Fitness``.

        Raises:
            SenteiError: NaN or Inf.
        """
        totals = [0.0] * len(models)
        for number in windows:
            metric = self._metrics[number]
            metric.prepare(self._walk)
            for place, hidden in enumerate(last_states(self._walk, metric.ids, models)):
                totals[place] += metric(self._walk, hidden)
        return [finite(total / len(windows), "KL divergence", self._walk) for total in totals]


def _generation(seed: int, number: int) -> Random:
    return Random(f"{seed}/{number}")


def _distinct(count: int, make: Callable[[], Removed], but: Removed | None = None) -> list[Removed]:
    """``count`` different models, fewer where there are no more."""
    found: dict[Removed, None] = {}
    for _ in range(count * _DRAWS_PER_MODEL):
        if (model := make()) != but:
            found[model] = None
        if len(found) == count:
            break
    return list(found)
