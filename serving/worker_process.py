"""The parent's side of :mod:`serving.bench_worker`: starts it, asks it, and says why if it dies."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError

_TAIL_LINES = 8


class EngineFailedError(SenteiError):
    """What runs a model died, hung, or answered nothing: a measurement is lost, another attempt may succeed."""


class Worker:
    """A running worker process. One question at a time; it sits idle, without spinning, between them."""

    def __init__(self, name: str, log: Path) -> None:
        """Starts the process; what it and its libraries print goes to ``log``."""
        self.name, self._log = name, log
        # -P and the explicit path: a directory `serving` where the user happens to stand must not be taken for ours.
        paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "serving.bench_worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer.

        Raises:
            SenteiError: The worker refused, or died; then with the end of what it wrote.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise SenteiError(f"{self.name}: {answer['error']}", answer["hint"])
        return answer

    def close(self) -> None:
        """Ends the process, with patience first."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdout.close()
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def _death(self) -> EngineFailedError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        said = "\n".join(lines) if lines else "(nothing)"
        hint = "Signal 9 is often the system's answer to full memory." if code == -9 else ""
        return EngineFailedError(
            f"The process that measured the {self.name} model {how}. Its last words:\n{said}\n", hint
        )


@contextmanager
def running_worker(name: str, log: Path) -> Iterator[Worker]:
    """A worker that is ended on the way out, whatever happens inside."""
    worker = Worker(name, log)
    try:
        yield worker
    except BaseException:
        worker.process.kill()
        raise
    finally:
        worker.close()
