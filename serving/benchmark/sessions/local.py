"""Transformers and ONNX Runtime in the benchmark: a worker process for each model and repeat, one up at a time."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving.benchmark.gpu_watch import energy, watched_gpus
from serving.benchmark.metrics import RequestTimes, request_metrics, request_percentiles
from serving.benchmark.sessions.sides import SideProcesses, free_log
from serving.benchmark.sessions.worker_process import Worker, running_worker
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import Side
from serving.benchmark.workload import WARMUP_SEED, Slo, Workload

_WARMUP_TOKENS = 16
_CHUNK_TOKENS = 2048


class LocalSession:
    """Both models loaded and warmed up when they are needed, anew for each repeat as servers are.

    Attributes:
        both_up: Never.
    """

    both_up = False

    def __init__(self, sides: Mapping[str, Side], settings: BenchmarkSettings, out: Path) -> None:
        """Starts nothing yet; the workers' logs go to ``out``, and see :func:`patience_s` for ``stall_timeout_s``."""
        self._settings, self._out = settings, out
        self._vocab_size = min(side.facts.vocab_size for side in sides.values())
        self._workers = SideProcesses(self._start)

    def measure(
        self, side: Side, repeat: int, workload: Workload, *, name: str, slo: Slo | None = None
    ) -> dict[str, Any]:
        """Asks one model one load; limits are vLLM's alone.

        See :meth:`serving.benchmark.sessions.server.ServerSession.measure`.
        """
        worker = self._workers.get(side, repeat)
        with watched_gpus(side.engine_report["device"]) as gpus:
            answer = self._ask(worker, workload, workload.seed + repeat, workload.output_len)
        side.engine_report["peak_memory_bytes"] = answer["peak_memory_bytes"]
        requests = [
            RequestTimes(start_s=each["start_s"], token_times_s=tuple(each["token_times_s"]))
            for each in answer["requests"]
        ]
        duration_s = max(each.token_times_s[-1] for each in requests) - min(each.start_s for each in requests)
        return {
            **request_metrics(requests, input_len=workload.input_len), "percentiles": request_percentiles(requests),
            **energy(gpus.last(duration_s), sum(len(each.token_times_s) for each in requests)),
            "completed": len(requests), "failed": 0, "first_error": None, "client_cpu_cores": None,
        }  # fmt: skip

    def drop(self, side: Side) -> None:
        """Ends a side's worker; the next measurement starts another."""
        self._workers.drop(side)

    def close(self) -> None:
        """Ends everything."""
        self._workers.close()

    def _start(self, side: Side, repeat: int, stack: ExitStack) -> Worker:
        worker = stack.enter_context(running_worker(side.name, free_log(self._out, side, repeat)))
        side.engine_report = worker.ask(
            "load", timeout_s=self._settings.start_timeout_s, directory=str(side.directory.resolve()),
            engine=self._settings.engine, device=self._settings.device, dtype=self._settings.dtype,
        )  # fmt: skip
        widest = self._settings.widest
        tokens = min(widest.output_len, _WARMUP_TOKENS)
        warmup = replace(widest, num_prompts=widest.width)
        self._ask(worker, warmup, warmup.seed + WARMUP_SEED, tokens)
        return worker

    def _ask(self, worker: Worker, workload: Workload, seed: int, output_len: int) -> dict[str, Any]:
        return worker.ask(
            "measure", timeout_s=patience_s(workload, self._settings.stall_timeout_s), num_prompts=workload.num_prompts,
            input_len=workload.input_len, vocab_size=self._vocab_size, seed=seed, output_len=output_len,
            batch_size=workload.width,
        )  # fmt: skip


def patience_s(workload: Workload, stall_timeout_s: float) -> float:
    """How long a worker may go without a token: a whole batch of prompts comes before the first.

    A server reads prompts in chunks, and the limit holds for one; here it is multiplied by how many there would be.
    """
    return stall_timeout_s * math.ceil(workload.width * workload.input_len / _CHUNK_TOKENS)
