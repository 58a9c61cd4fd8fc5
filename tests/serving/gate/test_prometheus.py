"""Reading a Prometheus: what is asked, and that whatever comes back ends in one sentence."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.gate import prometheus as reading
from serving.gate.counts import NAMES, count
from serving.gate.prometheus import Prometheus, Window
from tests.serving.gate.fake_prometheus import NOW_S, prometheus, success
from toolchain.errors import SenteiError

WINDOW = Window(end_s=NOW_S, length_s=1200, step_s=10)


def test_what_is_asked():
    with prometheus(lambda query: (200, success("matrix", []))) as (url, asked):
        assert Prometheus(f"{url}/").samples(["a", "b:c"], {"job": 'say "\\x"\n剪'}, WINDOW) == []
    assert asked == ['{__name__=~"a|b:c",job="say \\"\\\\x\\"\\U0000000a剪"}[1200s:10s]']


def test_the_clock_is_prometheus_own():
    with prometheus(lambda query: (200, success("scalar", [NOW_S, "1"]))) as (url, _):
        found = Prometheus(url).window_ending_now(1800, steps=120)
    assert found == Window(end_s=NOW_S, length_s=1800, step_s=15)


def test_samples_that_are_no_numbers_are_left_out():
    values = [[1.0, "2"], [2, "NaN"], [3.5, "+Inf"], [4, "1e3"]]
    with prometheus(lambda query: (200, success("matrix", [{"metric": {}, "values": values}]))) as (url, _):
        (found,) = Prometheus(url).samples(["a"], {}, WINDOW)
    assert found.samples == ((1.0, 2.0), (4.0, 1000.0))


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (200, b"<html>Grafana</html>", "not readable JSON"),
        (200, b"[]", "does not answer as a Prometheus does"),
        (200, b'{"status": "success"}', "fields it should"),
        (200, success("vector", []), "fields it should"),
        (200, success("matrix", [{"metric": {"a": 1}, "values": []}]), "fields it should"),
        (200, success("matrix", [{"metric": {}, "values": [[1]]}]), "fields it should"),
        (200, success("matrix", [{"metric": {}, "values": [[1, "one"]]}]), "where a sample should be"),
        (200, success("matrix", [{"metric": {}, "values": [[1, []]]}]), "where a sample should be"),
        (200, success("matrix", [], warnings=["one store of two"]), "may be incomplete (['one store of two'])"),
        (422, json.dumps({"status": "error", "error": "too many samples"}).encode(), "answers 422 (too many samples)"),
        (503, b"busy", "answers 503 (Service Unavailable)"),
        (302, b"http://127.0.0.1:1/", "answers 302"),
    ],
)
def test_other_answers_end_in_a_sentence(status, content, said):
    with prometheus(lambda query: (status, content)) as (url, asked), pytest.raises(SenteiError) as caught:
        Prometheus(url).samples(["a"], {}, WINDOW)
    assert said in str(caught.value)
    assert len(asked) == 1


def test_too_much_is_not_read(monkeypatch):
    monkeypatch.setattr(reading, "_MOST_BYTES", 1000)
    with prometheus(lambda query: (200, b" " * 1001)) as (url, _), pytest.raises(SenteiError, match="more than 1,000"):
        Prometheus(url).samples(["a"], {}, WINDOW)


def test_nobody_is_there():
    with pytest.raises(SenteiError, match=r"cannot be asked at http://127.0.0.1:1 \(.*refused"):
        Prometheus("http://127.0.0.1:1").window_ending_now(600, steps=120)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:9090", "file:///etc/passwd", "http://", "http://a:b/", "http://a/?b", "http://a b/", "http://[/"],
)
def test_other_urls_are_refused(url):
    with pytest.raises(SenteiError, match="is not the URL of a Prometheus"):
        Prometheus(url)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(SenteiError) as caught:
        Prometheus("http://me:secret@127.0.0.1/")
    assert "secret" not in str(caught.value)


labels = st.dictionaries(
    st.sampled_from(["__name__", "job", "instance", "le", "handler", "status", "finished_reason"]),
    st.one_of(st.sampled_from([*NAMES, "+Inf", "0.5", "5xx", "/v1/completions"]), st.text(max_size=5)),
)
odd = st.sampled_from([None, 3, -1e300, "", "x", [], [[]], {}, True])
numbers = st.one_of(st.floats(-1e9, 1e12).map(repr), st.sampled_from(["NaN", "-Inf", "1e308"]), odd)
values = st.lists(st.one_of(st.tuples(st.floats(0, 2e9) | odd, numbers), odd), max_size=6)
answers = st.one_of(odd, st.lists(st.fixed_dictionaries({"metric": labels | odd, "values": values | odd}), max_size=4))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers)
def test_whatever_comes_back_is_counted_or_refused(monkeypatch, result):
    monkeypatch.setattr(Prometheus, "_get", lambda self, url: success("matrix", result))
    try:
        found = Prometheus("http://127.0.0.1:1").samples(["a"], {}, WINDOW)
    except SenteiError as error:
        assert not re.search("Traceback", str(error))
        return
    count(found, WINDOW)
