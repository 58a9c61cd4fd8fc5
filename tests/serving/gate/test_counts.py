"""What is counted is what happened: through restarts, first errors and lost scrapes."""

import dataclasses

import numpy as np
import pytest

from serving.gate.counts import BLOCKS, Latency, count
from serving.gate.prometheus import Series, Window
from tests.serving.gate.fake_prometheus import NOW_S, series_of
from tests.serving.gate.world import Truth, pair

WINDOW = Window(end_s=NOW_S, length_s=1200, step_s=10)
TOKENS = "vllm:generation_tokens_total"


def series(name: str, samples: list[tuple[float, float]], *, instance: str = "a", **labels: str) -> Series:
    """Samples by seconds since the window began."""
    return Series(
        labels={"__name__": name, "job": "j", "instance": instance, **labels},
        samples=tuple((WINDOW.start_s + at_s, value) for at_s, value in samples),
    )


def errors(samples: list[tuple[float, float]]) -> Series:
    return series("http_requests_total", samples, handler="/v1/chat/completions", status="5xx")


@pytest.mark.parametrize("colon", [":", "_"])
def test_what_was_put_in_comes_out(colon):
    """In OpenMetrics, the client library of vLLM writes an underscore for the colon."""
    side, _ = pair(np.random.default_rng(0), Truth(errors=0.1), Truth())
    found = count(
        [
            Series(
                labels=each["metric"] | {"__name__": each["metric"]["__name__"].replace(":", colon)},
                samples=tuple((at_s, float(value)) for at_s, value in each["values"]),
            )
            for each in series_of(side, "j", 1200)
        ],
        WINDOW,
    )
    for field in dataclasses.fields(side):
        expected, counted = getattr(side, field.name), getattr(found, field.name)
        if isinstance(expected, Latency):
            np.testing.assert_allclose(counted.sums_s, expected.sums_s, atol=1e-6)
            np.testing.assert_allclose(counted.counts, expected.counts)
            assert counted.within.keys() == expected.within.keys()
            for bound, each in expected.within.items():
                np.testing.assert_allclose(counted.within[bound], each)
        elif field.name in ("waiting", "kv_cache"):  # the window's first sample stands in its first block, too
            np.testing.assert_allclose(counted, expected)
        else:
            np.testing.assert_allclose(counted, expected)


def test_the_first_errors_of_a_server_count():
    """The series of 5xx begins with the first of them, so its growth alone would be 0."""
    there = series(TOKENS, [(0, 5), (600, 50), (1200, 100)])
    assert count([there, errors([(600, 37), (1200, 37)])], WINDOW).error_answers.sum() == 37
    # Of a server that is seen for the first time, nobody knows when they were.
    new = series(TOKENS, [(600, 50), (1200, 100)])
    assert count([new, errors([(600, 37), (1200, 40)])], WINDOW).error_answers.sum() == 3


def test_a_restart_loses_nothing_and_is_counted():
    counter = [(0, 100), (300, 130), (600, 20), (1200, 50)]
    found = count([series(TOKENS, counter), errors(counter)], WINDOW)
    assert found.error_answers.sum() == 30 + 20 + 30
    assert found.restarts == 1


def test_what_happened_when():
    found = count([series(TOKENS, [(0, 0)]), errors([(0, 0), (60, 1), (61, 3), (1200, 10)])], WINDOW)
    assert list(found.error_answers[:2]) == [1, 2]
    assert found.error_answers[BLOCKS - 1] == 7


@pytest.mark.parametrize(("last_s", "there"), [(1200, 2), (1180, 2), (1150, 1)])
def test_a_server_that_is_gone(last_s, there):
    found = count([series(TOKENS, [(0, 1), (last_s, 2)]), series(TOKENS, [(0, 1), (1200, 2)], instance="b")], WINDOW)
    assert (found.servers, found.servers_now) == (2, there)


def test_levels_are_means_over_servers_and_time():
    name = "vllm:num_requests_waiting"
    found = count([series(name, [(10, 2), (20, 4)]), series(name, [(10, 0)], instance="b")], WINDOW)
    assert found.waiting[0] == 2
    assert np.isnan(found.waiting[1:]).all()


def test_client_faults_and_aborts_count_and_other_pages_do_not():
    """A wrong model name answers 404, a candidate with a shorter context 400, and clients of a slow one hang up."""

    def grown(name: str, **labels: str) -> Series:
        return series(name, [(0, 0), (100, 4)], **labels)

    found = count(
        [
            series(TOKENS, [(0, 0)]),
            grown("http_requests_total", handler="/v1/completions", status="4xx"),
            grown("http_requests_total", handler="/v1/completions", status="2xx"),
            grown("http_requests_total", handler="/v1/models", status="4xx"),
            grown("http_requests_total", handler="/metrics", status="5xx"),
            grown("vllm:request_success_total", finished_reason="abort"),
            grown("vllm:request_success_total", finished_reason="length"),
        ],
        WINDOW,
    )
    assert (found.answers.sum(), found.error_answers.sum()) == (8, 4)
    assert (found.ended.sum(), found.unfinished.sum()) == (8, 4)
