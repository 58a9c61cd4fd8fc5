"""A metric that counts gives many candidates the same value: what decides then, and what is kept of it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from toolchain.architecture.families import FAMILIES
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.metrics.questions import Question
from toolchain.metrics.token_metrics import PerplexityMetric, measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.prune.search.attention import Tried, removals


class Scripted(ChoicesMetric):
    """An accuracy whose values a test has chosen, candidate by candidate."""

    def __init__(self, directory: Path, values: Sequence[float]) -> None:
        super().__init__(
            [Question(prompt="a", choices=("b", "c"), answer=0)],
            load_tokenizer(directory),
            asked=QuestionMetric(kind="accuracy", file=Path("q")),
            seq_len=8,
        )
        self._values = iter(values)

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        return next(self._values)


@pytest.fixture
def walk(demo_pico: Path) -> LayerWalk:
    return LayerWalk(load_model(demo_pico, dtype=torch.float32), FAMILIES["llama"])


@pytest.fixture(scope="module")
def perplexity() -> PerplexityMetric:
    return PerplexityMetric(torch.randint(0, 49000, (1, 32), generator=torch.Generator().manual_seed(3)))


def searched(walk: LayerWalk, metric: ChoicesMetric, perplexity: PerplexityMetric, steps: int) -> list[Tried]:
    return list(itertools.islice(removals(walk, metric, tie_breaker=perplexity), steps))


@pytest.mark.parametrize("values", [[0.5, 0.25, 0.75, 0.75], [0.5, 0.5, 0.5, 0.5]])
def test_of_equals_the_one_that_reads_best_goes(
    demo_pico: Path, walk: LayerWalk, perplexity: PerplexityMetric, values: list[float]
):
    alone = {layer: measure(walk, perplexity, without_attention=[layer]) for layer in range(4)}
    (tried,) = searched(walk, Scripted(demo_pico, values), perplexity, 1)
    tied = [layer for layer, value in enumerate(values) if value == max(values)]
    assert tried.ties == pytest.approx({layer: alone[layer] for layer in tied})
    assert tried.removed == min(tied, key=alone.__getitem__)
    # Neither the lower layer, nor the best reader of all, if the metric says otherwise.
    assert tried.removed != tied[0]
    assert tried.candidates == dict(enumerate(values))


def test_one_that_is_best_alone_goes_whatever_it_reads_like(
    demo_pico: Path, walk: LayerWalk, perplexity: PerplexityMetric
):
    worst = max(range(4), key=lambda layer: measure(walk, perplexity, without_attention=[layer]))
    values = [0.9 if layer == worst else 0.8 for layer in range(4)]
    first, second = searched(walk, Scripted(demo_pico, [*values, 0.1, 0.1, 0.0]), perplexity, 2)
    assert (first.removed, first.ties) == (worst, {})
    # The tie break of the second step is of the model without the first.
    left = [layer for layer in range(4) if layer != worst]
    again = LayerWalk(load_model(demo_pico, dtype=torch.float32), FAMILIES["llama"])
    both = {layer: measure(again, perplexity, without_attention=[worst, layer]) for layer in left[:2]}
    assert second.ties == pytest.approx(both)
    assert second.removed == min(both, key=both.__getitem__)
