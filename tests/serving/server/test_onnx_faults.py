"""One test for each thing that goes wrong in the ONNX server: what the client is told, and that the others go on.

A real export of a pico model in a real server; what is broken is broken on purpose, in this process.
"""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.engines.sampling import Sampler
from serving.server.onnx import api as onnx_api
from serving.server.onnx import batch_thread, http_connections, http_guards
from serving.server.onnx.api import OnnxApi, ServerLimits
from serving.server.onnx.continuous_batch import BatchRequest, OnnxBatch
from serving.server.onnx.places import Places
from tests.accidents.processes import wait_for
from tests.serving.server.in_process import CHAT, COMPLETIONS, Gate, Served, serving, write_pico_onnx
from toolchain.errors import SenteiError

LIMITS = ServerLimits(max_num_seqs=2, max_model_len=256)


@pytest.fixture(scope="module")
def export(demo_pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_onnx(demo_pico, tmp_path_factory.mktemp("onnx"), context=256)


@pytest.fixture(scope="module")
def served(export: Path) -> Iterator[Served]:
    with serving(OnnxApi(export, LIMITS)) as running:
        yield running


@pytest.fixture
def gate(served: Served, monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(served.api)
    monkeypatch.setattr(served.api._engine, "step", gate)
    return gate


@pytest.fixture(autouse=True)
def good_after_all(served: Served) -> Iterator[None]:
    """Whatever a test broke: all places are free again afterwards, and the server answers."""
    yield
    served.api._thread._probed_at = 0.0
    wait_for(lambda: served.ask("/ready").status == 200, 20)
    wait_for(lambda: served.api._places._free == LIMITS.max_num_seqs + LIMITS.max_num_queued_reqs, 20)
    assert served.ask("/health").status == 200
    assert served.complete().content["usage"]["completion_tokens"] == 4


class Panic(BaseException):
    """What a library in Rust raises when it panics; it is no ``Exception``."""

    __module__ = "pyo3_runtime"


@pytest.mark.parametrize("told", ["whole", "stream", "stream that has begun"])
@pytest.mark.parametrize("error", [ValueError("of its own"), Panic("of its own")])
@pytest.mark.parametrize("place", ["sampler", "detokeniser"])
def test_what_fails_in_one_row_ends_that_request_alone(
    served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    place: str, error: BaseException, told: str,
):  # fmt: skip
    expected = served.complete(max_tokens=40).content["choices"][0]["text"]
    picked, taken = Sampler.pick, onnx_api.AnswerText.take
    good = [None] * (told == "stream that has begun")  # its first token is

    def pick(self: Sampler, logits: Any) -> int:
        if self._draws and not (good and good.pop() is None):  # the one with a temperature
            raise error
        return picked(self, logits)

    def take(self: Any, token: int) -> bool:
        if self._stop_strings and not (good and good.pop() is None):  # the one with a stop string
            raise error
        return taken(self, token)

    if place == "sampler":
        monkeypatch.setattr(Sampler, "pick", pick)
    else:
        monkeypatch.setattr(onnx_api.AnswerText, "take", take)
    with gate.closed():
        others, threads = served.in_background(max_tokens=40)
        wait_for(lambda: served.api._batch.num_running == 1, 10)
        failed, more = served.in_background(temperature=1, stop=["never"], stream=told != "whole")
    for thread in (*threads, *more):
        thread.join(30)
    assert others[0].content["choices"][0]["text"] == expected
    if told == "stream that has begun":
        failed_error = json.loads(failed[0].content.split("data: ")[-1])["error"]
        assert (failed[0].status, failed_error["code"], failed_error["type"]) == (200, 500, "internal_server_error")
    else:
        assert failed[0].status == 500 and "its log says why" in failed[0].error
    assert "of its own" not in str(failed[0].content)
    record = next(each for each in caplog.records if each.message == "A request failed.")
    assert record.exc_info and "of its own" in str(record.exc_info[1])


def test_a_step_that_one_row_spoils_is_run_again_without_it(
    served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The engine fails as soon as one row is in a step, and nobody is told whose fault it is."""
    expected = served.complete(max_tokens=40).content["choices"][0]["text"]
    poison, poisoned = 4321, []

    def spoiled(cache: Any, rows: Any) -> Any:
        logits = gate(cache, rows)
        if [poison] in [list(row) for row in rows]:  # its prompt; from then on its row of the cache
            poisoned.append(cache.first_row)
            return logits
        if any(cache.first_row <= index < cache.first_row + len(rows) for index in poisoned):
            cache.lengths[:] -= 1
            raise SenteiError("A kernel gave up.")
        return logits

    monkeypatch.setattr(served.api._engine, "step", spoiled)
    with gate.closed():
        others, threads = served.in_background(max_tokens=40)
        wait_for(lambda: served.api._batch.num_running == 1, 10)  # in the first row
        failed, more = served.in_background(prompt=[poison])
        wait_for(lambda: served.api._thread.num_waiting == 1, 10)
    for thread in (*threads, *more):
        thread.join(30)
    assert failed[0].status == 500
    assert others[0].content["choices"][0]["text"] == expected
    assert "A kernel gave up." in caplog.text


def test_errors_of_onnx_runtime_are_logged(export: Path, served: Served, caplog: pytest.LogCaptureFixture):
    """A real one: a token that the embedding does not have, which the endpoints refuse before it comes so far."""
    batch = OnnxBatch(served.api._engine, max_num_seqs=1, max_model_len=64)
    told: list[Exception] = []
    batch.join(BatchRequest(prompt=[10**9], take=lambda token: True, fail=told.append))
    batch.step()
    assert len(told) == 1 and batch.is_empty
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.exc_info and "failed in ONNX Runtime" in str(record.exc_info[1])
    assert record.exc_info[1].__cause__ is not None and "Gather" in str(record.exc_info[1].__cause__)


def test_both_turn_red_when_the_engine_fails_again_and_again_and_green_when_it_is_well(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise SenteiError("Out of memory on the device.")

    with monkeypatch.context() as patch:
        patch.setattr(served.api._engine, "step", fail)
        assert served.complete().status == 500
        assert served.ask("/health").status == 200  # once may happen
        assert served.complete().status == served.complete().status == 500
        health = served.ask("/health")
        assert health.status == 503 and "failed 3 times in a row" in health.error
        assert served.ask("/ready").status == 503
    assert served.ask("/ready").status == 200
    assert served.ask("/health").status == 200


def test_ready_asks_the_engine_for_a_token(served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_thread, "_PROBE_AGE_S", 0.0)
    before = gate.steps
    assert served.ask("/ready").status == 200
    assert gate.steps == before + 1

    def without_numbers(cache: Any, rows: Any) -> Any:
        return [np.full_like(logits, np.nan) for logits in gate(cache, rows)]

    monkeypatch.setattr(served.api._engine, "step", without_numbers)
    assert served.ask("/health").status == 200
    for _ in range(3):
        answer = served.ask("/ready")
        assert answer.status == 503 and "failed to give a token" in answer.error
    assert served.ask("/health").status == 503


def test_asking_often_whether_it_is_ready_costs_the_engine_little(served: Served, gate: Gate):
    before = gate.steps
    for _ in range(30):
        assert served.ask("/ready").status == 200
    assert gate.steps - before < 10


def test_both_turn_red_when_a_step_is_stuck(served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_thread, "_STUCK_S", 0.3)
    with gate.closed():
        _, threads = served.in_background()
        wait_for(lambda: served.ask("/health").status == 503, 10)
        assert "at one step for more than 0.3 s" in served.ask("/health").error
        assert served.ask("/ready", timeout_s=5).status == 503
    threads[0].join(30)
    assert served.ask("/health").status == 200


def test_ready_does_not_wait_for_ever(served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_api, "_READY_TIMEOUT_S", 0.2)
    served.api._thread._probed_at = 0.0
    with gate.closed():
        assert "no token within" in served.ask("/ready", timeout_s=5).error


def test_one_request_too_many_is_told_when_to_come_again(served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served.api, "_places", Places(3, refused=served.api._metrics.refused.inc))
    before = served.numbers()["vllm:admission_rejections_total"]
    with gate.closed():
        answers, threads = served.in_background(3)
        wait_for(lambda: served.numbers()["vllm:num_requests_waiting"] >= 1, 10)
        wait_for(lambda: not served.api._places._free, 10)
        refused = served.complete()
        assert refused.status == 429 and "Try again later" in refused.error
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.content["error"]["type"] == "rate_limit_error"
        assert served.ask("/health").status == 200
    for thread in threads:
        thread.join(30)
    assert [answer.status for answer in answers] == [200] * 3
    assert served.complete().status == 200
    assert served.numbers()["vllm:admission_rejections_total"] == before + 1
    monkeypatch.undo()


@pytest.mark.parametrize(
    "bad",
    [{"temperature": 9}, {"prompt": ""}, {"prompt": [10**6]}, {"max_tokens": 300}, {"prompt": ["a", "b"]}],
)
def test_a_request_that_is_refused_takes_nobodys_place(
    served: Served, monkeypatch: pytest.MonkeyPatch, bad: dict[str, Any]
):
    with monkeypatch.context() as patch:
        patch.setattr(served.api, "_places", Places(1))
        assert served.complete(**bad).status == served.complete(**bad).status == 400
        assert served.complete().status == 200


def test_who_hangs_up_while_waiting_leaves_a_place(served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(served.api, "_places", Places(3))
        body = json.dumps({"prompt": [5], "max_tokens": 9, "stream": True}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with gate.closed():
            connections = [socket.create_connection(served.address) for _ in range(3)]
            for connection in connections:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: not served.api._places._free, 10)
            for connection in connections:
                connection.close()
            wait_for(lambda: served.api._places._free == 3, 10)
    wait_for(lambda: served.numbers()["vllm:num_requests_running"] == 0, 10)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(
    served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch, stream: bool
):
    monkeypatch.setattr(served.api, "_timeout_s", 0.3)
    with gate.closed():
        answer = served.complete(stream=stream)
    assert answer.status == 408 and "not finished within 0.3 s" in answer.error
    monkeypatch.undo()
    wait_for(lambda: served.numbers()["vllm:num_requests_running"] == 0, 10)


def test_a_stream_that_takes_too_long_says_so_at_its_end(served: Served, monkeypatch: pytest.MonkeyPatch):
    step = served.api._engine.step
    monkeypatch.setattr(served.api, "_timeout_s", 1.0)
    monkeypatch.setattr(
        served.api._engine, "step", lambda cache, rows: (len(rows[0]) > 1 or not time.sleep(2)) and step(cache, rows)
    )
    answer = served.complete(stream=True)
    error = json.loads(answer.content.split("data: ")[-1])["error"]
    assert (answer.status, error["code"], error["type"]) == (200, 408, "timeout_error")
    monkeypatch.undo()
    wait_for(lambda: served.numbers()["vllm:num_requests_running"] == 0, 10)


def test_a_chat_that_waits_too_long_for_its_template_is_ended(served: Served, monkeypatch: pytest.MonkeyPatch):
    assert served.api._template
    monkeypatch.setattr(served.api, "_timeout_s", 0.2)
    monkeypatch.setattr(served.api._template, "render", lambda messages: time.sleep(1) or "late")
    answer = served.ask(CHAT, {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status == 408, answer


def test_a_body_that_does_not_come_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_guards, "_BODY_TIMEOUT_S", 0.3)
    with socket.create_connection(served.address) as connection:
        connection.settimeout(10)
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        received = connection.recv(4096)
    assert b" 408 " in received.partition(b"\r\n")[0] and b"timeout_error" in received


def test_stop_strings_are_bounded(served: Served):
    assert served.complete(stop=["a" * 256, "b"]).status == 200
    for stop in ("a" * 257, ["b", "a" * 257]):
        answer = served.complete(stop=stop)
        assert answer.status == 400 and "stop" in answer.error and "256" in answer.error


def test_what_is_no_http_is_answered_in_openais_form(served: Served):
    with socket.create_connection(served.address) as connection:
        connection.settimeout(10)
        connection.sendall(b"HELLO?\r\n\r\n")
        received = b""
        while piece := connection.recv(4096):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 400 " in head and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_who_reads_nothing_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch):
    """An answer larger than all buffers, asked for by somebody who does not take it."""
    size = 2**26
    monkeypatch.setattr(http_connections, "_READER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(onnx_api, "generate_latest", lambda registry: b"x" * size)
    with socket.create_connection(served.address) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.5)
        received = 0
        with suppress(ConnectionError):
            while piece := connection.recv(2**20):
                received += len(piece)
    assert 0 < received < size


def test_no_answer_tells_the_path_of_the_model(served: Served, export: Path):
    answers = [
        served.ask("/v1/models"), served.complete(), served.complete(stream=True), served.complete(model="gpt"),
        served.ask(CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}), served.ask("/metrics"),
        served.complete(model=str(export)),
    ]  # fmt: skip
    assert [answer.status for answer in answers] == [200, 200, 200, 404, 200, 200, 404]
    for answer in answers[:-1]:
        assert str(export.parent) not in str(answer.content)
    assert served.ask("/v1/models").content["data"][0]["id"] == served.complete().content["model"] == export.name


def test_names_are_the_users_to_give(export: Path):
    with serving(OnnxApi(export, LIMITS, names=["small", "our/assistant"])) as named:
        assert [each["id"] for each in named.ask("/v1/models").content["data"]] == ["small", "our/assistant"]
        assert named.complete(model="our/assistant").content["model"] == "small"
        assert named.complete(model=export.name).status == 404


def test_memory_of_the_cache_is_not_promised_twice(served: Served):
    """Two rows are free, and there is memory for one of the requests: the second waits, and is answered as if alone."""
    engine = served.api._engine
    batch = OnnxBatch(engine, max_num_seqs=2, max_model_len=256, kv_tokens=128)
    tokens: list[list[int]] = [[], []]

    def asked(index: int) -> BatchRequest:
        def take(token: int) -> bool:
            tokens[index].append(token)
            return len(tokens[index]) < 60

        return BatchRequest(prompt=[100 + index] * 40, take=take, max_tokens=60)

    small = BatchRequest(prompt=[1], take=lambda token: False, max_tokens=1)
    batch.join(asked(0))
    assert batch.has_room and not batch.fits(asked(1)) and not batch.fits(small)
    assert batch.kv_usage == 1
    while not batch.fits(asked(1)):
        batch.step()
    batch.join(asked(1))
    while not batch.is_empty:
        batch.step()
    assert tokens == [engine.generate([100] * 40, 60), engine.generate([101] * 40, 60)]


def test_a_row_gives_its_memory_back(served: Served):
    """Resident memory grows with the tokens of a row, not with what a row could hold, and shrinks when it leaves."""
    from serving.engines.kv_pages import KvPages

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    pages = KvPages((2, 4, 2**20, 16))  # 256 MiB in each row
    assert resident() - before < 2**22
    pages.array[1, :, : 2**18] = 1  # a quarter of each head
    assert 2**25 < resident() - before < 2**27
    pages.array[0, 0, 0] = 1
    pages.give_back(1)
    assert resident() - before < 2**23
    assert pages.array[0, 0, 0].all() and not pages.array[1].any()


def test_a_cache_that_the_machine_has_no_memory_for_is_refused_at_the_start(
    export: Path, monkeypatch: pytest.MonkeyPatch
):
    per_token = 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads, values, bytes
    monkeypatch.setattr(onnx_api, "available_bytes", lambda device: 200 * per_token)
    with pytest.raises(SenteiError, match=r"256 tokens takes .* memory for 160 tokens.* --max-model-len 160"):
        OnnxApi(export, LIMITS)
    api = OnnxApi(export, ServerLimits(max_num_seqs=2, max_model_len=160))
    assert api._batch._kv_tokens == 160
