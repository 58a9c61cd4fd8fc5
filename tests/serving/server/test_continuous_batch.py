"""Continuous batching: whoever joins and leaves, each answer is what it would be alone."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.onnx_graph import export_onnx
from serving.engines.onnxruntime import OnnxEngine
from serving.engines.sampling import Sampler, Sampling
from serving.server.onnx.answer_text import AnswerText, Piece
from serving.server.onnx.continuous_batch import BatchRequest, OnnxBatch
from tests.conftest import make_pico, prune_by_hand
from toolchain.checkpoint.directory import copy_companions
from toolchain.errors import SenteiError
from toolchain.model.loading import load_tokenizer


@pytest.fixture(scope="module")
def engine(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    """A pico model with a hole in its cache numbering and with room for two pieces of a prompt."""
    source, pruned = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("pruned")
    make_pico(source, head_dim=16, max_position_embeddings=512)
    copy_companions(demo_model, source)
    prune_by_hand(source, pruned, removed_attention={1}, width=lambda layer: 40 + layer)
    out = tmp_path_factory.mktemp("onnx") / "pico"
    export_onnx(pruned, out)
    return OnnxEngine(out)


def request(prompt: list[int], max_tokens: int, tokens: list[int], **settings: object) -> BatchRequest:
    def take(token: int) -> bool:
        tokens.append(token)
        return len(tokens) < max_tokens

    return BatchRequest(prompt=prompt, take=take, **settings)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=7),
    rows=st.integers(1, 4),
)
def test_each_answer_is_what_it_is_alone(engine: OnnxEngine, requests: list[tuple[int, int, int]], rows: int) -> None:
    """Requests of some length, for some tokens, each so many steps after the one before or as soon as there is room."""
    batch = OnnxBatch(engine, max_num_seqs=rows, max_model_len=320)
    answers: list[list[int]] = [[] for _ in requests]
    prompts = [[100 + (7 * i + 3 * index) % 900 for i in range(length)] for index, (length, *_) in enumerate(requests)]
    for index, (_, max_tokens, steps) in enumerate(requests):
        while not batch.has_room:
            batch.step()
        batch.join(request(prompts[index], max_tokens, answers[index]))
        for _ in range(steps):
            batch.step()
    while not batch.is_empty:
        batch.step()
    for prompt, (_, max_tokens, _), answer in zip(prompts, requests, answers, strict=True):
        assert answer == engine.generate(prompt, max_tokens)
    assert batch.prompt_tokens == sum(map(len, prompts))
    assert batch.generation_tokens == sum(map(len, answers))


def test_a_cancelled_request_makes_room(engine: OnnxEngine) -> None:
    batch = OnnxBatch(engine, max_num_seqs=2, max_model_len=512)
    first, second, third = [], [], []  # type: ignore[var-annotated]
    leaving = request([100] * 400, 50, first)
    batch.join(leaving)
    batch.join(request([200, 201], 30, second))
    batch.step()  # half of the long prompt
    assert not batch.has_room
    leaving.cancelled = True
    batch.step()
    assert batch.has_room
    batch.join(request([300, 301, 302], 9, third))
    while not batch.is_empty:
        batch.step()
    assert first == []
    assert second == engine.generate([200, 201], 30)
    assert third == engine.generate([300, 301, 302], 9)


def test_an_error_ends_every_request_and_the_next_go_well(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = OnnxBatch(engine, max_num_seqs=2, max_model_len=64)
    errors: list[Exception] = []
    for _ in range(2):
        batch.join(request([100], 5, [], fail=errors.append))
    batch.fail(SenteiError("No memory."))
    assert [str(error) for error in errors] == ["No memory."] * 2
    assert batch.is_empty
    tokens: list[int] = []
    batch.join(request([100], 5, tokens))
    while not batch.is_empty:
        batch.step()
    assert tokens == engine.generate([100], 5)


def test_what_fails_in_one_request_ends_that_one_alone(engine: OnnxEngine) -> None:
    """Its sampler, its text, or the run of its own prompt."""

    def fails(*_: object) -> bool:
        raise ValueError("Its own fault.")

    class FailingSampler(Sampler):
        pick = fails  # type: ignore[assignment]

    batch = OnnxBatch(engine, max_num_seqs=4, max_model_len=64)
    errors: list[Exception] = []
    tokens: list[int] = []
    batch.join(request([200, 201], 12, tokens))
    batch.join(request([100], 5, [], sampler=FailingSampler(), fail=errors.append))
    batch.join(BatchRequest(prompt=[101], take=fails, fail=errors.append))
    batch.join(request([100] * 70, 5, [], fail=errors.append))  # does not fit: OnnxEngine.step refuses
    while not batch.is_empty:
        batch.step()
    assert sorted(type(error).__name__ for error in errors) == ["SenteiError", "ValueError", "ValueError"]
    assert tokens == engine.generate([200, 201], 12)


def test_draws_are_a_requests_own(engine: OnnxEngine) -> None:
    """The same seed gives the same answer, whatever else is in the batch."""

    def drawn(others: int) -> list[int]:
        batch = OnnxBatch(engine, max_num_seqs=4, max_model_len=64)
        tokens: list[int] = []
        for index in range(others):
            batch.join(request([50 + index], 20, [], sampler=Sampler(Sampling(temperature=1.0))))
        batch.join(request([100, 101], 12, tokens, sampler=Sampler(Sampling(temperature=0.8, top_p=0.95, seed=3))))
        while not batch.is_empty:
            batch.step()
        return tokens

    assert drawn(0) == drawn(3) != engine.generate([100, 101], 12)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.2, 0.2, 0.1], atol=0.03)
    for limits in ({"top_k": 1}, {"top_p": 0.4}):
        sampler = Sampler(Sampling(temperature=1.0, seed=0, **limits))
        assert {sampler.pick(logits) for _ in range(50)} == {0}
    assert {Sampler(Sampling(temperature=1e-30)).pick(logits) for _ in range(20)} == {0}
    sampler = Sampler(Sampling(temperature=2.0, top_p=0.75, seed=0))
    assert {sampler.pick(logits) for _ in range(200)} == {0, 1, 2}


@pytest.fixture(scope="module")
def answer(demo_model: Path) -> Callable[..., list[Piece]]:
    tokenizer = load_tokenizer(demo_model).backend_tokenizer

    def pieces(text: str, *, max_tokens: int = 1000, stop_strings: list[str] = [], tail: list[int] = []) -> list[Piece]:  # noqa: B006
        found: list[Piece] = []
        taker = AnswerText(
            tokenizer, [504], max_tokens=max_tokens, stop_ids={2}, stop_strings=stop_strings, emit=found.append
        )
        tokens = tokenizer.encode(text, add_special_tokens=False).ids + tail
        wanted = list(itertools.takewhile(taker.take, tokens))
        assert len(found) == min(len(wanted) + 1, len(tokens))  # one piece a token
        return found

    return pieces


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab \n.é木🌳", min_size=1, max_size=40), stop=st.lists(st.text("ab .木", min_size=1, max_size=4)))
def test_text_ends_before_the_first_stop_string(answer: Callable[..., list[Piece]], text: str, stop: list[str]) -> None:
    pieces = answer(text, stop_strings=stop, tail=[2])
    said = "".join(piece.text for piece in pieces)
    assert text.startswith(said)
    assert not [each for each in stop if each in said]
    assert said == text or any(text.startswith(each, len(said)) for each in stop)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_text_ends_at_the_limit(answer: Callable[..., list[Piece]]) -> None:
    pieces = answer(" one two three four", max_tokens=3)
    assert [piece.text for piece in pieces] == [" one", " two", " three"]
    assert pieces[-1].finish_reason == "length"
    # What was held back for a stop string that never came is given at the end.
    assert "".join(piece.text for piece in answer(" one two", max_tokens=2, stop_strings=["twofold"])) == " one two"
