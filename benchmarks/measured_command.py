"""Runs one ``sentei`` command in a process of its own and measures it from outside: time, memory, and what it read.

- **Memory** is that of the whole process tree, looked at twenty times a second: anonymous memory (what no file backs,
  so what a machine must have) and resident memory (with mapped files, which the system can take away; pages that
  several processes share count several times).
- **Read from disk** is ``read_bytes`` of ``/proc/PID/io``: what had to come from the disk, for ``read`` and for mapped
  files. The page cache would hide all of it on a machine with memory to spare, so the model's files are put out of the
  cache before the command, and every page of them while it runs, once it was there at two looks, four of which are
  taken a second: each further pass over the weights counts, as on a machine whose memory the model fills, and what the
  system reads ahead is used before it goes. Pages that stay mapped stay in memory, and are not read again; programs and
  libraries count where the system had dropped them.
- **Asked of read** is ``rchar``: what ``read`` returned, cached or not. It counts no mapped file, so none of the
  weights that safetensors maps; it is kept to show what the other number leaves out.

    python benchmarks/measured_command.py -o prune.json --reads MODEL -- prune MODEL -o OUT --sparsity 0.25 --force

Linux only.
"""

import ctypes
import json
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from serving.benchmark.environment import describe_environment
from serving.benchmark.gpu_watch import used_memory_bytes
from toolchain.lifetime import own_environment, tied
from toolchain.outputs import beside, write_text

SENTEI = "from toolchain.lifetime import end_with_parent; end_with_parent(); from toolchain.cli.app import main; main()"
_SAMPLE_S = 0.05
_EVICT_S = 0.25
# How a finished bar looks where stderr is no terminal: description, bar, done of total, time.
_BAR = re.compile(r"^(\S.*?)\s+[━╸╺-]+ +\d+/\d+ +\d+:\d\d:\d\d")
_ERROR = re.compile(r"^Error: (.*?)\s*(?:^\S*Traceback|\Z)", re.DOTALL | re.MULTILINE)


