"""What the plugin costs: an unpruned model decoded by its class against the same model decoded by vLLM's own.

Two directories hold the demo model; they differ in ``architectures`` alone. Each is loaded by a vLLM engine in a
process of its own. The two take turns, in alternating order, and while one decodes, the other waits for its turn
without spinning, which is measured too. Both are started anew several times, each first every other time: of two
engines of one and the same model the first one started is some percent slower, as long as it runs. A rate counts from
the first token on, so prefill is not in it.

    python benchmarks/plugin_tax.py -o plugin_tax.json

Results stand in ``benchmarks/results/``.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from serving.benchmark.environment import describe_environment
from serving.engines.vllm import VllmEngine
from serving.server.vllm.server import has_cxx_compiler
from toolchain.checkpoint.directory import open_checkpoint, write_config
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.loading import load_tokenizer
from toolchain.outputs import write_text
from toolchain.significance import ratio_interval
from toolchain.text.embedded import documents

# How much slower the plugin's class may be.
_LIMIT = 0.02
# OpenMP's threads spin for a moment after their work; the next turn waits until they sleep.
_PAUSE_S = 0.5
Rates = dict[str, list[float]]


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    batch: Annotated[list[int], typer.Option(help="Sequences decoded together; several times.")] = [1, 8],  # noqa: B006
    starts: Annotated[int, typer.Option(help="Times that both engines are started.")] = 6,
    turns: Annotated[int, typer.Option(help="Times each class decodes in a start, at each batch size.")] = 4,
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 32,
    output_len: Annotated[int, typer.Option(help="Output tokens.")] = 64,
    eager: Annotated[bool, typer.Option("--eager", help="Without vLLM's compilation.")] = False,
) -> None:
    """Decodes with both classes in turn."""
    eager = eager or not has_cxx_compiler()
    with tempfile.TemporaryDirectory() as temporary:
        directories = _directories(Path(temporary))
        prompts = _prompts(directories["stock"], max(batch), input_len)
        # Statistics give the time of each request's first and last token.
        options = {"enforce_eager": eager, "max_num_seqs": max(batch), "disable_log_stats": False}
        rates: dict[int, Rates] = {size: {name: [] for name in directories} for size in batch}
        idle: list[float] = []
        for start in range(starts):
            with ExitStack() as stack:
                engines = {
                    name: stack.enter_context(_Engine(directories[name], input_len + output_len, options))
                    for name in (directories if start % 2 == 0 else reversed(directories))
                }
                for size in batch:
                    for name, measured in _take_turns(engines, prompts[:size], turns, output_len, idle).items():
                        rates[size][name].append(median(measured))
    results = [_compared(size, rates[size]) for size in batch]
    result = {
        "schema_version": 2,
        "kind": "plugin_tax",
        "stock": "LlamaForCausalLM",
        "plugin": "PrunedLlamaForCausalLM",
        "model": "SmolLM2-135M-Instruct, unpruned",
        "dtype": "bfloat16",
        "eager": eager,
        "input_len": input_len,
        "output_len": output_len,
        "turns": turns,
        "metric": "decode tokens per second: output tokens after the first of each sequence / the time they took; "
        "one value a start, the median of its turns",
        "ratio": "plugin / stock: exp(mean of ln over starts), with the 95 % t-interval of that mean",
        "limit": 1 - _LIMIT,
        "results": results,
        "median_idle_cpu_share": median(idle),
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(result, indent=2) + "\n")
    for each in results:
        ratio = each["ratio"]
        typer.echo(
            f"batch {each['batch_size']}: stock {median(each['tokens_per_s']['stock']):.1f} tokens/s, plugin "
            f"{median(each['tokens_per_s']['plugin']):.1f}, ratio {ratio['value']:.4f} ({ratio['low']:.4f} to "
            f"{ratio['high']:.4f}), {'' if each['within_limit'] else 'not '}shown to be within {_LIMIT:.0%}"
        )


def _directories(parent: Path) -> dict[str, Path]:
    """The demo model as it is, and under the name of the plugin's class."""
    stock, plugin = parent / "stock", parent / "plugin"
    import_gguf(demo_gguf(), stock)
    shutil.copytree(stock, plugin)
    checkpoint = open_checkpoint(stock)
    write_config(plugin, {**checkpoint.config, "architectures": [checkpoint.family.pruned_architecture]})
    return {"stock": stock, "plugin": plugin}


