"""The real program ``sentei`` in a process of its own, which a test watches and disturbs."""

import os
import re
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.command_line import PROGRAM
from tests.faults.place import Place

_MARK = "SENTEI_TEST_RUN"
_POLL_S = 0.002
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BAR = re.compile(r"━|╸|╺|\d+/\d+ \d:\d\d:\d\d")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: As a shell has it: 128 and the number for a signal.
        stderr: Without progress bars and colours.
        peak_bytes: Most address space that the command itself had, as far as it was watched.
    """

    exit_code: int
    stderr: str
    peak_bytes: int

    @property
    def said(self) -> str:
        """What it told the user about its end; empty if it said nothing."""
        lines = self.stderr.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(("Error:", "Interrupted"))]
        return " ".join(lines[starts[-1] :]) if starts else ""


class Running:
    """A command that has been started."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, stderr: Path) -> None:
        """``mark`` is in the environment of the process and of all that it starts."""
        self.process = process
        self._mark = f"{_MARK}={mark}".encode()
        self._stderr = stderr
        self._peak = 0

    def text(self) -> str:
        """All that it has written to stderr, raw."""
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, reached: Callable[[], bool], *, timeout_s: float = 120) -> None:
        """Waits for a sign of the command's; fails if it ends before."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"ended with {self.process.returncode} too early:\n{self.text()}"
            assert time.monotonic() < deadline, f"nothing to see after {timeout_s} s:\n{self.text()}"
            time.sleep(_POLL_S)

    def wait(self, *, timeout_s: float = 180) -> Ended:
        """Waits for its end."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout_s} s:\n{self.text()}"
            with suppress(OSError):
                status = Path(f"/proc/{self.process.pid}/status").read_text()
                if found := re.search(r"VmPeak:\s+(\d+) kB", status):
                    self._peak = max(self._peak, int(found[1]) * 1024)
            time.sleep(0.02)
        code = self.process.returncode
        lines = _CODES.sub("", self.text()).replace("\r", "\n").splitlines()
        kept = [line for line in lines if line.strip() and not _BAR.search(line)]
        return Ended(exit_code=128 - code if code < 0 else code, stderr="\n".join(kept), peak_bytes=self._peak)

    def press_ctrl_c(self) -> None:
        """What a terminal does: the signal goes to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    @contextmanager
    def held(self) -> Iterator[None]:
        """It and its process group stand still while the context lasts, so that a fault is there all at once."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def relatives(self) -> list[int]:
        """Processes that it has started, and that still run, itself included."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # gone meanwhile, or somebody else's
                if self._mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def wait_for_relatives(self, *, timeout_s: float = 15) -> list[int]:
        """Waits for all that it started to end; returns what does not."""
        deadline = time.monotonic() + timeout_s
        while (left := self.relatives()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


@contextmanager
def running(
    words: Sequence[object],
    place: Place,
    scratch: Path,
    *,
    environment: Mapping[str, str] | None = None,
    memory_bytes: int | None = None,
    file_bytes: int | None = None,
) -> Iterator[Running]:
    """Starts ``sentei`` with these words; nothing of it runs when the context ends.

    Args:
        words: Arguments.
        place: Where it runs.
        scratch: Holds its stderr; its home and its directory for temporary files are made here too.
        environment: Variables to add.
        memory_bytes: Limit of its address space.
        file_bytes: Limit of every file it writes.
    """
    mark = uuid.uuid4().hex
    for name in ("home", "tmp"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    variables = {
        **os.environ, "HOME": str(scratch / "home"), "TMPDIR": str(scratch / "tmp"), **(environment or {}), _MARK: mark,
        # Progress bars show which stage it is in, and rich draws them only on what it takes for a terminal.
        "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200",
    }  # fmt: skip
    variables.pop("SENTEI_TRACEBACK", None)

    def limit() -> None:
        for kind, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, file_bytes)):
            if value is not None:
                resource.setrlimit(kind, (value, value))

    stderr = scratch / f"stderr-{mark}"
    with stderr.open("wb") as log:
        process = subprocess.Popen(
            [*place.enter, PROGRAM, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env=variables,
            preexec_fn=limit,
        )
    run = Running(process, mark, stderr)
    try:
        yield run
    finally:
        for pid in run.relatives():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