@dataclass
class Peaks:
    """What was seen so far of one command, or of one of its stages.

    Attributes:
        anonymous: Bytes of the process tree that no file backs, at most.
        resident: Bytes of the process tree that were in memory, at most.
        gpu: Bytes of the GPUs in use, by anyone, at most; ``None`` without NVML.
    """

    anonymous: int = 0
    resident: int = 0
    gpu: int | None = None

    def see(self, anonymous: int, resident: int, gpu: int | None) -> None:
        """Takes one look into account."""
        self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)
        if gpu is not None:
            self.gpu = max(self.gpu or 0, gpu)

    def document(self) -> dict[str, Any]:
        """As the results have it."""
        return {
            "peak_anonymous_bytes": self.anonymous,
            "peak_resident_bytes": self.resident,
            "peak_gpu_bytes": self.gpu,
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What became of a command.

    Attributes:
        exit_code: Negative: the signal that ended it.
        stdout: What it printed.
        error: ``None`` if it succeeded, else why it did not, in one paragraph.
        cost: ``wall_s``, ``cpu_s``, the peaks, ``bytes_from_disk``, ``bytes_asked_of_read``, and ``stages``: for each
            bar of progress its name, and the same of the time since the one before it.
    """

    exit_code: int
    stdout: str
    error: str | None
    cost: dict[str, Any]


@dataclass
class _Watch:
    """The stages of a running command, as its bars tell them."""

    pid: int
    started: float
    log: Path
    peaks: Peaks = field(default_factory=Peaks)
    of_stage: Peaks = field(default_factory=Peaks)
    stages: list[dict[str, Any]] = field(default_factory=list)
    since: tuple[float, int] = (0.0, 0)

    def look(self, gpu: int | None) -> None:
        """Samples the memory of the tree."""
        sample = memory_of_tree(self.pid)
        for peaks in (self.peaks, self.of_stage):
            peaks.see(*sample, gpu)

    def follow(self, lines: Iterable[str]) -> None:
        """Keeps what the command writes on stderr, and ends a stage with each bar."""
        with self.log.open("w", encoding="utf-8") as log:
            for line in lines:
                log.write(f"{time.monotonic() - self.started:9.1f} s  {line}")
                log.flush()
                if bar := _BAR.match(line):
                    self._end_stage(bar[1])

    def _end_stage(self, name: str) -> None:
        before_s, before_bytes = self.since
        self.since = time.monotonic() - self.started, read_bytes(self.pid)[0]
        peaks, self.of_stage = self.of_stage, Peaks()
        wall_s, from_disk = self.since[0] - before_s, self.since[1] - before_bytes
        self.stages.append(
            {"stage": name, "wall_s": round(wall_s, 2), "bytes_from_disk": from_disk, **peaks.document()}
        )


def measure_sentei(
    arguments: Sequence[str],
    *,
    log: Path,
    reads: Sequence[Path],
    limit_s: float = float("inf"),
    environment: Mapping[str, str] | None = None,
) -> Measured:
    """Runs ``sentei`` with these arguments and measures it. It ends with this process, however that ends.

    Args:
        arguments: Of the command.
        log: File for its stderr, each line with the seconds since the start.
        reads: Files, and directories of files, that are put out of the page cache.
        limit_s: It is killed after so long; the stages that it finished are kept.
        environment: Added to this process's own.
    """
    files = [file for path in reads for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    evict(files)
    cache = _PageCache(files)
    cpu_before, started = _cpu_s_of_children(), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SENTEI, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        env=tied({**own_environment(), **(environment or {}), "COLUMNS": "160"}),
    )  # fmt: skip
    watch, printed = _Watch(process.pid, started, log), []
    threads = [
        threading.Thread(target=lambda: watch.follow(process.stderr or ())),
        threading.Thread(target=lambda: printed.extend(process.stdout or ())),
    ]
    for thread in threads:
        thread.start()
    try:
        evicted, gpu, is_late = started, GpuMemory(), False
        # The process is looked at, not yet reaped: the counters of what it read stay until then.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            watch.look(gpu.used_bytes())
            if is_late := time.monotonic() - started > limit_s:
                break
            if time.monotonic() - evicted > _EVICT_S:
                cache.drop_what_stayed()
                evicted = time.monotonic()
            time.sleep(_SAMPLE_S)
        from_disk, asked = read_bytes(process.pid)
        wall_s = time.monotonic() - started
    finally:
        _kill_group(process.pid)
        exit_code = process.wait()
    for thread in threads:
        thread.join()
    cost = {
        "wall_s": round(wall_s, 2), "cpu_s": round(_cpu_s_of_children() - cpu_before, 2), **watch.peaks.document(),
        "bytes_from_disk": from_disk, "bytes_asked_of_read": asked, "stages": watch.stages,
    }  # fmt: skip
    error = f"Not finished after {limit_s:.0f} s." if is_late else _error(exit_code, log)
    return Measured(exit_code=exit_code, stdout="".join(printed), error=error, cost=cost)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _error(exit_code: int, log: Path) -> str | None:
    """Why a command failed, in its own words."""
    if exit_code == 0:
        return None
    if exit_code < 0:
        hint = ": the system's answer to full memory, if nobody else sent it" if exit_code == -signal.SIGKILL else ""
        return f"Ended by signal {-exit_code}{hint}."
    said = "".join(line[13:] for line in log.read_text(encoding="utf-8").splitlines(keepends=True))
    errors = _ERROR.findall(said)
    return errors[-1] if errors else f"Exit code {exit_code} without a sentence; see {log.name}."


def memory_of_tree(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process and all of its descendants, now."""
    anonymous = resident = 0
    for each in tree(pid):
        try:
            status = Path(f"/proc/{each}/status").read_text()
        except OSError:
            continue
        values = {name: int(value.split()[0]) for name, value in _KIB.findall(status)}
        anonymous, resident = anonymous + values.get("RssAnon", 0), resident + values.get("VmRSS", 0)
    return 1024 * anonymous, 1024 * resident


_KIB = re.compile(r"^(RssAnon|VmRSS):\s+(\d+ kB)$", re.MULTILINE)


def tree(pid: int) -> list[int]:
    """A process and all of its descendants."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def read_bytes(pid: int) -> tuple[int, int]:
    """``read_bytes`` and ``rchar`` of a process, those of its children that have ended, and of those that run."""
    from_disk = asked = 0
    for each in tree(pid):
        try:
            lines = Path(f"/proc/{each}/io").read_text().splitlines()
        except OSError:
            continue
        counters = dict(line.split(": ") for line in lines)
        from_disk, asked = from_disk + int(counters["read_bytes"]), asked + int(counters["rchar"])
    return from_disk, asked


def evict(files: Iterable[Path]) -> None:
    """Puts files out of the page cache; what is only there goes to the disk first. Lost files are passed over."""
    for file in files:
        with suppress(OSError), file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _PageCache:
    """What the page cache holds of some files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._seen = files, dict[Path, NDArray[np.bool_]]()

    def drop_what_stayed(self) -> None:
        """Puts out pages that were there at the last look too, and are not mapped now."""
        for file in self._files:
            with suppress(OSError), file.open("rb") as opened:
                there = _cached_pages(opened.fileno())
                seen = self._seen.get(file)
                stayed = there & seen if seen is not None and len(seen) == len(there) else np.zeros_like(there)
                self._seen[file] = there & ~stayed
                edges = np.flatnonzero(np.diff(stayed, prepend=False, append=False)).reshape(-1, 2)
                for start, stop in (edges * mmap.PAGESIZE).tolist():
                    os.posix_fadvise(opened.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def _cached_pages(descriptor: int) -> NDArray[np.bool_]:
    """Whether each page of an open file is in the page cache."""
    size = os.fstat(descriptor).st_size
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    if size:
        with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
            # Where it was mapped; NumPy's view must be gone when the mapping ends.
            address = ctypes.c_void_p(np.frombuffer(mapped, np.uint8).ctypes.data)
            if _LIBC.mincore(address, ctypes.c_size_t(size), pages.ctypes.data_as(ctypes.c_void_p)):
                raise OSError(ctypes.get_errno(), "mincore")
    return (pages & 1).astype(bool)


_LIBC = ctypes.CDLL(None, use_errno=True)


class GpuMemory:
    """The memory of NVIDIA GPUs in use, if NVML is there; looked at no more than twice a second."""

    def __init__(self) -> None:
        """Looks nothing up yet."""
        self._at, self._used = 0.0, None if not Path("/proc/driver/nvidia").exists() else 0

    def used_bytes(self) -> int | None:
        """Bytes in use, by anyone, on all GPUs that CUDA sees."""
        if self._used is not None and time.monotonic() - self._at > 0.5:
            used = used_memory_bytes()
            self._at, self._used = time.monotonic(), None if used is None else sum(used)
        return self._used


def _cpu_s_of_children() -> float:
    """Processor time of all that was started and has ended: unlike the clock, hardly longer beside other work."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(
    arguments: Annotated[list[str], typer.Argument(help="Of sentei, after --; --json is added.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write; .log beside it.")],
    reads: Annotated[list[Path], typer.Option(help="What it reads; several times.")] = [],  # noqa: B006
    limit_s: Annotated[float, typer.Option(help="It is killed after so many seconds.")] = float("inf"),
) -> None:
    """Measures one command. What did not succeed is written to OUT.unfinished, and the exit code is 1."""
    done = measure_sentei([*arguments, "--json"], log=out.with_suffix(".log"), reads=reads, limit_s=limit_s)
    told = json.loads(done.stdout) if done.error is None else {}
    told.pop("directory", None)
    document = {
        "schema_version": 1, "kind": "measured_command", "error": done.error, "cost": done.cost, "said": told,
        "environment": describe_environment(),
    }  # fmt: skip
    unfinished = beside(out, "unfinished")
    write_text(unfinished if done.error else out, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if done.error:
        raise SystemExit(f"{out.stem}: {done.error}")
    unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
