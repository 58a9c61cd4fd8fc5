"""Do two load generators see the same server alike? ``vllm bench serve``, which sentei uses, and guidellm, in turns.

guidellm needs an environment of its own:

    python -m venv /tmp/guidellm && /tmp/guidellm/bin/pip install guidellm
    python benchmarks/client_agreement.py MODEL --guidellm /tmp/guidellm/bin/guidellm -o client_agreement.json

Both send prompts of 64 tokens, one at a time, and ask for 32 tokens with the end of sequence ignored. guidellm's names
mean other things: what it calls ``inter_token_latency_ms`` is TPOT here, and its ``time_per_output_token_ms`` is E2EL
divided by the output tokens.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from serving.benchmark.environment import describe_environment
from serving.benchmark.sessions.vllm_client import bench_serve
from serving.server.vllm.server import running_server
from toolchain.outputs import write_text
from toolchain.significance import ratio_interval

_INPUT_LEN, _OUTPUT_LEN = 64, 32
_METRICS = ("ttft_ms", "tpot_ms", "e2el_per_token_ms")


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint to serve.")],
    *,
    guidellm: Annotated[str, typer.Option(help="Its command.")] = "guidellm",
    repeats: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    num_prompts: Annotated[int, typer.Option(help="Requests a turn.")] = 16,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
) -> None:
    """Measures one server with both clients, alternating, and writes the ratio of what they saw."""
    turns: list[dict[str, dict[str, float]]] = []
    options = [
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes",
        "1G",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with running_server(model, options=[*options, "--dtype", "bfloat16"], log=directory / "server.log") as url:
            for turn in range(-1, repeats):  # the first is a warm-up
                measured = {
                    "vllm": by_vllm(url, model, num_prompts, turn + 1, directory / "vllm.json"),
                    "guidellm": by_guidellm(guidellm, url, model, num_prompts, turn + 1, directory / "guidellm.json"),
                }
                print(json.dumps(measured), flush=True)
                if turn >= 0:
                    turns.append(measured)
    ratios = {
        name: ratio_interval([each["vllm"][name] for each in turns], [each["guidellm"][name] for each in turns])
        for name in _METRICS
    }
    result = {
        "schema_version": 1, "kind": "client_agreement", "input_len": _INPUT_LEN, "output_len": _OUTPUT_LEN,
        "num_prompts": num_prompts, "guidellm_over_vllm": ratios, "turns": turns, "environment": describe_environment(),
    }  # fmt: skip
    write_text(out, json.dumps(result, indent=1) + "\n")
    for name, ratio in ratios.items():
        print(f"{name}: guidellm / vllm {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")


def by_vllm(url: str, model: Path, num_prompts: int, seed: int, file: Path) -> dict[str, float]:
    """What sentei's client sees."""
    options = [
        "--dataset-name", "random", "--random-input-len", str(_INPUT_LEN), "--random-output-len", str(_OUTPUT_LEN),
        "--num-prompts", str(num_prompts), "--max-concurrency", "1", "--seed", str(seed), "--ignore-eos",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
    ]  # fmt: skip
    result = bench_serve(url, model, options=options, result_file=file)
    return {
        "ttft_ms": result["mean_ttft_ms"],
        "tpot_ms": result["mean_tpot_ms"],
        "e2el_per_token_ms": result["mean_e2el_ms"] / _OUTPUT_LEN,
    }


def by_guidellm(guidellm: str, url: str, model: Path, num_prompts: int, seed: int, file: Path) -> dict[str, float]:
    """What guidellm sees, under this project's names."""
    data = f"kind=synthetic_text,prompt_tokens={_INPUT_LEN},output_tokens={_OUTPUT_LEN}"
    command = [
        guidellm, "run", "--disable-console",
        "--backend", f"kind=openai_http,target={url},request_format=/v1/completions",
        "--profile", "kind=concurrent,streams=1",
        "--constraint", f"kind=max_requests,count={num_prompts}",
        "--tokenizer", f"kind=huggingface_auto,model={model.resolve()}",
        "--data", data,
        "--seed", f"kind=static,value={seed}",
        "--output", f"kind=json,path={file}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"guidellm ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    requests: list[dict[str, Any]] = json.loads(file.read_text())["benchmarks"][0]["requests"]["successful"]
    assert len(requests) == num_prompts, f"{len(requests)} of {num_prompts} requests succeeded"
    assert {each["output_tokens"] for each in requests} == {_OUTPUT_LEN}
    names = ("time_to_first_token_ms", "inter_token_latency_ms", "time_per_output_token_ms")
    return {ours: fmean(each[theirs] for each in requests) for ours, theirs in zip(_METRICS, names, strict=True)}


if __name__ == "__main__":
    typer.run(main)
