"""Servers in the benchmark, vLLM's and ONNX Runtime's, driven by ``vllm bench serve``; its figures are kept."""

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from serving.benchmark.goodput import AskedRequest
from serving.benchmark.gpu_watch import MemoryBefore, energy, watched_gpus
from serving.benchmark.metrics import BETWEEN_TOKENS, DISTRIBUTED, METRICS, PERCENTILES
from serving.benchmark.process_memory import peak_resident_bytes
from serving.benchmark.sessions.sides import SideProcesses, free_log
from serving.benchmark.sessions.vllm_client import bench_serve, served_model_name
from serving.benchmark.sessions.vllm_client_process import Client
from serving.benchmark.sessions.vllm_options import (
    CONTEXT,
    context_of,
    engine_options_for,
    room_of,
    vllm_device,
    with_added,
)
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import Side
from serving.benchmark.workload import WARMUP_SEED, Slo, Workload
from serving.server.process import ServerEndedError, tail
from serving.server.vllm.server import running_server
from toolchain.errors import SenteiError
from toolchain.outputs import write_text

_PROMPTS_FILE = "prompts.jsonl"
# Of the mean time between arrivals: none of thousands comes later than this after the one before it.
_LONGEST_GAP = 20
# A search for the highest rate also tries rates that a server cannot keep up with; who waits then counts, and is not
# turned away.
_MOST_QUEUED = 100_000
# What --save-detailed adds.
_DETAILS = frozenset({"input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors"})
# What uvicorn writes, in whose process the ONNX server computes.
_PROCESS = re.compile(r"Started server process \[(\d+)\]")
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_WEIGHTS_GIB = re.compile(r"[Mm]odel loading took ([\d.]+) Gi?B")
# Without what stands before a message in vLLM's log: process, level, time, file and line.
_UNCOMPILED = re.compile(
    r"^(?:.*\[\S+:\d+\] )?(.*(?:Enforce eager set|[Cc]uda ?graph is disabled|[Ff]all(?:ing)? back to eager).*)$", re.M
)


