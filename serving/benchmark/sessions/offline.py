"""vLLM without a server: ``vllm bench throughput`` and ``vllm bench latency``; their result files are kept."""

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from serving.benchmark.gpu_watch import MemoryBefore, energy, watched_gpus
from serving.benchmark.metrics import DISTRIBUTED, METRICS, PERCENTILES, percentile
from serving.benchmark.sessions.server import engine_facts
from serving.benchmark.sessions.vllm_options import engine_options_for, room_of, vllm_device
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import Side
from serving.benchmark.workload import Slo, Workload
from serving.child_process import child_process
from serving.server.process import refusal, tail
from serving.server.vllm.server import checked_options, launcher_command, launcher_environment
from toolchain.errors import SenteiError

_POLL_S, _BATCHES = 0.25, 3


class OfflineSession:
    """Both models, each in a process of its own for every measurement: nothing stays up between them.

    Attributes:
        both_up: Always: neither keeps the other from being started.
    """

    both_up = True

    def __init__(self, sides: Mapping[str, Side], settings: BenchmarkSettings, out: Path) -> None:
        """Starts nothing yet; see :class:`serving.benchmark.sessions.server.ServerSession`.

        Args:
            sides: Checkpoints.
            settings: ``stall_timeout_s`` is how long vLLM may write nothing, not even progress.
            out: Existing directory; vLLM's own result files and logs go to ``vllm/``.

        Raises:
            SenteiError: An option that would run code from the checkpoint.
        """
        self._out, self._stall_timeout_s = out / "vllm", settings.stall_timeout_s
        room = room_of(sides.values(), settings)
        self._options = {side: checked_options(engine_options_for(side, settings, room)) for side in sides.values()}
        self._device = vllm_device()
        self._memory_before = MemoryBefore(self._device)
        self._out.mkdir(exist_ok=True)

    def measure(
        self, side: Side, repeat: int, workload: Workload, *, name: str, slo: Slo | None = None
    ) -> dict[str, Any]:
        """All requests at once for the throughput, then batches of ``concurrency`` for the latency of a request.

        Raises:
            EngineFailedError: vLLM ended with an error or hung; the end of its log is in the message.
            SenteiError: An option would run code from the checkpoint.
        """
        input_len, output_len = str(workload.input_len), str(workload.output_len)
        # vllm bench throughput takes the random data set's own options, and ignores --input-len beside them.
        random = ["--dataset-name", "random", "--random-input-len", input_len, "--random-output-len", output_len,
                  "--random-range-ratio", "0.0"]  # fmt: skip
        seed = ["--seed", str(workload.seed + repeat)]
        counts = ["--num-prompts", str(workload.num_prompts), "--num-warmups", str(workload.width)]
        with watched_gpus(self._device) as gpus:
            throughput = self._run(side, "throughput", [*random, *seed, *counts], f"{name}-throughput")
        seen = gpus.last(throughput["elapsed_time"])
        batches = ["--num-iters-warmup", "1", "--num-iters", str(_BATCHES), "--batch-size", str(workload.width)]
        lengths = ["--input-len", input_len, "--output-len", output_len]
        latency = self._run(side, "latency", [*lengths, *seed, *batches], f"{name}-latency")
        output_tokens = throughput["num_requests"] * workload.output_len
        return {
            **dict.fromkeys(metric.name for metric in METRICS),
            "output_throughput": output_tokens / throughput["elapsed_time"],
            "total_token_throughput": throughput["tokens_per_second"],
            "request_throughput": throughput["requests_per_second"],
            "mean_e2el_ms": 1000 * fmean(latency["latencies"]),
            "percentiles": {
                **dict.fromkeys(DISTRIBUTED),
                "e2el": {str(each): 1000 * percentile(latency["latencies"], each) for each in PERCENTILES},
            },
            **energy(seen, output_tokens),
            "completed": throughput["num_requests"], "failed": 0, "first_error": None, "client_cpu_cores": None,
            "duration": throughput["elapsed_time"],
        }  # fmt: skip

    def drop(self, side: Side) -> None:
        """Nothing is up."""

    def close(self) -> None:
        """Nothing is up."""

    def _run(self, side: Side, command: str, options: list[str], name: str) -> dict[str, Any]:
        result_file, log = self._out / f"{name}.json", self._out / f"{name}.log"
        result_file.unlink(missing_ok=True)
        self._memory_before.wait()
        arguments = [
            "bench", command, "--model", str(side.directory.resolve()), *options,
            "--output-json", str(result_file.resolve()), *self._options[side],
        ]  # fmt: skip
        with child_process(launcher_command(*arguments), launcher_environment(), log) as process:
            self._wait(process, log, side)
        said = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode == 2 and (refused := refusal(said)):
            raise SenteiError(f"vllm bench {command} of the {side.name} model: {refused}")
        try:
            result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EngineFailedError(
                f"vllm bench {command} of the {side.name} model failed (exit code {process.returncode}):\n{tail(said)}"
            ) from error
        side.engine_report = {"device": self._device, "engine_options": self._options[side], **engine_facts(said)}
        return result

    def _wait(self, process: subprocess.Popen[bytes], log: Path, side: Side) -> None:
        size, moved_s = -1, time.monotonic()
        while process.poll() is None:
            if (now := log.stat().st_size) != size:
                size, moved_s = now, time.monotonic()
            if time.monotonic() - moved_s > self._stall_timeout_s:
                raise EngineFailedError(
                    f"vLLM hung with the {side.name} model: it wrote nothing for {self._stall_timeout_s:.0f} s. The "
                    f"end of its log:\n{tail(log.read_text(encoding='utf-8', errors='replace'))}"
                )
            time.sleep(_POLL_S)