def _prompts(directory: Path, count: int, input_len: int) -> list[list[int]]:
    """Different stretches of text, the same in every run."""
    tokens = load_tokenizer(directory)(" ".join(documents()))["input_ids"]
    return [tokens[start : start + input_len] for start in range(0, count * input_len, input_len)]


class _Engine:
    """A vLLM engine in a process of its own, which waits in a read while it has nothing to do."""

    def __init__(self, directory: Path, max_model_len: int, options: dict[str, Any]) -> None:
        """Starts the process; a context, which waits until the model is loaded and ends the process."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, directory, max_model_len, options)
        self._process = context.Process(target=_run_engine, args=arguments)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Engine":
        try:
            self._connection.recv()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=30)
        self._process.kill()

    def decode(self, prompts: Sequence[Sequence[int]], output_len: int) -> dict[str, Any]:
        """See :func:`_decode`; and ``idle_cpu_share``, processor time by wall-clock time since the last turn."""
        self._connection.send((prompts, output_len))
        answer = self._connection.recv()
        time.sleep(_PAUSE_S)
        return answer


def _run_engine(connection: Connection, directory: Path, max_model_len: int, options: dict[str, Any]) -> None:
    # In this very process, so that nothing polls between turns and all of its processor time can be seen.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    engine = VllmEngine(directory, max_model_len=max_model_len, options=options)
    connection.send("loaded")
    while True:
        time.sleep(_PAUSE_S)
        used_s, since_s = time.process_time(), time.monotonic()
        try:
            prompts, output_len = connection.recv()
        except EOFError:
            break
        idle_cpu_share = (time.process_time() - used_s) / (time.monotonic() - since_s)
        connection.send({**_decode(engine, prompts, output_len), "idle_cpu_share": idle_cpu_share})
    engine.close()


def _decode(engine: VllmEngine, prompts: Sequence[Sequence[int]], output_len: int) -> dict[str, Any]:
    """Decodes greedily, all prompts together.

    Returns:
        ``tokens_per_s``, from the step that gives the first tokens on, and the ``tokens`` of each sequence.
    """
    outputs = engine._generate(prompts, max_tokens=output_len)
    first = min(output.metrics.first_token_ts for output in outputs)
    last = max(output.metrics.last_token_ts for output in outputs)
    return {
        "tokens_per_s": len(outputs) * (output_len - 1) / (last - first),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


def _take_turns(
    engines: dict[str, _Engine], prompts: Sequence[Sequence[int]], turns: int, output_len: int, idle: list[float]
) -> Rates:
    """Tokens/s of each engine; ``idle`` grows by what each used of a processor while it waited for the other."""
    warm = [engine.decode(prompts, output_len)["tokens"] for engine in engines.values()]
    if warm[0] != warm[1]:
        raise SystemExit("The two classes do not give the same tokens.")
    rates: Rates = {name: [] for name in engines}
    (*_, before) = engines
    for turn in range(turns):
        for name in engines if turn % 2 == 0 else reversed(engines):
            answer = engines[name].decode(prompts, output_len)
            rates[name].append(answer["tokens_per_s"])
            if name != before:  # it has waited for the other's turn
                idle.append(answer["idle_cpu_share"])
            before = name
    return rates


def _compared(batch_size: int, rates: Rates) -> dict[str, Any]:
    ratio = ratio_interval(rates["stock"], rates["plugin"])
    return {
        "batch_size": batch_size,
        "tokens_per_s": rates,
        "ratio": ratio,
        "within_limit": ratio["low"] > 1 - _LIMIT,
        "same_tokens": True,
    }


if __name__ == "__main__":
    typer.run(main)
