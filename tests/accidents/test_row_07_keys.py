"""Row 7: a server that was given a key answers nobody without it, and one without a key says who can reach it."""

import urllib.request

import pytest

from serving.server.api_keys import api_keys, warn_if_open
from serving.server.onnx import server as onnx_server
from serving.server.process import is_healthy
from tests.accidents.onnx_service import KEY, Service
from tests.command_line import refused, sentei
from toolchain.errors import SenteiError

BODY = {"prompt": "The", "max_tokens": 1}


def test_the_key_of_the_environment_is_asked_for(service: Service):
    assert service.ask("/v1/completions", BODY)[0] == 200
    for wrong in (None, "", "open", f"{KEY}x", "none"):
        status, message = service.refusal("/v1/completions", BODY, key=wrong)
        assert status == 401 and "Authorization: Bearer" in message and KEY not in message
    assert service.refusal("/v1/models", None, key=None)[0] == 401
    assert service.refusal("/v1/nothing", None, key=None)[0] == 401
    assert service.refusal("/v1/models", None, key=None, Authorization=f"Basic {KEY[:5]}")[0] == 401


def test_health_and_counters_need_none(service: Service):
    assert is_healthy(service.url)
    with urllib.request.urlopen(f"{service.url}/metrics") as response:
        assert b"vllm:prompt_tokens_total" in response.read()


def test_the_key_is_never_printed(service: Service):
    assert "sesame" not in service.log.read_text()


def test_an_option_goes_before_the_environment_and_may_be_several(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    assert api_keys(None) == ("of-the-environment",)
    given = onnx_server._parse(["--api-key", "one", "two", "--api-key=three"])
    assert api_keys(given.api_key) == ("one", "two", "three")
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert api_keys(None) == ()


def test_an_empty_key_is_an_unset_variable(service: Service):
    refused(sentei("serve", service.model, "--", "--api-key", ""), "--api-key is empty")
    with pytest.raises(SenteiError, match="--api-key is empty"):
        api_keys(["good", ""])


def test_a_key_that_no_header_can_carry_is_told(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    for ask in (lambda: api_keys(None), lambda: is_healthy("http://127.0.0.1:9")):
        with pytest.raises(SenteiError, match="line break") as error:
            ask()
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", None, "192.0.2.1"])
def test_a_server_open_to_others_without_a_key_is_warned_of(host, capsys):
    warn_if_open(host, ())
    assert "WARNING" in (said := capsys.readouterr().err) and "asks for no key" in said and "VLLM_API_KEY" in said
    warn_if_open(host, ("key",))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_loopback_there_is_no_warning(host, capsys):
    warn_if_open(host, ())
    assert not capsys.readouterr().err


def test_both_engines_warn(service: Service, capsys, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    done = sentei("serve", service.model, "--", "--host", "0.0.0.0", "--max-model-len", "9000")  # ends before it serves
    assert done.returncode == 2 and "WARNING: the server listens on 0.0.0.0" in done.stderr


def test_a_key_does_not_get_into_results(pico_model, tmp_path):
    done = sentei(
        "benchmark",
        pico_model,
        pico_model,
        "-o",
        tmp_path / "out",
        "--engine",
        "vllm",
        "--engine-option=--api-key=secret",
    )
    refused(done, "--api-key would be written into the results")
    assert "secret" not in done.stderr
