"""The operator's own prompts: what is asked, what counts as another answer, and what a wrong file or server ends in."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.gate import shadow
from serving.gate.decide import decide
from serving.gate.document import ShadowLimits
from serving.gate.shadow import MOST_PROMPTS, Shadow, compare, read_prompts
from tests.serving.gate.world import Truth, asked, pair
from toolchain.errors import SenteiError

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server:
    """An OpenAI server on loopback that answers as a test says, and keeps what it was asked."""

    def __init__(self, answer: Answer, models: Any = None) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "small"}]} if models is None else models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, body, self.headers["Authorization"]))
                self._send(*answer(body))

            def _send(self, status: int, content: Any) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def says(text: str) -> tuple[int, Any]:
    return 200, {"choices": [{"text": text}]}


@contextmanager
def pair_of(original: Answer, candidate: Answer, **more: Any) -> Iterator[tuple[Server, Server, ShadowLimits]]:
    servers = Server(original, **more), Server(candidate)
    try:
        limits = ShadowLimits(
            original=servers[0].url, candidate=servers[1].url, prompts="p.jsonl", max_tokens=7, max_increase=0.2
        )
        yield *servers, limits
    finally:
        for each in servers:
            each.end()


def written(place: Path, *lines: Any) -> Path:
    path = place / "p.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_what_is_asked_of_whom(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    messages = [{"role": "user", "content": "剪"}]
    prompts = read_prompts(written(tmp_path, {"prompt": "a"}, "", {"messages": messages}))

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return (200, {"choices": [{"message": {"content": "x"}}]}) if "messages" in body else says("x")

    with pair_of(answer, answer) as (original, candidate, limits):
        assert compare(limits, prompts) == Shadow(prompts=2, original_differs=0, candidate_differs=0)
    common = {"model": "small", "max_tokens": 7, "temperature": 0}
    expected = [
        ("/v1/chat/completions", {"messages": messages, **common}, "Bearer secret"),
        ("/v1/completions", {"prompt": "a", **common}, "Bearer secret"),
    ]
    assert sorted(candidate.asked, key=str) == expected
    assert sorted(original.asked, key=str) == [expected[0]] * 2 + [expected[1]] * 2


def test_what_counts_as_another_answer(tmp_path):
    """Another text, and a refusal; what the original says otherwise when it is asked again is its own."""
    prompts = read_prompts(written(tmp_path, *({"prompt": str(number)} for number in range(30))))
    seen: dict[str, int] = {}

    def original(body: dict[str, Any]) -> tuple[int, Any]:
        seen[body["prompt"]] = again = seen.get(body["prompt"], 0) + 1
        return says("b" if int(body["prompt"]) < 4 and again == 2 else "a")

    def candidate(body: dict[str, Any]) -> tuple[int, Any]:
        number = int(body["prompt"])
        return (
            says("b")
            if number < 6
            else (400, {"error": "long"})
            if number < 8
            else (200, {})
            if number < 9
            else says("a")
        )

    with pair_of(original, candidate) as (*_, limits):
        assert compare(limits, prompts) == Shadow(prompts=30, original_differs=4, candidate_differs=9)


@pytest.mark.parametrize(
    ("answers", "answer", "state"),
    [
        (Shadow(prompts=300, original_differs=3, candidate_differs=240), "roll back", "worse"),
        (Shadow(prompts=300, original_differs=3, candidate_differs=10), "promote", "fine"),
        (Shadow(prompts=300, original_differs=150, candidate_differs=155), "promote", "fine"),
        (Shadow(prompts=300, original_differs=3, candidate_differs=65), "wait", "open"),
        (Shadow(prompts=5, original_differs=0, candidate_differs=0), "wait", "open"),
        (Shadow(prompts=5, original_differs=0, candidate_differs=3), "wait", "open"),
    ],
)
def test_the_answers_decide_with_the_metrics(answers, answer, state):
    """All else is well. Few prompts decide nothing, and a model that writes nonsense fast is not promoted."""
    sides = pair(np.random.default_rng(0), Truth(), Truth(ttft_s=0.06, tpot_s=0.015))
    limits = {"original": "http://a", "candidate": "http://b", "prompts": "p", "max_increase": 0.2}
    decision = decide(*sides, asked(shadow=limits), answers)
    assert decision.answer == answer
    (check,) = (check for check in decision.checks if check.name == "shadow")
    assert check.state == state


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has no prompts"),
        (['{"prompt": 5}'], "line 1 is no prompt"),
        (['{"prompt": "a"}', '{"prompt": ""}'], "line 2 is no prompt"),
        (['{"messages": []}'], "line 1 is no prompt"),
        (['{"messages": [{"role": "user"}]}'], "line 1 is no prompt"),
        (['{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}'], "line 1 is no prompt"),
        (["no"], "line 1"),
        (['{"prompt": "a"}'] * (MOST_PROMPTS + 1), "more than 1,000 prompts"),
    ],
)
def test_a_file_without_prompts_ends_in_a_sentence(tmp_path, lines, said):
    with pytest.raises(SenteiError, match=said):
        read_prompts(written(tmp_path, *lines))


keys = st.sampled_from(["prompt", "messages", "role", "content"])
lines = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(keys, each, max_size=3),
)


@given(lines)
def test_whatever_a_line_holds_it_is_a_prompt_or_refused(line):
    try:
        found = shadow._prompt("line 1", line)
    except SenteiError:
        return
    assert isinstance(line, dict) and (found.body.get("prompt") or found.body.get("messages"))


def sentence_of(tmp_path: Path, original: Answer, candidate: Answer = lambda body: says("a"), **more: Any) -> str:
    prompts = read_prompts(written(tmp_path, {"prompt": "a"}))
    with pair_of(original, candidate, **more) as (*_, limits), pytest.raises(SenteiError) as caught:
        compare(limits, prompts)
    return str(caught.value)


def test_other_servers_end_in_a_sentence(tmp_path):
    assert "answers 400 to" in sentence_of(tmp_path, lambda body: (400, {"error": "too long"}))
    assert "does not answer as an OpenAI server does" in sentence_of(tmp_path, lambda body: (200, []))
    assert "not readable JSON" in sentence_of(tmp_path, lambda body: (200, b"<html>"))
    assert "Set VLLM_API_KEY" in sentence_of(tmp_path, lambda body: (401, {}))
    for models in ([], {"data": []}, {"data": [{"id": 5}]}, {"data": 7}):
        assert "does not say what models it has" in sentence_of(tmp_path, lambda body: says("a"), models=models)


def replies(**message: str | None) -> Answer:
    return lambda body: (200, {"choices": [{"message": message}]})


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_a_server_keeps_apart_is_compared(tmp_path, name):
    prompts = read_prompts(written(tmp_path, *({"messages": [{"role": "user", "content": text}]} for text in "abcd")))
    original = replies(content=None, reasoning="yes")
    # The same text is another answer where the model has done its thinking.
    for candidate, differing in (
        (replies(content=None, **{name: "no"}), 4),
        (replies(content="yes"), 4),
        (replies(content=None, **{name: "yes"}), 0),
    ):
        with pair_of(original, candidate) as (*_, limits):
            assert compare(limits, prompts) == Shadow(prompts=4, original_differs=0, candidate_differs=differing)


@pytest.mark.parametrize(
    "nothing", [replies(content=None, reasoning=None), replies(content=""), replies(), lambda body: says("")]
)
def test_where_nobody_says_anything_nothing_is_compared(tmp_path, nothing):
    """All answers would be alike, and any candidate fine."""
    said = sentence_of(tmp_path, nothing, nothing)
    assert "line 1 without text: there is nothing to compare" in said and "Raise max_tokens" in said
    prompts = read_prompts(written(tmp_path, {"prompt": "a"}))
    with pair_of(lambda body: says("a"), nothing) as (*_, limits):
        assert compare(limits, prompts) == Shadow(prompts=1, original_differs=0, candidate_differs=1)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost", "not the URL"),
        ("http://me:secret@127.0.0.1", "password"),
        ("http://127.0.0.1:1", "cannot be asked"),
    ],
)
def test_other_urls_are_refused(tmp_path, url, said):
    prompts = read_prompts(written(tmp_path, {"prompt": "a"}))
    limits = ShadowLimits(original=url, candidate=url, prompts="p", max_increase=0.5)
    with pytest.raises(SenteiError, match=said) as caught:
        compare(limits, prompts)
    assert "secret" not in str(caught.value)
