"""Two models on one's own questions: is it worse, which way is worse, and how sure is that?"""

import random
from collections.abc import Sequence

import pytest

from toolchain.evaluate.own_metrics import compare, parse_metrics
from toolchain.metrics.question_metrics import Outcome

ACCURACY, F1, SAFE, HELPFUL = parse_metrics(
    ["accuracy:q.jsonl", "f1:q.jsonl#class=fraud", "refusal_rate:q.jsonl#wanted=refusals",
     "refusal_rate:q.jsonl#wanted=answers"]
)  # fmt: skip
MOSTLY, SELDOM = [True] * 36 + [False] * 4, [True] * 18 + [False] * 22


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        (ACCURACY, MOSTLY, SELDOM, "worse"),
        (SAFE, MOSTLY, SELDOM, "worse"),
        (HELPFUL, MOSTLY, SELDOM, "better"),
        (HELPFUL, SELDOM, MOSTLY, "worse"),
        (F1, MOSTLY, SELDOM, "worse"),
        (F1, [*SELDOM, None], [*MOSTLY, None], "better"),
        (F1, MOSTLY, MOSTLY, "no difference shown"),
        (HELPFUL, MOSTLY, MOSTLY, "no difference shown"),
    ],
)
def test_worse_is_what_a_user_would_call_worse(metric, before, after, verdict):
    found = compare(metric, before, after)
    assert found.difference.verdict == verdict
    assert found.difference.value == pytest.approx(metric.value(after) - metric.value(before))
    lost_more = found.lost > found.gained
    assert lost_more is (verdict == "worse")
    assert (found.lost == found.gained == 0) is (verdict == "no difference shown")


def test_of_one_question_of_the_class_no_interval_is_claimed():
    found = compare(F1, [True, None, None], [False, None, None])
    assert (found.difference.value, found.difference.low, found.difference.verdict) == (-1, None, "no difference shown")


def test_the_interval_of_a_difference_of_f1_holds_the_true_one_as_often_as_it_says():
    """Shares of all claims: what both models make of one, as true positive, mistake, or neither."""
    cells: list[tuple[Outcome, Outcome]] = [(True, True), (True, False), (False, True), (False, False), (None, None)]
    shares = [0.4, 0.15, 0.05, 0.1, 0.3]

    def f1(right: float, wrong: float) -> float:
        return 2 * right / (2 * right + wrong)

    truth = f1(0.45, 0.25) - f1(0.55, 0.15)
    draw, held, count = random.Random(2), 0, 150
    for _ in range(count):
        pairs: Sequence[tuple[Outcome, Outcome]] = draw.choices(cells, shares, k=60)
        found = compare(F1, *zip(*pairs, strict=True)).difference
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
    assert 0.9 <= held / count <= 0.99
