"""The parent's side of :mod:`serving.benchmark.sessions.vllm_client_worker`: a client that is started once.

On two processor cores vLLM's client takes 15 seconds of processor time until it begins, more than many a load.
"""

import json
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from serving.child_process import child_process
from toolchain.lifetime import own_environment


class ClientRun:
    """One command of a client, with what is asked of a process: ``pid``, ``poll`` and ``returncode``."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Begins to wait for the answer of a client that was asked."""
        self._process, self._received = process, b""
        self.pid = process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The command's exit code; ``None`` while it runs."""
        assert self._process.stdout is not None
        while self.returncode is None and select.select([self._process.stdout], [], [], 0)[0]:
            piece = self._process.stdout.read(1 << 10)
            self._received += piece
            if not piece:
                self.returncode = self._process.wait() or 1  # it ended without an answer
            elif self._received.endswith(b"\n"):
                self.returncode = int(self._received)
        return self.returncode


class Client:
    """vLLM's command line in a process that stays; started when it is first asked, and anew after it failed to end."""

    def __init__(self, log: Path) -> None:
        """Starts nothing yet; what the process writes beside its commands goes to ``log``."""
        self._log, self._stack = log, ExitStack()
        self._environment: Mapping[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[ClientRun]:
        """Runs a command while the context lasts; one that has not ended by then is ended with its process."""
        if self._process is None or self._process.poll() is not None or environment != self._environment:
            self.close()
            command = [sys.executable, "-P", "-m", "serving.benchmark.sessions.vllm_client_worker"]
            paths = {"PYTHONPATH": own_environment()["PYTHONPATH"]}
            self._process = self._stack.enter_context(
                child_process(command, {**environment, **paths}, self._log, talks=True)
            )
            self._environment = environment
        assert self._process.stdin is not None
        log.write_bytes(b"")  # there too where the process ends before it writes to it
        asked = {"arguments": list(arguments), "log": str(log.resolve())}
        with suppress(BrokenPipeError):  # it ended already: that is seen when it is waited for
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        run = ClientRun(self._process)
        try:
            yield run
        finally:
            if self._process.poll() is not None:
                with log.open("ab") as said:
                    said.write(self._log.read_bytes())
            if run.poll() is None or self._process.poll() is not None:
                self.close()

    def close(self) -> None:
        """Ends the process; its log stays if it says anything."""
        self._process = None
        self._stack.close()
        if self._log.exists() and not self._log.stat().st_size:
            self._log.unlink()
