"""Row 7: a server that was given a key answers nobody without it, and one without a key says who can reach it."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from serving.server.api_keys import api_keys, warn_if_open
from serving.server.onnx import server as onnx_server
from serving.server.process import is_healthy
from serving.server.vllm.key_guard import KeyGuard
from tests.accidents.onnx_service import KEY, Service
from tests.command_line import refused, sentei
from toolchain.errors import SenteiError

BODY = {"prompt": "The", "max_tokens": 1}

# Runs vLLM's program as sentei starts it, up to where it would load the model. Its real application, with all that a
# developer's server has, is asked for each of its paths without the key.
ASK = """
import asyncio, contextlib, io, json, os, sys
from serving.server.vllm.launcher import answer_for_vllm_cpu
from serving.server.vllm.options import check_when_parsed
answer_for_vllm_cpu()
check_when_parsed()
import vllm.entrypoints.cli.main as cli
import vllm.entrypoints.cli.serve as program
from vllm.entrypoints.launchers.app import build_app

async def status(app, path, *headers):
    sent = []
    async def send(message):
        sent.append(message)
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }
    with contextlib.suppress(Exception):  # many paths want the engine that is not there
        await app(scope, receive, send)
    return sent[0]["status"]

async def look(options):
    found[-1] = {"names": options.served_model_name, "middleware": options.middleware}
    if len(found) == 1:
        app = build_app(options, ("generate", "transcription", "realtime"))
        paths = sorted({getattr(route, "path", "/") for route in app.routes})
        key = (b"authorization", b"Bearer sesame")
        found[0] |= {
            "layers": [each.cls.__name__ for each in app.user_middleware],
            "without": {path: await status(app, path) for path in paths},
            "with": {path: await status(app, path, key) for path in ("/invocations", "/tokenize", "/collective_rpc")},
        }

program.run_server = look
found = []
for key, *options in json.load(open(sys.argv[1])):
    os.environ["VLLM_API_KEY"] = key
    sys.argv = ["vllm", "serve", *options]
    said = io.StringIO()
    found.append(said)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as end:
        found[-1] = {"code": end.code, "said": said.getvalue()}
print(json.dumps(found))
"""
# What tells whether a server is well, and which version it is.
OPEN = {"/health", "/metrics", "/ping", "/version"}


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


@pytest.mark.usefixtures("vllm")
def test_vllm_asks_for_the_key_at_each_of_its_paths(pico_model: Path, tmp_path: Path):
    config, model = tmp_path / "server.yaml", str(pico_model)
    config.write_text("served-model-name: of-the-file\n")
    commands = [
        ["sesame", model, "--middleware", "starlette.middleware.gzip.GZipMiddleware"],
        ["", model, "--api-key", "sesame"],
        ["", model, "--served-model-n", "mine", "ours"],
        ["", model, "--config", str(config)],
        ["sesame", model, "--grpc"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_SERVER_DEV_MODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path / "commands.json")],
        capture_output=True, text=True, timeout=600, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    keyed, by_option, open_to_all, with_a_file, grpc = json.loads(done.stdout.splitlines()[-1])
    assert {"/invocations", "/tokenize", "/detokenize", "/collective_rpc", "/openapi.json"} <= set(keyed["without"])
    assert {path for path, status in keyed["without"].items() if status != 401} == OPEN
    assert set(keyed["with"].values()) == {405}  # which are for POST
    # The user's own may make our header of another one.
    own, guard, theirs = map(keyed["layers"].index, ["GZipMiddleware", "KeyGuard", "CORSMiddleware"])
    assert own < guard < theirs
    assert len(by_option["middleware"]) == 1 and open_to_all["middleware"] == []
    assert [found["names"] for found in (keyed, open_to_all)] == [[pico_model.name], ["mine", "ours"]]
    assert with_a_file["names"] == ["of-the-file"]
    assert grpc["code"] == 2 and "gRPC server asks for no key" in grpc["said"]


async def the_model(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("says something")(scope, receive, send)


def status_of(path: str, key: str = "", *, keys: list[str] | None = None, **more: Any) -> int:
    """The status of an answer behind the guard of a vLLM server with two keys, or those given."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    options = SimpleNamespace(api_key=["sesame", "sésame"] if keys is None else keys)
    scope = {
        "type": "http", "method": "POST", "path": path, "root_path": "",
        "headers": [(b"authorization", key.encode("latin-1"))] if key else [],
        "app": SimpleNamespace(state=SimpleNamespace(args=options)),
    }  # fmt: skip
    asyncio.run(KeyGuard(the_model)(scope | more, None, send))
    return int(sent[0]["status"])


def test_the_guard_of_vllm_wants_one_of_the_keys():
    for right in ("Bearer sesame", "bearer sesame", "Bearer sésame"):
        assert status_of("/invocations", right) == 200
    for wrong in ("", "sesame", "Basic sesame", "Bearer ", "Bearer Sesame", "Bearer sesame ", "Bearer sesam"):
        assert status_of("/invocations", wrong) == 401
    assert status_of("/v1/realtime", type="websocket") == 401
    assert status_of("/v1/realtime", "Bearer sesame", type="websocket") == 200
    assert status_of("/invocations", method="OPTIONS") == 200  # a browser's question, which carries no key
    assert status_of("", type="lifespan") == 200


def test_the_guard_of_vllm_reads_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    assert status_of("/invocations", "Bearer sesame", keys=[]) == 401
    assert status_of("/invocations", "Bearer of-the-environment", keys=[]) == 200
    monkeypatch.delenv("VLLM_API_KEY")
    assert status_of("/invocations", keys=[]) == 200


@pytest.mark.parametrize("path", sorted(OPEN))
def test_the_guard_of_vllm_leaves_health_and_counters_open(path):
    assert status_of(path) == status_of(path, root_path="/api") == status_of(path, root_path="/") == 200
    assert status_of(f"/api{path}", root_path="/api") == status_of(f"/api{path}", root_path="/api/") == 200
    for other in (f"{path}/", f"{path}z", f"/{path}", path.upper(), path[1:], f"{path}/../v1/models", f"/api{path}"):
        assert status_of(other) == 401
    for other in (f"/api/api{path}", f"/api{path[1:]}", "/api/invocations", "/api", ""):
        assert status_of(other, root_path="/api") == 401


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
