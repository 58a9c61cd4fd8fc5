"""Who is told that nobody should pick a candidate must be able to rely on the other one."""

from hypothesis import given
from hypothesis import strategies as st

from serving.decision.document import Interval
from serving.decision.pareto import Point, better_ones, points_of
from tests.serving.decision.making import candidate, interval

sides = st.builds(
    lambda value, low, high: Interval(value=value, low=value * low, high=value * high),
    st.floats(0.5, 2), st.floats(0.8, 1), st.floats(1, 1.2),
)  # fmt: skip
clouds = st.lists(st.tuples(sides, sides, st.integers(1, 5)), min_size=1, max_size=7).map(
    lambda rows: [
        Point(name=str(number), loss=loss, speed=speed, memory_bytes=float(memory))
        for number, (loss, speed, memory) in enumerate(rows)
    ]
)


@given(clouds)
def test_somebody_is_always_left_and_whoever_is_struck_out_has_a_better_one_that_is_left(points):
    better = better_ones(points)
    left = {name for name, others in better.items() if not others}
    assert left
    by_name = {point.name: point for point in points}
    for name, others in better.items():
        for other in others:
            one, worse = by_name[other], by_name[name]
            assert one.loss.value <= worse.loss.value and one.speed.value >= worse.speed.value
            assert one.memory_bytes <= worse.memory_bytes
            assert name not in better[other]


@given(clouds, st.randoms(use_true_random=False))
def test_the_order_does_not_matter_and_a_further_candidate_clears_nobody(points, draw):
    whole = better_ones(points)
    shuffled = list(points)
    draw.shuffle(shuffled)
    assert {name: set(others) for name, others in better_ones(shuffled).items()} == {
        name: set(others) for name, others in whole.items()
    }
    fewer = better_ones(points[:-1])
    assert all(set(others) <= set(whole[name]) for name, others in fewer.items())


def test_chance_strikes_nobody_out():
    near = [
        Point(name="a", loss=interval(1.10), speed=interval(1.20), memory_bytes=5),
        Point(name="b", loss=interval(1.11), speed=interval(1.19), memory_bytes=5),
    ]
    assert better_ones(near) == {"a": [], "b": []}
    far = [*near, Point(name="c", loss=interval(1.5), speed=interval(1.19), memory_bytes=5)]
    assert better_ones(far)["c"] == ["a", "b"]


def test_what_was_not_measured_is_not_in_the_picture():
    whole = candidate()
    incomplete = [candidate("a", gain=None), candidate("b", perplexity={}), candidate("c", memory_bytes=None)]
    assert [point.name for point in points_of([whole, *incomplete], 10**9)] == ["original", "25 %"]
    assert [point.name for point in points_of([whole], None)] == ["25 %"]


def test_the_text_that_suffered_most_counts():
    [point] = points_of([candidate(perplexity={"good": interval(1.0), "bad": interval(1.9)})], None)
    assert point.loss.value == 1.9
