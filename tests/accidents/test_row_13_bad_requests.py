"""Row 13: whatever is sent to the server, the answer is JSON in OpenAI's form, and never a traceback."""

from typing import Any

import pytest

from serving.server.onnx import api as onnx_api
from serving.server.onnx.metrics import ServerMetrics
from serving.server.onnx.places import Places
from tests.accidents.onnx_service import Service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HALF = b"\\ud800"  # half of a surrogate pair, as JSON may carry it


def chat(message: Any) -> dict[str, Any]:
    return {"messages": [message], "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, b'{"prompt": "%s"}' % HALF),
        (COMPLETIONS, b'{"prompt": "a", "stop": "%s"}' % HALF),
        (COMPLETIONS, b'{"prompt": "a", "user": "%s"}' % HALF),
        (COMPLETIONS, b'{"prompt": "a", "model": "%s"}' % HALF),
        (CHAT, b'{"messages": [{"role": "user", "content": "%s"}]}' % HALF),
        (CHAT, b'{"messages": [{"role": "%s", "content": "a"}]}' % HALF),
        (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "%s"}]}]}' % HALF),
        (COMPLETIONS, b'{"prompt": "\xff"}'),
        (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'),
        (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}'),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": 1e999}'),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 10**30}),
        (COMPLETIONS, {"prompt": [10**30]}),
        (COMPLETIONS, {"prompt": [-1]}),
        (COMPLETIONS, {"prompt": []}),
        (COMPLETIONS, {"prompt": [None] * 10_000}),
        (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 10_000}),
        (COMPLETIONS, {"prompt": "a", "seed": -1}),
        (COMPLETIONS, {}),
        (COMPLETIONS, []),
        (COMPLETIONS, b""),
        (COMPLETIONS, b"null"),
        (COMPLETIONS, b"prompt=a"),
        (CHAT, chat({"role": 5, "content": "a"})),
        (CHAT, chat({"role": None, "content": "a"})),
        (CHAT, chat({"role": {"user": 1}, "content": "a"})),
        (CHAT, chat({"content": "a"})),
        (CHAT, chat({"role": "user", "content": None})),
        (CHAT, chat({"role": "user", "content": 5})),
        (CHAT, chat({"role": "user", "content": [None]})),
        (CHAT, chat({"role": "user", "content": [{"type": "text", "text": 5}]})),
        (CHAT, chat("a")),
        (CHAT, chat(None)),
        (CHAT, {"messages": {"role": "user"}}),
    ],
)
def test_a_bad_request_is_refused(service: Service, path: str, body: Any):
    status, message = service.refusal(path, body)
    assert status == 400 and message and "Traceback" not in message


@pytest.mark.parametrize("depth", [300, 900, 980, 1000, 1500])
def test_a_field_that_nobody_knows_may_be_nested(service: Service, depth: int):
    nested = b"[" * depth + b"]" * depth
    body = b'{"max_tokens": 1, "ignore_eos": true, "messages": [{"role": "user", "content": "a", "x": %s}]}' % nested
    assert service.ask(CHAT, body)[0] in (200, 400)


def test_other_places_methods_and_types(service: Service):
    assert service.refusal("/v2/nothing", None)[0] == 404
    assert service.refusal("/", {"prompt": "a"})[0] == 404
    assert service.refusal(COMPLETIONS, None)[0] == 405
    assert service.refusal("/health", {"a": 1})[0] == 405
    status, message = service.refusal(COMPLETIONS, b'{"prompt": "a"}', **{"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in message


def test_it_goes_on_and_its_log_has_no_trace(service: Service):
    assert service.answers()
    assert "Traceback" not in service.log.read_text()


def test_a_character_beyond_the_basic_plane_is_no_bad_request(service: Service):
    body = b'{"prompt": "\\ud83c\\udf33", "max_tokens": 1, "ignore_eos": true}'  # a tree, as a pair
    assert service.ask(COMPLETIONS, body)[0] == 200


def test_the_unexpected_is_json_too_and_tells_nothing(monkeypatch: pytest.MonkeyPatch):
    """The last handler, and the trace for the log."""
    from starlette.testclient import TestClient

    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("/secret/path")

    api = object.__new__(onnx_api.OnnxApi)  # without a model
    api._template, api._tokenizer, api._max_model_len, api._names = None, fails, 9, ("m",)
    api._max_chars, api._timeout_s = 9, 60
    api._places, api._metrics = Places(1), ServerMetrics("m", 9)
    with pytest.raises(ZeroDivisionError):  # uvicorn logs it
        TestClient(api.app()).post(COMPLETIONS, json={"prompt": "a"})
    answer = TestClient(api.app(), raise_server_exceptions=False).post(COMPLETIONS, json={"prompt": "a"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "internal_server_error"
    assert "secret" not in answer.text and "log" in answer.json()["error"]["message"]
