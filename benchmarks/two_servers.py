"""Output tokens a second of two vLLM servers that are up together, in turn: for GPUs that are lent by the minute.

``sentei benchmark`` measures more (latencies, energy, each model's own starts), with vLLM's client, which alone needs
20 seconds to start on such a machine. What one server's start adds to the next is not in these intervals.

    python benchmarks/two_servers.py ORIGINAL PRUNED -o two_servers.json
"""

import asyncio
import json
import random
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from serving.benchmark.environment import describe_environment
from serving.benchmark.ratios import SIDES
from serving.benchmark.run import schedule
from serving.server.vllm.server import running_server
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.outputs import write_text
from toolchain.significance import ratio_interval


def main(
    original: Annotated[Path, typer.Argument(help="The original's directory.")],
    pruned: Annotated[Path, typer.Argument(help="The pruned model's.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write; the servers' logs beside it.")],
    options: Annotated[str, typer.Option(help="vLLM's, for both servers.")] = "",
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    output_len: Annotated[int, typer.Option(help="Output tokens.")] = 128,
    repeats: Annotated[int, typer.Option(help="Times that both are measured.")] = 5,
    load: Annotated[list[str], typer.Option(help="CONCURRENCY:REQUESTS; several times.")] = ["1:4", "16:32", "64:128"],  # noqa: B006
) -> None:
    """A B, B A, A B ...: each load on both servers, random prompts, greedy, no early end."""
    directories = dict(zip(SIDES, (original, pruned), strict=True))
    loads = [(int(concurrency), int(requests)) for concurrency, requests in (each.split(":") for each in load)]
    widest, _ = max(loads)
    rates: dict[int, dict[str, list[float]]] = {concurrency: {side: [] for side in SIDES} for concurrency, _ in loads}
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        urls = {
            side: stack.enter_context(
                running_server(directory, options=options.split(), log=out.with_suffix(f".{side}.log"))
            )
            for side, directory in directories.items()
        }
        for url in urls.values():
            asyncio.run(_throughput(url, widest, widest, input_len, output_len, seed=0))
        for visit in schedule(repeats, len(loads), both_up=True):
            concurrency, requests = loads[visit.load]
            seed = 1 + 1000 * visit.repeat + concurrency
            rate = asyncio.run(_throughput(urls[visit.side], concurrency, requests, input_len, output_len, seed=seed))
            rates[concurrency][visit.side].append(rate)
    document = describe(rates, {"input_len": input_len, "output_len": output_len, "loads": load, "options": options})
    document["models"] = {side: shape_of(directory) for side, directory in directories.items()}
    write_text(out, json.dumps(document, indent=1) + "\n")
    for result in document["results"]:
        gain = result["gain"]
        typer.echo(f"{result['concurrency']} at a time: {gain['value']:.3f}x ({gain['low']:.3f} to {gain['high']:.3f})")


def describe(rates: dict[int, dict[str, list[float]]], settings: dict[str, Any]) -> dict[str, Any]:
    """The document: by concurrency, each model's rates in tokens a second, their medians, and the gain."""
    results = [
        {
            "concurrency": concurrency,
            **{side: {"median": median(values), "values": values} for side, values in of_load.items()},
            "gain": ratio_interval(of_load["original"], of_load["pruned"]),
        }
        for concurrency, of_load in rates.items()
    ]
    return {
        "schema_version": 1, "kind": "two_servers", "metric": "output_throughput, tokens a second", **settings,
        "results": results, "environment": describe_environment(),
    }  # fmt: skip


def shape_of(directory: Path) -> dict[str, Any]:
    """What the speed of a model depends on: its bytes, and what each layer has left."""
    checkpoint = open_checkpoint(directory)
    return {
        "weight_bytes": checkpoint.weight_bytes,
        "intermediate_size": [layer.intermediate_size for layer in checkpoint.layout],
        "num_attentions": sum(layer.attention for layer in checkpoint.layout),
    }


async def _throughput(
    url: str, concurrency: int, requests: int, input_len: int, output_len: int, *, seed: int
) -> float:
    import aiohttp

    # Of ids that any tokenizer has and that are no special tokens.
    draw, free = random.Random(seed), asyncio.Semaphore(concurrency)
    limits = {"max_tokens": output_len, "ignore_eos": True, "temperature": 0}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> int:
            prompt = [draw.randrange(1000, 20000) for _ in range(input_len)]
            async with free, session.post(f"{url}/v1/completions", json={"prompt": prompt, **limits}) as response:
                response.raise_for_status()
                return (await response.json())["usage"]["completion_tokens"]

        started = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask() for _ in range(requests))))
        seconds = time.perf_counter() - started
    if tokens != requests * output_len:
        raise RuntimeError(f"{url} wrote {tokens} tokens instead of {requests * output_len}.")
    return tokens / seconds


if __name__ == "__main__":
    typer.run(main)
