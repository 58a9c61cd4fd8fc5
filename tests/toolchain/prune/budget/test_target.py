"""A target is read as it was meant, or refused with what is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.toolchain.costs.made import KV, TPOT, TTFT, WEIGHTS, make_costs
from toolchain.architecture.layout import LayerLayout
from toolchain.errors import SenteiError
from toolchain.prune.budget.target import budget_of, check_targets, parse_targets, predicted, unreachable

NARROW = tuple(LayerLayout(attention=layer != 1, intermediate_size=24) for layer in range(4))


def test_each_quantity_has_its_units():
    found = parse_targets(["speedup=1.3,tpot=20ms", "ttft=.5s", "throughput=400tok/s", "memory=24GiB@64x8192"])
    assert [(each.name, each.value) for each in found] == [
        ("speedup", 1.3), ("tpot", 20.0), ("ttft", 500.0), ("throughput", 400.0), ("memory", 24.0),
    ]  # fmt: skip
    assert found[-1].cached_tokens == 64 * 8192
    assert parse_targets(["memory=1000MB@1x1"])[0].value == pytest.approx(10**9 / 2**30)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tpot=20", "20 of what"),
        ("throughput=400", "400 of what"),
        ("memory=24@1x1", "24 of what"),
        ("tpot=20GiB", "GiB is not a unit of tpot"),
        ("speedup=1.3ms", "ms is not a unit of speedup"),
        ("speedup=0.9", "above 1"),
        ("speedup=1", "above 1"),
        ("speedup", "not understood"),
        ("faster=2", "not understood"),
        ("tpot=-1ms", "not understood"),
        ("tpot=0ms", "not understood"),
        ("tpot=nanms", "not understood"),
        ("", "not understood"),
        ("memory=24GiB", "for a number of conversations"),
        ("tpot=20ms@1x1", "for a number of conversations"),
        ("memory=24GiB@64", "not a number of conversations"),
        ("memory=24GiB@0x8192", "not a number of conversations"),
        ("tpot=20ms,tpot=30ms", "asks for tpot twice"),
    ],
)
def test_what_is_missing_is_said(text, says):
    with pytest.raises(SenteiError, match=says):
        parse_targets([text])


@given(
    st.text(max_size=30) | st.from_regex(r"(speedup|tpot|ttft|throughput|memory)=[0-9.a-zA-Z/@x]{0,20}", fullmatch=True)
)
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_targets([text])
    except SenteiError:
        return
    assert all(0 < each.value < float("inf") for each in found)


def test_a_prediction_is_in_the_targets_unit():
    costs = make_costs({}, spread=(0.9, 1.0, 1.1)).document
    speedup, tpot, ttft, throughput, memory = parse_targets(
        ["speedup=1.3", "tpot=3ms", "ttft=9ms", "throughput=400tok/s", "memory=1GiB@2x100"]
    )
    assert predicted(tpot, costs, NARROW).predicted == pytest.approx(TPOT.of(NARROW))
    assert predicted(ttft, costs, NARROW).predicted == pytest.approx(TTFT.of(NARROW))
    times = [(TTFT.of(layout) + 8 * TPOT.of(layout)) / 18 for layout in (costs.whole, NARROW)]
    gain = predicted(speedup, costs, NARROW)
    # What slows both models down alike is no reason to doubt the gain.
    assert gain.predicted == pytest.approx(gain.predicted_low) == pytest.approx(times[0] / times[1])
    rate = predicted(throughput, costs, NARROW)
    assert rate.predicted_low < 1000 / times[1] < rate.predicted_high
    bytes_ = WEIGHTS.of(NARROW) + 200 * KV.of(NARROW)
    assert predicted(memory, costs, NARROW).predicted == pytest.approx(bytes_ / 2**30)
    for target, used in ((speedup, 1.3 * times[1] / times[0]), (memory, bytes_ / 2**30), (throughput, 0.4 * times[1])):
        budget = budget_of(target, costs)
        assert budget.costs.of(NARROW) / budget.most == pytest.approx(used)
        assert target.share(predicted(target, costs, NARROW).predicted) == pytest.approx(used)


def test_what_needs_no_pruning_or_cannot_be_is_refused():
    costs = make_costs({}).document
    with pytest.raises(SenteiError, match=r"predicted to meet tpot=100ms \(7 ms\)"):
        check_targets(parse_targets(["tpot=100ms"]), costs, 256)
    with pytest.raises(SenteiError, match="reads at most 256 tokens"):
        check_targets(parse_targets(["memory=1MB@2x257"]), costs, 256)
    check_targets(parse_targets(["tpot=100ms,speedup=1.1"]), costs, 256)
    with pytest.raises(SenteiError, match="no time between two"):
        one = make_costs({}).document
        check_targets(
            parse_targets(["tpot=1ms"]), one.model_copy(update={"costs": {"ttft_ms": one.costs["ttft_ms"]}}), 1
        )
    error = unreachable(parse_targets(["speedup=1.1,tpot=2ms"]), costs, NARROW)
    assert "tpot=2ms cannot be reached" in error.message
    assert f"{TPOT.of(NARROW):.4g} ms" in error.message
    assert unreachable(parse_targets(["speedup=1.1"]), costs, NARROW) is None