class ServerSession:
    """Both models' servers, vLLM or ONNX, started when they are needed and warmed up as widely as the widest load.

    One is up at a time, as it will be where it serves, and each repeat starts its own: one server is faster than
    another of the same model, by percents, for as long as both run (docs/metrics.md). None is started before the GPU's
    memory is as free as it was before the first.

    Attributes:
        both_up: Whether both are up together: servers that run already.
    """

    def __init__(self, sides: Mapping[str, Side], settings: BenchmarkSettings, out: Path) -> None:
        """Starts nothing yet.

        Args:
            sides: Checkpoints or ONNX exports; none is started whose server runs already.
            settings: The dtype is given to vLLM explicitly; see
                :func:`serving.benchmark.sessions.vllm_client.bench_serve` for ``stall_timeout_s``.
            out: Existing directory; vLLM's own result files go to ``vllm/``, the servers' logs beside it.
        """
        self.both_up = bool(settings.urls)
        self._sides, self._settings, self._out = tuple(sides.values()), settings, out
        self._logs: dict[Side, Path] = {}
        self._processes: dict[Side, re.Match[str] | None] = {}
        self._servers = SideProcesses(self._start, keep_all=self.both_up)
        self._memory_before = MemoryBefore("cpu" if self.both_up else vllm_device())
        (out / "vllm").mkdir(exist_ok=True)
        self._client = Client(out / "vllm" / "client.log")
        self._prompts_file = out.resolve() / _PROMPTS_FILE
        self._room = room_of(self._sides, settings) if settings.spec.is_vllm and not settings.urls else {}
        if own := settings.widest.prompts:
            # Whoever asks for fewer gets the first lines: shuffled, these are a sample of all.
            lines = random.Random(0).sample(own.lines, len(own.lines))
            write_text(self._prompts_file, "\n".join(lines) + "\n")

    def measure(
        self, side: Side, repeat: int, workload: Workload, *, name: str, slo: Slo | None = None
    ) -> dict[str, Any]:
        """Asks one model one load.

        Args:
            side: One of those given at the start.
            repeat: Which; it moves the seed.
            workload: What to ask.
            name: Of vLLM's result file.
            slo: Limits that each request is judged by.

        Returns:
            A value for each of :data:`serving.benchmark.metrics.METRICS`, ``request_goodput`` and ``requests`` (what
            became of each) if there are limits, and ``completed``, ``failed``, ``first_error``, ``client_cpu_cores``.

        Raises:
            EngineFailedError: The server died, hung, or failed every request; the end of its log is in the message.
        """
        # None of those that run already is measured before all are known to be there.
        for each in self._sides if self.both_up else ():
            self._servers.get(each, repeat)
        base_url = self._servers.get(side, repeat)
        options = _load_options(workload, workload.seed + repeat, workload.num_prompts, self._prompts_file)
        if slo:
            options += ["--goodput", *(f"{metric}:{limit:g}" for metric, limit in slo.limits.items())]
            options.append("--save-detailed")
        file = self._out / "vllm" / f"{name}.json"
        # Unknown of a server that was there before us: the GPUs here may not be its own.
        with watched_gpus(side.engine_report["device"]) as gpus:
            result = self._bench(side, base_url, options, file, _longest_gap_s(workload))
        seen = gpus.last(result["duration"])
        if (used := self._peak_memory_bytes(side)) is not None:
            side.engine_report["peak_memory_bytes"] = used
        asked = {"requests": asked_requests(result, slo)} if slo else {}
        if slo:
            _drop_details(file)
        return {**_metrics(workload, result), **asked, **energy(seen, result["total_output_tokens"])}

    def drop(self, side: Side) -> None:
        """Stops a side's server; the next measurement starts another."""
        self._servers.drop(side)

    def close(self) -> None:
        """Stops everything."""
        self._client.close()
        self._servers.close()

    def _start(self, side: Side, repeat: int, stack: ExitStack) -> str:
        try:
            base_url, side.engine_report = self._running(side, repeat, stack)
        except SenteiError as error:
            # It started before with the same options, or what ended it is not of sentei: another attempt may succeed.
            if not side.engine_report and not isinstance(error, ServerEndedError):
                raise
            raise EngineFailedError(error.message, error.hint) from error
        warmup = self._settings.widest
        options = _load_options(warmup, warmup.seed + WARMUP_SEED, warmup.width, self._prompts_file)
        file = self._out / f"{side.name}-warmup.json"
        self._bench(side, base_url, options, file)
        file.unlink(missing_ok=True)
        return base_url

    def _running(self, side: Side, repeat: int, stack: ExitStack) -> tuple[str, dict[str, Any]]:
        """The base URL of a side's server, and what it reports of itself."""
        if side.url is not None:
            base_url = side.url.rstrip("/")
            served = served_model_name(base_url, self._settings.api_key)
            return base_url, {"device": None, "url": base_url, "served_model": served, **engine_facts("")}
        self._memory_before.wait()
        log, start_s = free_log(self._out, side, repeat), time.monotonic()
        options, running = self._server(side)
        timeout_s = self._settings.start_timeout_s
        base_url = stack.enter_context(running(side.directory, options=options, log=log, timeout_s=timeout_s))
        startup_s = time.monotonic() - start_s
        self._logs[side] = log
        text = log.read_text(encoding="utf-8", errors="replace")
        self._processes[side] = _PROCESS.search(text)
        device = side.export_device or vllm_device()
        return base_url, {"device": device, "server_options": options, "startup_s": startup_s, **engine_facts(text)}

    def _server(self, side: Side) -> tuple[list[str], Callable[..., AbstractContextManager[str]]]:
        """The options of a side's server, and what runs it."""
        settings = self._settings
        if not settings.spec.reads_onnx:
            return engine_options_for(side, settings, self._room), running_server
        from serving.server.onnx.server import DEFAULT_MAX_NUM_SEQS
        from serving.server.onnx.server import running_server as running_onnx_server

        # No row more than the load can fill. A search for the highest rate has more requests in flight than a workload.
        width = max(settings.widest.width, DEFAULT_MAX_NUM_SEQS if settings.slo else 1)
        fair = {"--max-num-seqs": width, CONTEXT: context_of(self._sides, settings)}
        if settings.slo:
            fair["--max-num-queued-reqs"] = _MOST_QUEUED
        return with_added(settings.engine_options, fair), running_onnx_server

    def _peak_memory_bytes(self, side: Side) -> int | None:
        """The most memory an ONNX server used on a CPU. vLLM reserves what it is told to; GPUs are not looked at."""
        if not self._settings.spec.reads_onnx or side.engine_report["device"] != "cpu":
            return None
        process = self._processes[side]
        return peak_resident_bytes(int(process[1])) if process else None

    def _bench(self, side: Side, base_url: str, options: list[str], file: Path, idle_s: float = 0.0) -> dict[str, Any]:
        try:
            return bench_serve(
                base_url,
                side.directory,
                options=options,
                result_file=file,
                api_key=self._settings.api_key,
                stall_timeout_s=self._settings.stall_timeout_s + idle_s,
                client=self._client,
            )
        except EngineFailedError as error:
            raise EngineFailedError(f"{error.message}{self._log_end(side)}") from error

    def _log_end(self, side: Side) -> str:
        if side not in self._logs:
            return ""
        text = self._logs[side].read_text(encoding="utf-8", errors="replace")
        return f" The end of the {side.name} server's log:\n{tail(text)}"


