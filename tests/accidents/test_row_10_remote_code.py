"""Row 10: in no spelling that vLLM takes do its options run code from the checkpoint, or open a server unsaid."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.engines.vllm_environment import check_plugins
from serving.server.vllm import server as vllm_server
from toolchain.errors import SenteiError

# Parses each command line as vLLM's own program does, and writes what became of it instead of running it.
PARSE = """
import contextlib, io, json, sys
from serving.server.vllm.launcher import answer_for_vllm_cpu
from serving.server.vllm.options import check_when_parsed
answer_for_vllm_cpu()
check_when_parsed()
import vllm.entrypoints.cli.main as cli
from vllm.utils.argparse_utils import FlexibleArgumentParser
checked = FlexibleArgumentParser.parse_args
hosts = []
def parse_only(self, *arguments):
    hosts.append(vars(checked(self, *arguments)).get("host"))
    sys.exit(0)
FlexibleArgumentParser.parse_args = parse_only
found = []
for command in json.load(open(sys.argv[1])):
    said = io.StringIO()
    sys.argv = ["vllm", *command]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as end:
        found.append([end.code, said.getvalue(), hosts.pop() if hosts else None])
print(json.dumps(found))
"""


@pytest.mark.usefixtures("vllm")
def test_every_spelling_is_refused_and_nothing_else(pico_model: Path, tmp_path: Path):
    config, harmless, public = (tmp_path / name for name in ("config.yaml", "harmless.yaml", "public.yaml"))
    config.write_text("port: 9123\ntrust_remote_code: true\n")
    harmless.write_text("port: 9123\ntrust-remote-code: false\n")
    public.write_text("host: 0.0.0.0\n")
    plugin, own = pico_model / "parser.py", tmp_path / "parser.py"
    draft = json.dumps({"model": "draft", "num_speculative_tokens": 1, "trust_remote_code": True})
    model = str(pico_model)

    def served(*options: str) -> list[str]:
        return ["serve", model, *vllm_server._serve_options(options)]

    refused = [
        ["serve", model, "--trust-remote-code"],
        ["serve", model, "--trust_remote_code"],
        ["serve", model, "--trust-remote-c"],
        ["serve", model, "--trust_rem"],
        ["serve", model, "--config", str(config)],
        ["serve", model, "--speculative-config", draft],
        ["serve", model, "--speculative-config.trust_remote_code", "true"],
        ["serve", model, "--hf-overrides", '{"text_config": {"trust_remote_code": true}}'],
        ["serve", model, "--tool-parser-plugin", str(plugin)],
        ["serve", "--model", model, "--reasoning-parser-plugin", f"{pico_model}/../{pico_model.name}/parser.py"],
        ["bench", "throughput", "--model", model, "--trust-remote-c"],
        ["bench", "latency", "--model", model, "--trust_remote_code"],
    ]
    empty = [["serve", model, "--api-key", ""]]
    warned = [["serve", model, "--host", "0.0.0.0"], served("--config", str(public))]
    fine: list[tuple[str | None, list[str]]] = [
        ("127.0.0.1", ["serve", model]),
        ("127.0.0.1", ["serve", model, "--host", "127.0.0.1", "--no-trust-remote-code", "--max-model-len", "64"]),
        ("127.0.0.1", ["serve", model, "--tool-parser-plugin", str(own), "--middleware", "mine.Middleware"]),
        ("127.0.0.1", served("--config", str(harmless))),
        ("127.0.0.1", served("--config", str(public), "--host", "127.0.0.1")),
        ("0.0.0.0", served("--config", str(public), "--api-key", "secret")),
        (None, served("--uds", "/tmp/socket")),
        (None, ["bench", "latency", "--model", model]),
    ]
    commands = [*refused, *empty, *warned, *(command for _, command in fine)]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("VLLM_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(tmp_path / "commands.json")],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = iter(json.loads(done.stdout.splitlines()[-1]))
    for command in refused:
        code, said, _ = next(answers)
        assert code == 2 and "would run code from the checkpoint" in said, (command, said)
    assert "--api-key is empty" in next(answers)[1]
    for _ in warned:
        code, said, host = next(answers)
        assert (code, host) == (0, "0.0.0.0") and "WARNING" in said and "asks for no key" in said
    for expected, command in fine:
        code, said, host = next(answers)
        assert (code, host) == (0, expected) and "WARNING: the server" not in said, (command, said)


def test_the_launcher_checks(monkeypatch: pytest.MonkeyPatch):
    """What the test above installs is what the launcher installs, before vLLM runs."""
    from serving.server.vllm import launcher as vllm_launcher

    order = []
    monkeypatch.setattr("serving.server.vllm.options.check_when_parsed", lambda: order.append("check"))
    stand_in = type(sys)("vllm.entrypoints.cli.main")
    stand_in.main = lambda: order.append("vllm")
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.cli.main", stand_in)
    for name in ("vllm", "vllm.entrypoints", "vllm.entrypoints.cli"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr(vllm_launcher, "answer_for_vllm_cpu", lambda: None)
    monkeypatch.setattr(vllm_launcher, "end_with_multiprocessing_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    vllm_launcher.main()
    assert order == ["check", "vllm"]


def test_a_server_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    with pytest.raises(SenteiError, match=r"leaves out sentei's plugin.*VLLM_PLUGINS=lora_filesystem_resolver,sentei"):
        vllm_server.checked_options([])
    monkeypatch.setenv("VLLM_PLUGINS", "other,sentei")
    check_plugins()
    monkeypatch.delenv("VLLM_PLUGINS")
    check_plugins()
