"""Row 5: whatever a killed server had started is gone soon after, and nothing else is."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.server.process import free_port, is_healthy
from tests.accidents.processes import descendants, exists, wait_for
from tests.command_line import PROGRAM

# As vLLM starts its processes from the launcher: a child, which starts a child, which runs for ever.
PROGRAM_WITH_CHILDREN = """
import multiprocessing, os, sys, time
from toolchain.lifetime import end_with_multiprocessing_parent

def run(method, depth):
    print(os.getpid(), flush=True)
    if depth:
        multiprocessing.get_context(method).Process(target=run, args=(method, depth - 1)).start()
    time.sleep(300)

if __name__ == "__main__":
    end_with_multiprocessing_parent()
    run(sys.argv[1], 2)
elif __name__ == "__mp_main__":
    end_with_multiprocessing_parent(being_spawned=True)
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_children_end_with_a_killed_parent_and_its_group_does_not(method: str, tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM_WITH_CHILDREN)
    shell = f"sleep 300 & echo $!; exec {sys.executable} -m program {method}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        ["/bin/sh", "-c", shell], stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            assert process.stdout
            neighbour, parent, *children = (int(process.stdout.readline()) for _ in range(4))
            assert parent == process.pid
            time.sleep(0.5)
            assert all(map(exists, children))
            os.kill(parent, signal.SIGKILL)
            wait_for(lambda: not any(map(exists, children)), 15)
            assert exists(neighbour)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_plugin_ties_only_engines_that_sentei_started(monkeypatch: pytest.MonkeyPatch):
    from serving.vllm_plugin import registration as vllm_plugin

    called = []
    stand_in = type(sys)("vllm")
    stand_in.ModelRegistry = None
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(vllm_plugin, "end_with_multiprocessing_parent", lambda: called.append(1))
    monkeypatch.setattr(vllm_plugin, "FAMILIES", {})
    monkeypatch.setattr(vllm_plugin, "ask_with_each_width", lambda: None)
    vllm_plugin.register()
    assert not called
    monkeypatch.setenv(vllm_plugin.ENGINE_VARIABLE, "1")
    vllm_plugin.register()
    assert called


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("when", ["starting", "serving"])
def test_a_killed_server_leaves_nothing(pico_model: Path, tmp_path: Path, when: str):
    """``tests/serving/server/test_vllm.py`` does the same by default to a server that it has anyway."""
    port = free_port()
    options = ["--port", str(port), "--max-model-len", "64", "--enforce-eager", "--kv-cache-memory-bytes", "100M"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [PROGRAM, "serve", str(pico_model), "--", *options], stdout=log, stderr=log, start_new_session=True
        )
    try:
        if when == "starting":
            wait_for(lambda: len(descendants(server.pid)) > 1, 300)  # the resource tracker, and the engine
        else:
            wait_for(lambda: is_healthy(f"http://127.0.0.1:{port}"), 300)
        started = descendants(server.pid)
        server.kill()
        server.wait()
        wait_for(lambda: not any(map(exists, started)), 60)  # of which an engine that starts may import for long
    finally:
        server.kill()


def test_the_process_that_quantises_ends_with_a_killed_command(tmp_path: Path):
    # In place of llm-compressor's Python: one that takes long, and ends with its parent as the real worker does.
    python = tmp_path / "python"
    long_work = (
        "import os, time; from pathlib import Path; from export.quantize_worker import end_with_parent; "
        f"end_with_parent(); Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(300)"
    )
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c {shlex.quote(long_work)}\n")
    python.chmod(0o755)
    arguments = f"{str(python)!r}, {{}}, Path({str(tmp_path)!r}), print"
    command = f"from pathlib import Path; from export.quantize import _run; _run({arguments})"
    parent = subprocess.Popen([sys.executable, "-c", command])
    try:
        wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text(), 120)
        child = int((tmp_path / "pid").read_text())
        assert exists(child)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not exists(child), 15)
