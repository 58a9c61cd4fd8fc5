"""The parent's side of :mod:`serving.benchmark.sessions.worker`: starts it, asks it, and says why it died or hung."""

import json
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.child_process import child_process
from toolchain.errors import SenteiError
from toolchain.lifetime import own_environment

_TAIL_LINES = 8


class EngineFailedError(SenteiError):
    """What runs a model died, hung, or answered nothing: a measurement is lost, another attempt may succeed."""


class Worker:
    """A running worker process. One question at a time; it sits idle, without spinning, between them."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        """Takes over a process with pipes; what it and its libraries print is in ``log``."""
        self.name, self.process, self._log = name, process, log

    def ask(self, command: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer, between two signs of life no longer than ``timeout_s``.

        Raises:
            SenteiError: The worker refused.
            EngineFailedError: It died, or hung; with the end of what it wrote.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._death() from error
        answer = json.loads(self._line(timeout_s))
        if "error" in answer:
            raise SenteiError(f"{self.name}: {answer['error']}", answer["hint"])
        return answer

    def _line(self, timeout_s: float) -> bytes:
        """The next line of the process that is not empty; empty ones only say that it lives."""
        assert self.process.stdout is not None
        received = b""
        while not received.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], timeout_s)[0]:
                raise EngineFailedError(
                    f"The process that measured the {self.name} model hung: no token for {timeout_s:.0f} s. "
                    f"{self._last_words()}"
                )
            if not (piece := self.process.stdout.read(1 << 20)):
                raise self._death()
            received = (received + piece).lstrip(b"\n")
        return received

    def _death(self) -> EngineFailedError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = "Signal 9 is often the system's answer to full memory." if code == -9 else ""
        return EngineFailedError(f"The process that measured the {self.name} model {how}. {self._last_words()}", hint)

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        said = "\n".join(lines) if lines else "(nothing)"
        return f"Its last words:\n{said}\n"


@contextmanager
def running_worker(name: str, log: Path) -> Iterator[Worker]:
    """A worker that is ended on the way out, whatever happens inside; it holds nothing that is worth patience."""
    command = [sys.executable, "-P", "-m", "serving.benchmark.sessions.worker"]
    with child_process(command, own_environment(), log, talks=True) as process:
        yield Worker(name, process, log)
