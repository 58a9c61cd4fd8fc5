"""Servers in the benchmark, vLLM's and ONNX Runtime's, driven by ``vllm bench serve``; its figures are kept."""

import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from serving.benchmark.gpu_watch import energy, watched_gpus
from serving.benchmark.metrics import BETWEEN_TOKENS, DISTRIBUTED, METRICS, PERCENTILES
from serving.benchmark.sessions.sides import SideProcesses, free_log
from serving.benchmark.sessions.vllm_client import STALL_TIMEOUT_S, bench_serve, served_model_name
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.workload import WARMUP_SEED, Slo, Workload
from serving.onnx_export.files import read_settings
from serving.server.vllm import HOST, running_server, tail
from toolchain.checkpoint.directory import dtype_name
from toolchain.checkpoint.quantized import open_servable
from toolchain.errors import SenteiError
from toolchain.outputs import write_text

_PROMPTS_FILE = "prompts.jsonl"
_CPU_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
# Of the mean time between arrivals: none of thousands comes later than this after the one before it.
_LONGEST_GAP = 20
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_WEIGHTS_GIB = re.compile(r"[Mm]odel loading took ([\d.]+) Gi?B")
# Without what stands before a message in vLLM's log: process, level, time, file and line.
_UNCOMPILED = re.compile(
    r"^(?:.*\[\S+:\d+\] )?(.*(?:Enforce eager set|[Cc]uda ?graph is disabled|[Ff]all(?:ing)? back to eager).*)$", re.M
)


class ServerSession:
    """Both models' servers, vLLM or ONNX, started when they are needed and warmed up as widely as the widest load.

    One is up at a time, as it will be where it serves, and each repeat starts its own: one server is faster than
    another of the same model, by percents, for as long as both run (docs/metrics.md).

    Attributes:
        both_up: Whether both are up together: servers that run already.
        told: What each server told of itself.
    """

    def __init__(
        self,
        directories: Mapping[str, Path],
        workloads: Sequence[Workload],
        out: Path,
        *,
        dtype: str | None,
        engine_options: Sequence[str],
        urls: Mapping[str, str] | None = None,
        api_key: str | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        onnx_context: int | None = None,
        searches_rate: bool = False,
    ) -> None:
        """Starts nothing yet.

        Args:
            directories: ``original`` and ``pruned`` checkpoints.
            workloads: All that will be asked.
            out: Existing directory; vLLM's own result files go to ``vllm/``, the servers' logs beside it.
            dtype: Computed in; by default the checkpoint's own, given to vLLM explicitly.
            engine_options: For ``vllm serve``, the same for both.
            urls: Servers that run already, by side; none is started then.
            api_key: What they ask for.
            stall_timeout_s: See :func:`serving.benchmark.sessions.vllm_client.bench_serve`.
            onnx_context: For ONNX exports, the tokens that their context holds; ``None`` starts vLLM.
            searches_rate: The highest rate is searched for as well, with more requests in flight than a workload has.
        """
        self.both_up = urls is not None
        self.told: dict[str, dict[str, Any]] = {}
        self._directories, self._out, self._dtype, self._options = directories, out, dtype, engine_options
        self._onnx_context, self._longest = onnx_context, max(workload.longest for workload in workloads)
        self._widest = max(workloads, key=lambda workload: workload.width)
        self._searches_rate, self._logs = searches_rate, dict[str, Path]()
        self._urls, self._api_key, self._stall_timeout_s = urls, api_key, stall_timeout_s
        self._servers = SideProcesses(self._start, keep_all=self.both_up)
        (out / "vllm").mkdir(exist_ok=True)
        self._prompts_file = out.resolve() / _PROMPTS_FILE
        if own := self._widest.prompts:
            write_text(self._prompts_file, "\n".join(own.lines) + "\n")

    def measure(
        self, side: str, repeat: int, workload: Workload, *, name: str, slo: Slo | None = None
    ) -> dict[str, Any]:
        """Asks one model one load.

        Args:
            side: ``original`` or ``pruned``.
            repeat: Which; it moves the seed.
            workload: What to ask.
            name: Of vLLM's result file.
            slo: Limits that ``request_goodput`` counts by.

        Returns:
            A value for each of :data:`serving.benchmark.metrics.METRICS`, ``request_goodput`` if there are
            limits, and ``completed``, ``failed``, ``first_error``, ``client_cpu_cores``.

        Raises:
            EngineFailedError: The server died, hung, or failed every request; the end of its log is in the message.
        """
        # None of those that run already is measured before all are known to be there.
        for each in self._directories if self.both_up else ():
            self._servers.get(each, repeat)
        base_url = self._servers.get(side, repeat)
        options = _load_options(workload, workload.seed + repeat, workload.num_prompts, self._prompts_file)
        if slo:
            options += ["--goodput", *(f"{metric}:{limit:g}" for metric, limit in slo.limits.items())]
        # Unknown of a server that was there before us: the GPUs here may not be its own.
        with watched_gpus(self.told[side]["device"]) as gpus:
            result = self._bench(side, base_url, options, self._out / "vllm" / f"{name}.json", _longest_gap_s(workload))
        seen = gpus.last(result["duration"])
        return {**_metrics(workload, result), **energy(seen, result["total_output_tokens"])}

    def drop(self, side: str) -> None:
        """Stops a side's server; the next measurement starts another."""
        self._servers.drop(side)

    def close(self) -> None:
        """Stops everything."""
        self._servers.close()

    def _start(self, side: str, repeat: int, stack: ExitStack) -> str:
        try:
            base_url, self.told[side] = self._running(side, repeat, stack)
        except SenteiError as error:
            if side not in self.told:
                raise
            # It started before with the same options: another attempt may succeed.
            raise EngineFailedError(error.message, error.hint) from error
        warmup = self._widest
        options = _load_options(warmup, warmup.seed + WARMUP_SEED, warmup.width, self._prompts_file)
        file = self._out / f"{side}-warmup.json"
        self._bench(side, base_url, options, file)
        file.unlink(missing_ok=True)
        return base_url

    def _running(self, side: str, repeat: int, stack: ExitStack) -> tuple[str, dict[str, Any]]:
        """The base URL of a side's server, and what it tells of itself."""
        if self._urls:
            base_url = self._urls[side].rstrip("/")
            served = served_model_name(base_url, self._api_key)
            return base_url, {"device": None, "url": base_url, "served_model": served, **engine_facts("")}
        log, start_s = free_log(self._out, side, repeat), time.monotonic()
        options, running = self._server(self._directories[side])
        base_url = stack.enter_context(running(self._directories[side], options=options, log=log))
        startup_s = time.monotonic() - start_s
        self._logs[side] = log
        text = log.read_text(encoding="utf-8", errors="replace")
        device = self._device(self._directories[side])
        return base_url, {"device": device, "server_options": options, "startup_s": startup_s, **engine_facts(text)}

    def _server(self, directory: Path) -> tuple[list[str], Callable[..., AbstractContextManager[str]]]:
        """The options of a side's server, and what runs it."""
        if self._onnx_context is None:
            return engine_options_for(directory, self._dtype, self._options), running_server
        from serving.server.onnx import DEFAULT_MAX_NUM_SEQS
        from serving.server.onnx import running_server as running_onnx_server

        # It reserves the memory of every answer at its full length.
        width = max(self._widest.width, DEFAULT_MAX_NUM_SEQS if self._searches_rate else 1)
        fair = {"--max-num-seqs": width, "--max-model-len": min(self._longest + 16, self._onnx_context)}
        given = {option.split("=")[0] for option in self._options}
        added = [text for name, value in fair.items() if name not in given for text in (name, str(value))]
        return [*self._options, *added], running_onnx_server

    def _device(self, directory: Path) -> str:
        if self._onnx_context is None:
            return vllm_device()
        return read_settings(directory).device

    def _bench(self, side: str, base_url: str, options: list[str], file: Path, idle_s: float = 0.0) -> dict[str, Any]:
        try:
            return bench_serve(
                base_url,
                self._directories[side],
                options=options,
                result_file=file,
                api_key=self._api_key,
                stall_timeout_s=self._stall_timeout_s + idle_s,
            )
        except EngineFailedError as error:
            raise EngineFailedError(f"{error.message}{self._log_end(side)}") from error

    def _log_end(self, side: str) -> str:
        if side not in self._logs:
            return ""
        text = self._logs[side].read_text(encoding="utf-8", errors="replace")
        return f" The end of the {side} server's log:\n{tail(text)}"


