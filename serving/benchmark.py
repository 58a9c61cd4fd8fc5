"""A/B benchmark: original and pruned, alternating, the same prompts and lengths; writes ``results.json``."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from serving.environment import describe_environment
from serving.model_facts import (
    ModelFacts,
    checkpoint_facts,
    compare_sizes,
    expected_gains,
    onnx_facts,
    size_entry,
)
from serving.statistics import (
    DEFAULT_PRIMARY,
    RATIO_FORMULA,
    RequestTimes,
    check_primary,
    check_statistics,
    compare,
    request_metrics,
)
from serving.worker_process import Worker, running_worker
from serving.workload import WARMUP_SEED, Workload
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.output import check_output_directory, new_directory, write_text

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
MIN_REPEATS = 3
SIDES = ("original", "pruned")
_DTYPES = ("float32", "bfloat16", "float16")
_WARMUP_TOKENS = 16
_LIBRARIES = {"onnx": ("onnxruntime_genai", "onnxruntime-genai", "onnx"), "vllm": ("vllm", "vllm", "vllm")}
_PEAK_FORMULA = {
    "cpu": "highest resident memory of the process that ran the model alone, the Python runtime and libraries included",
    "cuda": "highest memory allocated by torch on the device; null for engines that do not tell",
    "vllm": "not measured: vLLM reserves the memory it is told to, not what the model needs",
}
_KV_TOKENS_FORMULA = "tokens that fit into the server's KV cache, from its log; both were given the same memory"

Engine = Literal["transformers", "onnx", "vllm"]
# Measures one side once: (side, repeat) to metrics by name.
Measure = Callable[[str, int], dict[str, float | None]]


def benchmark(
    original: Path,
    pruned: Path,
    *,
    engine: Engine,
    out: Path,
    input_len: int = 512,
    output_len: int = 128,
    concurrency: int = 1,
    num_prompts: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    primary: str = DEFAULT_PRIMARY,
    device: str = "auto",
    dtype: str | None = None,
    engine_options: Sequence[str] = (),
    force: bool = False,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measures two finished directories against each other and writes ``out/results.json`` with the logs beside it.

    Args:
        original: Checkpoint, or ONNX export for engine ``onnx``.
        pruned: The same kind of directory.
        engine: What runs both.
        out: Written whole or not at all.
        input_len: Prompt tokens.
        output_len: Tokens generated for every prompt.
        concurrency: Requests in flight.
        num_prompts: Requests a repeat and model; by default one batch of ``concurrency``, four of them for vLLM.
        repeats: How often both are measured.
        seed: Of the prompts.
        primary: The metric that decides; the others are marked as exploratory.
        device: ``auto``, ``cpu`` or ``cuda``; vLLM takes the device it was built for.
        dtype: Computed in; by default the checkpoint's own. An ONNX export has its precision built in.
        engine_options: Options for ``vllm serve``, for both models.
        force: Replace what is in ``out``.
        on_progress: Told one line at a time.

    Returns:
        What ``results.json`` holds.

    Raises:
        SenteiError: Bad directories or settings, or a process that died; nothing is left in ``out``.
        MissingDependencyError: The engine or scipy is not installed.
    """
    workload = Workload(
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
        num_prompts=concurrency * (4 if engine == "vllm" else 1) if num_prompts is None else num_prompts,
        seed=seed,
    )
    check_output_directory(out, force=force, inputs=(original, pruned))
    _check_settings(engine, workload, repeats, dtype, engine_options)
    check_primary(primary, output_len=output_len)
    check_statistics()
    directories = {"original": original, "pruned": pruned}
    facts = {side: _facts(engine, path, dtype) for side, path in directories.items()}
    _check_comparable(facts, workload)
    with new_directory(out, force=force) as partial:
        with _measuring(engine, directories, facts, workload, partial, device, dtype, engine_options) as (
            measure,
            told,
        ):
            runs = alternate(measure, repeats, on_progress, primary)
        results = _results(
            engine, directories, facts, workload, runs, told, primary,
            options={
                "device": device, "dtype": dtype, "repeats": repeats, "engine_options": list(engine_options),
            },
        )  # fmt: skip
        write_text(partial / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def alternate(
    measure: Measure, repeats: int, on_progress: Callable[[str], None], primary: str = DEFAULT_PRIMARY
) -> list[dict[str, Any]]:
    """Measures both sides ``repeats`` times, A B B A A B ...: what drifts meets both alike."""
    runs = []
    for repeat in range(repeats):
        order = SIDES if repeat % 2 == 0 else SIDES[::-1]
        run: dict[str, Any] = {"repeat": repeat, "order": list(order)}
        for side in order:
            run[side] = measure(side, repeat)
            on_progress(f"repeat {repeat + 1} of {repeats}: {side} {primary} {run[side][primary]:.1f}")
        runs.append(run)
    return runs


@contextmanager
def _measuring(
    engine: Engine,
    directories: Mapping[str, Path],
    facts: Mapping[str, ModelFacts],
    workload: Workload,
    out: Path,
    device: str,
    dtype: str | None,
    engine_options: Sequence[str],
) -> Iterator[tuple[Measure, dict[str, dict[str, Any]]]]:
    """Both models up and warm: yields how to measure one, and what each told of itself, filled meanwhile."""
    if engine == "vllm":
        from serving.bench_vllm import vllm_measuring

        with vllm_measuring(directories, workload, out, dtype, engine_options) as measuring:
            yield measuring
        return
    vocab_size = min(each.vocab_size for each in facts.values())
    told: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for side in SIDES:
            workers[side] = stack.enter_context(running_worker(side, out / f"{side}.log"))
            settings = {"engine": engine, "device": device, "dtype": dtype}
            told[side] = workers[side].ask("load", directory=str(directories[side].resolve()), **settings)
            warmup_tokens = min(workload.output_len, _WARMUP_TOKENS)
            _ask(workers[side], workload, vocab_size, workload.seed + WARMUP_SEED, warmup_tokens)

        def measure(side: str, repeat: int) -> dict[str, float | None]:
            answer = _ask(workers[side], workload, vocab_size, workload.seed + repeat, workload.output_len)
            told[side]["peak_memory_bytes"] = answer["peak_memory_bytes"]
            requests = [
                RequestTimes(start_s=each["start_s"], token_times_s=tuple(each["token_times_s"]))
                for each in answer["requests"]
            ]
            return request_metrics(requests, input_len=workload.input_len)

        yield measure, told


def _ask(worker: Worker, workload: Workload, vocab_size: int, seed: int, output_len: int) -> dict[str, Any]:
    prompts = random_prompts(workload.num_prompts, workload.input_len, vocab_size, seed)
    return worker.ask("measure", prompts=prompts, output_len=output_len, batch_size=workload.concurrency)


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids, the same for the same seed: speed does not depend on what they mean."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def _facts(engine: Engine, directory: Path, dtype: str | None) -> ModelFacts:
    return onnx_facts(directory) if engine == "onnx" else checkpoint_facts(directory, dtype)


def _check_settings(
    engine: str, workload: Workload, repeats: int, dtype: str | None, engine_options: Sequence[str]
) -> None:
    if engine not in ("transformers", "onnx", "vllm"):
        raise SenteiError(f"Engine {engine!r} is not known.", "Choose transformers, onnx or vllm.")
    if repeats < MIN_REPEATS:
        raise SenteiError(
            f"{repeats} repeats cannot give an interval worth printing.", f"Use at least {MIN_REPEATS}, better 5."
        )
    for name in ("input_len", "output_len", "concurrency", "num_prompts"):
        if getattr(workload, name) < 1:
            raise SenteiError(f"{name} is {getattr(workload, name)}; it must be at least 1.")
    if workload.num_prompts < workload.concurrency:
        raise SenteiError(
            f"num_prompts is {workload.num_prompts}, fewer than the {workload.concurrency} requests in flight.",
            "Raise num_prompts, or lower concurrency.",
        )
    if dtype is not None and (dtype not in _DTYPES or engine == "onnx"):
        allowed = "leave it out: an ONNX export has its precision built in" if engine == "onnx" else ", ".join(_DTYPES)
        raise SenteiError(f"dtype {dtype!r} is not possible with engine {engine}.", f"Allowed: {allowed}.")
    if engine_options and engine != "vllm":
        raise SenteiError(f"Engine {engine} takes no further options.", "They are passed to vllm serve alone.")
    if engine in _LIBRARIES:
        _check_library(*_LIBRARIES[engine])


def _check_library(module: str, library: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise MissingDependencyError(library, extra)


def _check_comparable(facts: Mapping[str, ModelFacts], workload: Workload) -> None:
    if facts["original"].precision != facts["pruned"].precision:
        raise SenteiError(
            f"The original is {facts['original'].precision} and the pruned model {facts['pruned'].precision}: what "
            "comes of pruning could not be told from what comes of precision.",
            "Export both alike, or give a dtype.",
        )
    for side, each in facts.items():
        if workload.input_len + workload.output_len > each.max_len:
            raise SenteiError(
                f"{workload.input_len} input and {workload.output_len} output tokens do not fit the {side} model, "
                f"which takes {each.max_len}.",
                "Shorten one of them.",
            )


def _results(
    engine: Engine,
    directories: Mapping[str, Path],
    facts: Mapping[str, ModelFacts],
    workload: Workload,
    runs: Sequence[Mapping[str, Any]],
    told: Mapping[str, Mapping[str, Any]],
    primary: str,
    *,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    metrics = compare(runs, primary=primary)
    medians = {name: metric["original"]["median"] for name, metric in metrics.items()}
    sizes = compare_sizes(facts["original"], facts["pruned"])
    place = "vllm" if engine == "vllm" else "cpu" if told["original"]["device"] == "cpu" else "cuda"
    peaks = [told[side].get("peak_memory_bytes") for side in SIDES]
    sizes["peak_memory_bytes"] = size_entry(*peaks, unit="bytes", formula=_PEAK_FORMULA[place])
    if engine == "vllm":
        tokens = [told[side]["kv_cache_tokens"] for side in SIDES]
        sizes["kv_cache_tokens"] = size_entry(*tokens, unit="tokens", formula=_KV_TOKENS_FORMULA)
    expected = expected_gains(
        facts["original"],
        facts["pruned"],
        input_len=workload.input_len,
        output_len=workload.output_len,
        concurrency=workload.concurrency,
        original_medians=medians,
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "benchmark",
        "sentei_version": metadata.version("sentei"),
        "engine": engine,
        "primary_metric": primary,
        "ratio_formula": RATIO_FORMULA,
        "options": dict(options),
        "models": {
            side: {"name": path.resolve().name, "directory": str(path), **told[side]}
            for side, path in directories.items()
        },
        "sizes": sizes,
        # A list, so that a sweep over loads can add to it.
        "measurements": [
            {
                "workload": {
                    **asdict(workload),
                    "ignore_eos": True,
                    "prompts": "random token ids, the same for both models",
                },
                "metrics": metrics,
                "expected": expected,
                "runs": list(runs),
            }
        ],
        "environment": describe_environment(),
    }
