"""What a benchmark has measured so far, on disk after every measurement, so that a long one survives and goes on."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError
from toolchain.json_files import read_json_lines
from toolchain.outputs import (
    BENCHMARK,
    START_OVER,
    Unfinished,
    check_output_directory,
    claimed_directory,
    replace_directory,
)

RESULTS_FILE = "results.json"
_MEASURED = "measured.jsonl"
_NOT_STARTED = "not_started.json"  # the settings of what ended before anything was measured
_REPORT = "told"  # an older name, which journals have that are still to be resumed
Key = tuple[int, int, str]  # repeat, number of the load, side


class Journal:
    """An append-only file of measurements and failures.

    Attributes:
        directory: Where it is, with the servers' logs and vLLM's results beside it.
        failures: Measurements that came to nothing, oldest first, earlier runs' included.
    """

    def __init__(self, directory: Path) -> None:
        """Reads what is there; half a line at the end, of a process that was killed, does not count.

        Raises:
            SenteiError: A line is damaged.
        """
        self.directory = directory
        self.failures: list[dict[str, Any]] = []
        self._measured: dict[Key, dict[str, Any]] = {}
        file = directory / _MEASURED
        if file.is_file():
            _drop_half_line(file)
            for where, entry in read_json_lines(file, hint=START_OVER):
                self._take_read(where, entry)

    def get(self, key: Key) -> dict[str, Any] | None:
        """What was measured; ``None`` if nothing was yet."""
        return self._measured.get(key)

    def __len__(self) -> int:
        """How many measurements there are."""
        return len(self._measured)

    def record(self, key: Key, metrics: Mapping[str, Any], engine_report: Mapping[str, Any]) -> None:
        """Writes a measurement, and what the engine reported of itself, and waits for the disk."""
        self._append({"key": list(key), "metrics": dict(metrics), _REPORT: dict(engine_report)})

    def record_failure(self, key: Key, *, num_requests: int, error: str) -> None:
        """Writes that a measurement came to nothing; its requests are kept apart from those that failed in others."""
        repeat, load, side = key
        self._append(
            {"failure": {"repeat": repeat, "load": load, "side": side, "failed": num_requests, "error": error}}
        )

    def engine_report(self, side: str) -> dict[str, Any]:
        """What the engine last reported of itself."""
        found = [entry[_REPORT] for (_, _, of), entry in self._measured.items() if of == side]
        return found[-1] if found else {}

    def startups(self, side: str) -> list[float]:
        """Seconds of each start, one a repeat, in the order in which they were made; empty if nothing was started."""
        found: dict[int, float] = {}
        for (repeat, _, of), entry in self._measured.items():
            if of == side and (seconds := entry[_REPORT].get("startup_s")) is not None:
                found.setdefault(repeat, seconds)
        return list(found.values())

    def _take_read(self, where: str, entry: Any) -> None:
        try:
            for part in ("failure",) if "failure" in entry else ("metrics", _REPORT):
                if not isinstance(entry[part], dict):
                    raise TypeError(f"{part} is no object")
            self._take(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise SenteiError(
                f"{where} does not have the fields it should ({type(error).__name__}: {error}).", START_OVER
            ) from error

    def _append(self, entry: dict[str, Any]) -> None:
        with (self.directory / _MEASURED).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "failure" in entry:
            self.failures.append(entry["failure"])
        else:
            repeat, load, side = entry["key"]
            self._measured[repeat, load, side] = entry


def _drop_half_line(file: Path) -> None:
    with file.open("r+b") as opened:
        content = opened.read()
        opened.truncate(content.rfind(b"\n") + 1)


def holds_only_logs(out: Path) -> bool:
    """Whether a benchmark that ended before anything was measured has left its log where it was until then."""
    return (BENCHMARK.directory(out) / _NOT_STARTED).is_file()


@contextmanager
def open_journal(
    out: Path, settings: Mapping[str, Any], *, force: bool, resume: bool, inputs: tuple[Path, ...]
) -> Iterator[Journal]:
    """Yields a journal in ``<out>.unfinished``, which becomes ``out`` when the context ends well.

    If it ends badly the directory stays for ``--resume``. If nothing was measured, it stays only for the log that it
    holds, and gives way to the next benchmark.

    Args:
        out: Where the benchmark's directory will be.
        settings: JSON of everything that the measurements depend on.
        force: Replace ``out``, and forget an interrupted benchmark.
        resume: Go on with an interrupted one, if there is one.
        inputs: What is measured; never replaced.

    Raises:
        SenteiError: ``out`` is not free, or an interrupted benchmark is there and not resumed, or had other settings.
    """
    with claimed_directory(out, force=force):
        check_output_directory(out, force=force, inputs=inputs)
        gives_way = holds_only_logs(out)
        work = Unfinished(out, BENCHMARK, force=force or gives_way, resume=resume and not gives_way)
        with work.working(settings):
            journal = Journal(work.directory)
            try:
                yield journal
            except BaseException:
                work.worth_keeping = bool(len(journal) or journal.failures)
                if not work.worth_keeping:
                    _keep_log(work)
                raise
            work.worth_keeping = True
            check_output_directory(out, force=force)
            replace_directory(work.directory, out)


def _keep_log(work: Unfinished) -> None:
    """Keeps the log of what did not start, if there is one: it says why, and nothing else does."""
    directory = work.directory
    if any(log.stat().st_size for log in directory.rglob("*.log")):
        (directory / str(BENCHMARK.identity_file)).rename(directory / _NOT_STARTED)
        work.worth_keeping = True
        work.what_stays = f"{directory} holds the log. Nothing was measured: the same command begins again."