def vllm_device() -> str:
    """What the vLLM that is installed runs on: its build goes with torch's."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def engine_options_for(directory: Path, dtype: str | None, engine_options: Sequence[str]) -> list[str]:
    """The user's options with what makes a comparison fair: one precision, no prefix cache, one size of KV cache."""
    # vLLM's "auto" would run a float32 checkpoint in half precision.
    options = [*engine_options, "--dtype", dtype or dtype_name(open_servable(directory).dtype)]
    if not any("prefix-caching" in option for option in options):
        options.append("--no-enable-prefix-caching")
    if not (
        vllm_device() == "cuda" or _CPU_KV_SPACE in os.environ or any("kv-cache-memory" in each for each in options)
    ):
        # vLLM's CPU default takes much of the machine's memory.
        options += ["--kv-cache-memory-bytes", "1G"]
    return options


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
    told = {name: result[name] for name in ("first_error", "client_cpu_cores", "duration")}
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
        **told,
        "percentiles": percentiles,
        "completed": completed,
        "failed": workload.num_prompts - completed,
    }


def engine_facts(text: str) -> dict[str, Any]:
    """What the server's log says of its memory and of how it runs; null where this version says nothing."""
    tokens, weights = _KV_TOKENS.search(text), _WEIGHTS_GIB.search(text)
    return {
        "kv_cache_tokens": int(tokens[1].replace(",", "")) if tokens else None,
        "loaded_weights_gib": float(weights[1]) if weights else None,
        "not_compiled": found[1].strip()[:200] if (found := _UNCOMPILED.search(text)) else None,
    }


def check_urls(urls: Sequence[str], num_models: int) -> None:
    """Refuses anything but one server for each model.

    Raises:
        SenteiError: Another number, one server twice, or no URLs of http or https.
    """
    if len(urls) != num_models or any(not url.startswith(("http://", "https://")) for url in urls):
        raise SenteiError(
            f"--url takes one server for each model, the original's first; given: {', '.join(urls)}.",
            "Write --url http://127.0.0.1:8000 --url http://127.0.0.1:8001, or name one model.",
        )
    if len(set(map(_address, urls))) < len(urls):
        raise SenteiError(f"--url {urls[0]} is given for both models.", "Give each model's own server.")


def _address(url: str) -> tuple[str, str | None, int | None, str]:
    try:
        parts = urllib.parse.urlsplit(url)
        host = HOST if parts.hostname == "localhost" else parts.hostname
        return parts.scheme, host, parts.port, parts.path.rstrip("/")
    except ValueError as error:
        raise SenteiError(f"--url {url} is no URL ({error}).", "Write it like http://127.0.0.1:8000.") from error