def _longest_gap_s(workload: Workload) -> float:
    # vLLM's gauges of running requests are as of the last step, so they cannot tell an idle server from one that hangs
    # in the first step after a pause.
    return 0.0 if workload.request_rate is None else _LONGEST_GAP / workload.request_rate


def _load_options(workload: Workload, seed: int, num_prompts: int, prompts_file: Path) -> list[str]:
    if workload.prompts:
        # The same prompts in the same order each time, as they stand: a template would add what nobody wrote.
        options = [
            "--dataset-name", "custom", "--dataset-path", str(prompts_file), "--custom-output-len", "-1",
            "--disable-shuffle", "--skip-chat-template",
        ]  # fmt: skip
    else:
        options = [
            "--dataset-name", "random", "--random-input-len", str(workload.input_len),
            "--random-output-len", str(workload.output_len), "--random-range-ratio", f"{workload.range_ratio:g}",
        ]  # fmt: skip
    if workload.concurrency is not None:
        options += ["--max-concurrency", str(workload.concurrency)]
    if workload.request_rate is not None:
        options += ["--request-rate", f"{workload.request_rate:g}"]
    return [
        *options,
        "--num-prompts", str(num_prompts),
        "--seed", str(seed),
        "--ignore-eos",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", ",".join(map(str, PERCENTILES)),
    ]  # fmt: skip


def _metrics(workload: Workload, result: Mapping[str, Any]) -> dict[str, Any]:
    undefined = BETWEEN_TOKENS if workload.output_len == 1 else frozenset()
    metrics = {metric.name: None if metric.name in undefined else result[metric.name] for metric in METRICS}
    kept = {name: result[name] for name in ("first_error", "client_cpu_cores", "duration")}
    goodput = {"request_goodput": result["request_goodput"]} if result.get("request_goodput") is not None else {}
    percentiles = {
        name: {str(percent): result[f"p{percent}_{name}_ms"] for percent in PERCENTILES}
        if f"mean_{name}_ms" not in undefined else None
        for name in DISTRIBUTED
    }  # fmt: skip
    completed = result["completed"]
    return {
        **metrics,
        **goodput,
        **kept,
        "percentiles": percentiles,
        "completed": completed,
        "failed": workload.num_prompts - completed,
    }


def asked_requests(result: Mapping[str, Any], slo: Slo) -> list[AskedRequest]:
    """What became of each request, by vLLM's own lists and its definitions of TTFT, TPOT and E2EL.

    Args:
        result: Of ``vllm bench serve --save-detailed``; versions before 0.32 have no ``latencies``.
        slo: The limits.
    """
    asked = []
    for i, (sent_s, ttft_s, gaps_s) in enumerate(
        zip(result["start_times"], result["ttfts"], result["itls"], strict=True)
    ):
        if result["errors"][i] or ttft_s <= 0:
            asked.append(AskedRequest(sent_s=sent_s, ended_s=None, met=False))
            continue
        latency_s = result["latencies"][i] if "latencies" in result else ttft_s + sum(gaps_s)
        num_tokens = result["output_lens"][i]
        tpot_s = (latency_s - ttft_s) / (num_tokens - 1) if num_tokens > 1 else 0.0
        times_ms = {"ttft": 1000 * ttft_s, "tpot": 1000 * tpot_s, "e2el": 1000 * latency_s}
        met = all(times_ms[name] <= limit for name, limit in slo.limits.items())
        asked.append(AskedRequest(sent_s=sent_s, ended_s=sent_s + latency_s, met=met))
    return asked


def _drop_details(file: Path) -> None:
    """Leaves what vLLM writes without ``--save-detailed``: the rest is megabytes for each of a hundred probes."""
    content = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, json.dumps({name: each for name, each in content.items() if name not in _DETAILS}))


def engine_facts(text: str) -> dict[str, Any]:
    """What the server's log says of its memory and of how it runs; null where this version says nothing."""
    tokens, weights = _KV_TOKENS.search(text), _WEIGHTS_GIB.search(text)
    return {
        "kv_cache_tokens": int(tokens[1].replace(",", "")) if tokens else None,
        "loaded_weights_gib": float(weights[1]) if weights else None,
        "not_compiled": found[1].strip()[:200] if (found := _UNCOMPILED.search(text)) else None,
    }
