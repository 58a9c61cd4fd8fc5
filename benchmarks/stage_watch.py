"""What each stage of a run costs: seconds, peak anonymous memory, and bytes read of checkpoints."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.checkpoint.directory import Checkpoint, TensorInfo
from toolchain.model import disk_layers

_SAMPLE_S = 0.01


@dataclass(kw_only=True)
class Stage:
    """What a stage cost.

    Attributes:
        name: As progress reports it; ``after ...`` is what comes before the next one.
        seconds: It took.
        peak_anonymous_bytes: Most of the process' memory that no file backs.
        read_bytes: Of checkpoints' tensors, whether the system had them in memory or not.
    """

    name: str
    seconds: float = 0.0
    peak_anonymous_bytes: int = 0
    read_bytes: int = 0


class StageWatch:
    """Watches this process; used as the ``progress`` of what runs."""

    def __init__(self) -> None:
        """Begins with a stage called ``start``."""
        self.stages = [Stage(name="start")]
        self._began = time.monotonic()

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """See :class:`toolchain.progress.Progress`."""
        self._turn(description)
        yield lambda: None
        self._turn(f"after {description}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Samples memory and counts reads meanwhile."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(_SAMPLE_S):
                self.stages[-1].peak_anonymous_bytes = max(self.stages[-1].peak_anonymous_bytes, anonymous_bytes())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        with self._counting():
            yield
        ended.set()
        thread.join()
        self.stages[-1].seconds = time.monotonic() - self._began

    def record(self) -> list[dict[str, Any]]:
        """The stages as JSON."""
        return [asdict(stage) for stage in self.stages]

    def _turn(self, name: str) -> None:
        now = time.monotonic()
        self.stages[-1].seconds, self._began = now - self._began, now
        self.stages.append(Stage(name=name))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        read, load = TensorInfo.read, disk_layers.load_model

        def counted_read(info: TensorInfo, name: str) -> Any:
            self.stages[-1].read_bytes += info.nbytes
            return read(info, name)

        def counted_load(checkpoint: Checkpoint, **options: Any) -> Any:
            self.stages[-1].read_bytes += checkpoint.weight_bytes
            return load(checkpoint, **options)

        TensorInfo.read, disk_layers.load_model = counted_read, counted_load  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            TensorInfo.read, disk_layers.load_model = read, load  # type: ignore[method-assign]


def anonymous_bytes() -> int:
    """This process' resident memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
