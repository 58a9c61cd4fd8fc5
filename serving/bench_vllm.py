"""The vLLM half of the benchmark: real servers, driven by ``vllm bench serve``; its figures are taken as they are."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from serving.statistics import BETWEEN_TOKENS, METRICS
from serving.vllm_server import bench_serve, running_server
from serving.workload import WARMUP_SEED, Workload
from toolchain.errors import SenteiError
from toolchain.quantized import open_servable

_CPU_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_WEIGHTS_GIB = re.compile(r"[Mm]odel loading took ([\d.]+) Gi?B")


@contextmanager
def vllm_measuring(
    directories: Mapping[str, Path],
    workload: Workload,
    out: Path,
    dtype: str | None,
    engine_options: Sequence[str],
) -> Iterator[tuple[Callable[[str, int], dict[str, float | None]], dict[str, dict[str, Any]]]]:
    """Yields how to measure one side, and what each server told of itself.

    On a CPU both servers stay up and only one works at a time. On a GPU a server takes nearly all memory, so each
    measurement starts its own.

    Args:
        directories: ``original`` and ``pruned`` checkpoints.
        workload: See :class:`serving.workload.Workload`.
        out: Existing directory; vLLM's own result files go to ``vllm/``, the servers' logs beside it.
        dtype: Computed in; by default the checkpoint's own, given to vLLM explicitly.
        engine_options: For ``vllm serve``, the same for both.
    """
    (out / "vllm").mkdir()
    told: dict[str, dict[str, Any]] = {}
    on_gpu = torch.cuda.is_available()

    @contextmanager
    def server(side: str, log: Path) -> Iterator[str]:
        options = _server_options(directories[side], dtype, engine_options)
        with running_server(directories[side], options=options, log=log) as base_url:
            told[side] = {"device": "cuda" if on_gpu else "cpu", "server_options": options, **_from_log(log)}
            warmup = _load_options(workload, workload.seed + WARMUP_SEED, workload.concurrency)
            bench_serve(base_url, directories[side], options=warmup, result_file=out / f"{side}-warmup.json")
            (out / f"{side}-warmup.json").unlink()
            yield base_url

    def run(side: str, repeat: int, base_url: str) -> dict[str, float | None]:
        options = _load_options(workload, workload.seed + repeat, workload.num_prompts)
        file = out / "vllm" / f"{side}-{repeat}.json"
        return _metrics(side, workload, bench_serve(base_url, directories[side], options=options, result_file=file))

    with ExitStack() as stack:
        if on_gpu:

            def measure(side: str, repeat: int) -> dict[str, float | None]:
                with server(side, out / f"{side}-{repeat}.log") as base_url:
                    return run(side, repeat, base_url)
        else:
            urls = {side: stack.enter_context(server(side, out / f"{side}.log")) for side in directories}

            def measure(side: str, repeat: int) -> dict[str, float | None]:
                return run(side, repeat, urls[side])

        yield measure, told


def _server_options(directory: Path, dtype: str | None, engine_options: Sequence[str]) -> list[str]:
    options = list(engine_options)
    if not any(option.split("=")[0] == "--dtype" for option in options):
        # vLLM's "auto" would run a float32 checkpoint in half precision.
        options += ["--dtype", dtype or str(open_servable(directory).dtype).removeprefix("torch.")]
    if not any("prefix-caching" in option for option in options):
        options.append("--no-enable-prefix-caching")
    if not (
        torch.cuda.is_available() or _CPU_KV_SPACE in os.environ or any("kv-cache-memory" in each for each in options)
    ):
        # Two servers share the machine's memory, and vLLM's CPU default takes much of it for each.
        options += ["--kv-cache-memory-bytes", "1G"]
    return options


def _load_options(workload: Workload, seed: int, num_prompts: int) -> list[str]:
    return [
        "--dataset-name", "random",
        "--random-input-len", str(workload.input_len),
        "--random-output-len", str(workload.output_len),
        "--random-range-ratio", "0.0",
        "--num-prompts", str(num_prompts),
        "--max-concurrency", str(workload.concurrency),
        "--seed", str(seed),
        "--ignore-eos",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "99",
    ]  # fmt: skip


def _metrics(side: str, workload: Workload, result: Mapping[str, Any]) -> dict[str, float | None]:
    if failed := workload.num_prompts - result["completed"]:
        raise SenteiError(
            f"{failed} of {workload.num_prompts} requests to the {side} model failed.",
            "Run sentei serve on that directory and look at its log.",
        )
    undefined = BETWEEN_TOKENS if workload.output_len == 1 else frozenset()
    return {metric.name: None if metric.name in undefined else result[metric.name] for metric in METRICS}


def _from_log(log: Path) -> dict[str, Any]:
    """What the server's log says of its memory; null where this version says nothing."""
    text = log.read_text(encoding="utf-8", errors="replace")
    tokens, weights = _KV_TOKENS.search(text), _WEIGHTS_GIB.search(text)
    return {
        "kv_cache_tokens": int(tokens[1].replace(",", "")) if tokens else None,
        "loaded_weights_gib": float(weights[1]) if weights else None,
    }
