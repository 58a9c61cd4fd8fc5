"""What the watched client does about servers that hang, die, refuse or fail; a script stands in for vLLM's client."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serving.benchmark.sessions import vllm_client as bench_client
from serving.benchmark.sessions.vllm_client import bench_serve
from serving.benchmark.sessions.vllm_client_process import Client
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.server.process import is_healthy
from toolchain.errors import SenteiError

RESULT = {"num_prompts": 4, "completed": 4, "failed": 0, "duration": 0.1}


@pytest.fixture
def server():
    """Answers like vLLM; what follows can be set, and tokens stand still while ``hung``, or are not ``counted``."""
    state = {
        "key": None,
        "healthy": True,
        "hung": False,
        "counted": True,
        "tokens": 0,
        "models": '{"data": [{"id": "m"}]}',
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if state["key"] and self.headers.get("Authorization") != f"Bearer {state['key']}":
                return self.answer(401, "{}")
            if self.path == "/health":
                return self.answer(200 if state["healthy"] else 503, "")
            if self.path == "/metrics" and not state["counted"]:
                return self.answer(404, "")
            if self.path == "/metrics":
                state["tokens"] += not state["hung"]
                return self.answer(200, f'vllm:generation_tokens_total{{model_name="m"}} {state["tokens"]}.0\n')
            return self.answer(200, state["models"])

        def answer(self, code, body):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{listening.server_port}"
    yield state
    listening.shutdown()


@pytest.fixture(params=["own process", "stays"])
def client(request, monkeypatch, tmp_path):
    """Runs ``script`` in place of vLLM's client, with the result's path in ``RESULT``; once, or in one that stays."""
    staying = Client(tmp_path / "client.log") if request.param == "stays" else None
    if staying:
        stand_in_for_vllm(tmp_path / "stand-in")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"), prepend=os.pathsep)

    def run(script, server, **settings):
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(bench_client, "launcher_command", lambda *arguments: command)
        monkeypatch.setenv("RESULT", str(tmp_path / "result.json"))
        monkeypatch.setenv("SCRIPT", script)
        return bench_serve(
            server["url"], tmp_path, options=[], result_file=tmp_path / "result.json", client=staying, **settings
        )

    yield run
    if staying:
        staying.close()


def stand_in_for_vllm(directory):
    """A package whose command line runs ``SCRIPT``."""
    for package in ("vllm", "vllm/entrypoints", "vllm/entrypoints/cli", "vllm/utils"):
        (directory / package).mkdir(parents=True, exist_ok=True)
        (directory / package / "__init__.py").touch()
    (directory / "vllm/entrypoints/cli/main.py").write_text(
        "import os\ndef main():\n    exec(os.environ['SCRIPT'], {})\n"
    )
    (directory / "vllm/utils/argparse_utils.py").write_text(
        "import argparse\nclass FlexibleArgumentParser(argparse.ArgumentParser):\n    pass\n"
    )


def writing(result, *, said=""):
    return f"import os; print({said!r}); open(os.environ['RESULT'], 'w').write({json.dumps(result)!r})"


def test_a_hung_server_is_given_up_and_its_client_ended(client, server, tmp_path):
    server["hung"] = True
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(EngineFailedError, match="hung: no token in or out for 2 s"):
        client(script, server, stall_timeout_s=2)
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_slow_server_that_gives_tokens_is_waited_for(client, server):
    script = "import time; time.sleep(4);" + writing(RESULT)
    assert client(script, server, stall_timeout_s=2)["completed"] == 4


def test_a_server_without_counters_is_not_called_hung(client, server):
    server["counted"] = False
    script = "import time; time.sleep(3);" + writing(RESULT)
    assert client(script, server, stall_timeout_s=1)["completed"] == 4


def test_a_server_that_no_longer_answers_is_hung(client, server, monkeypatch):
    def tokens_so_far(base_url, api_key):
        raise IncompleteRead(b"")

    monkeypatch.setattr(bench_client, "_tokens_so_far", tokens_so_far)
    with pytest.raises(EngineFailedError, match="hung"):
        client("import time; time.sleep(60)", server, stall_timeout_s=1)


@pytest.mark.parametrize("models", ['{"data": null}', "[]", "{}", '{"data": []}', "<html>"])
def test_what_is_no_list_of_models_is_one_sentence(server, models):
    server["models"] = models
    with pytest.raises(SenteiError, match="No vLLM server answers at http://127"):
        bench_client.served_model_name(server["url"])


def test_what_speaks_no_http_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def answer():
            for _ in range(2):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b"no HTTP at all\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(SenteiError, match=f"No vLLM server answers at {url}"):
            bench_client.served_model_name(url)
        assert not is_healthy(url)
    with pytest.raises(SenteiError, match=r"No vLLM server answers at .*80a0"):
        bench_client.served_model_name("http://127.0.0.1:80a0")


def test_the_client_has_the_servers_key_and_no_proxy_to_this_machine(client, server, tmp_path, monkeypatch):
    server["key"] = "servers"
    monkeypatch.setenv("VLLM_API_KEY", "servers")
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet")
    names = ("OPENAI_API_KEY", "NO_PROXY", "no_proxy")
    told = tmp_path / "told.json"
    script = f"import json, os; json.dump([os.environ[name] for name in {names}], open({str(told)!r}, 'w'));"
    assert client(script + writing(RESULT), server)["completed"] == 4
    assert json.loads(told.read_text()) == ["servers", "intranet,127.0.0.1", "intranet,127.0.0.1"]


def test_a_key_of_this_machine_stays_on_it(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "intranet")
    environment = bench_client._client_environment("http://elsewhere:8000", None)
    assert "OPENAI_API_KEY" not in environment
    assert environment["NO_PROXY"] == "intranet"
    assert bench_client._client_environment("http://elsewhere:8000", "its own")["OPENAI_API_KEY"] == "its own"


def test_a_server_that_dies_is_told_from_a_client_that_does(client, server):
    with pytest.raises(SenteiError, match=r"(?s)exit code 3.*broken") as told:
        client("import sys; print('broken'); sys.exit(3)", server)
    assert not isinstance(told.value, EngineFailedError)
    server["healthy"] = False
    with pytest.raises(EngineFailedError, match="no longer answers"):
        client("import sys; sys.exit(3)", server)
    with pytest.raises(EngineFailedError, match=r"no longer answers \(Connection reset\)"):
        client(writing({**RESULT, "completed": 2}, said="Error 0: Connection reset"), server)


def test_failed_requests_are_in_the_result_with_the_first_error(client, server):
    result = client(writing({**RESULT, "completed": 3}, said="Error 0: Bad Request"), server)
    assert (result["completed"], result["first_error"]) == (3, "Bad Request")
    with pytest.raises(EngineFailedError, match="Every one of 4 requests failed: Bad Request"):
        client(writing({**RESULT, "completed": 0}, said="Error 0: Bad Request"), server)


def test_a_key_is_given_and_a_wrong_one_is_told(client, server, monkeypatch):
    server["key"] = "right"
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert client(writing(RESULT), server, api_key="right")["completed"] == 4
    with pytest.raises(SenteiError, match=r"(?s)refused by the server.*401.*--api-key-env"):
        client(writing(RESULT), server, api_key="wrong")


def test_the_client_ends_with_a_killed_benchmark(server, tmp_path):
    # The launcher itself watches for its parent; vLLM is not needed for that.
    waiting = (
        "import os, time; from toolchain.lifetime import end_with_parent; end_with_parent();"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = (
        "import sys; from pathlib import Path; from serving.benchmark.sessions import vllm_client as bench_client;"
        f"bench_client.launcher_command = lambda *a: [sys.executable, '-c', {waiting!r}];"
        f"file = Path({str(tmp_path / 'r.json')!r});"
        f"bench_client.bench_serve({server['url']!r}, Path('.'), options=[], result_file=file)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    log, deadline = tmp_path / "r.log", time.monotonic() + 60
    while not (log.is_file() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stat = Path(f"/proc/{int(log.read_text())}/stat")
    deadline = time.monotonic() + 20
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_client_that_stays_is_started_once_and_anew_after_it_was_ended(server, tmp_path, monkeypatch):
    """It takes longer to start than a load; what one run has left must not be taken for the next one's."""
    stand_in_for_vllm(tmp_path / "stand-in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"), prepend=os.pathsep)
    monkeypatch.setenv(
        "SCRIPT",
        "import json, os, sys, time\n"
        "directory, number = sys.argv[sys.argv.index('--result-dir') + 1], int(sys.argv[-1])\n"
        "print('run', number)\n"
        "if number == 2: raise ValueError('no good')\n"
        "if number == 4: time.sleep(60)\n"
        "if number == 6: os._exit(0)\n"
        "name = sys.argv[sys.argv.index('--result-filename') + 1]\n"
        "json.dump({'num_prompts': 1, 'completed': 1, 'duration': 0.1, 'pid': os.getpid()}, "
        "open(os.path.join(directory, name), 'w'))\n",
    )
    staying = Client(tmp_path / "client.log")

    def pid(number, **more):
        file = tmp_path / f"{number}.json"
        options = ["--number", str(number)]
        return bench_serve(server["url"], tmp_path, options=options, result_file=file, client=staying, **more)["pid"]

    first = pid(1)
    with pytest.raises(SenteiError, match=r"(?s)exit code 1.*run 2.*ValueError: no good"):
        pid(2)
    assert pid(3) == first
    server["hung"] = True
    with pytest.raises(EngineFailedError, match="hung"):
        pid(4, stall_timeout_s=1)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    server["hung"] = False
    second = pid(5)
    assert second != first
    with pytest.raises(SenteiError, match=r"(?s)exit code 1.*run 6"):
        pid(6)
    third = pid(7)
    server["key"] = "another"
    assert len({first, second, third, pid(8, api_key="another")}) == 4
    staying.close()
    assert not (tmp_path / "client.log").exists()


def test_a_client_that_cannot_start_says_why(server, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text("import sys; sys.stderr.write('no vllm here'); sys.exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=os.pathsep)
    staying = Client(tmp_path / "client.log")
    with pytest.raises(SenteiError, match=r"(?s)exit code [1-9].*no vllm here"):
        bench_serve(server["url"], tmp_path, options=[], result_file=tmp_path / "result.json", client=staying)
    staying.close()
