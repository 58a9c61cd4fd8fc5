"""Prunes a checkpoint larger than the memory allowed, with ``--offload``; the plan must be the same as without.

A checkpoint of random weights and Llama's shape is generated, 3 GB in several shards. While ``sentei prune --offload``
runs, its anonymous resident memory (what no file backs) is sampled; it must stay below the limit.

    python benchmarks/offload.py -o offload.json

Results stand in ``benchmarks/results/``.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from random_checkpoint import generate

from serving.benchmark.environment import describe_environment
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.outputs import write_text

_SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
_SHARD_BYTES = 1_000_000_000
_SAMPLE_S = 0.02
_COMPARED = ("plan.json", "plan.safetensors")


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    layers: Annotated[int, typer.Option(help="Decoder layers, of 88 MB each.")] = 34,
    limit_gb: Annotated[float, typer.Option(help="Anonymous memory allowed, in 10^9 bytes.")] = 1.5,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 128,
    removals: Annotated[int, typer.Option(help="Attentions to remove.")] = 2,
) -> None:
    """Prunes from disk and in memory, and compares peaks and plans."""
    limit = int(limit_gb * 1e9)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        generate(directory / "model", {**_SHAPE, "num_hidden_layers": layers}, max_shard_bytes=_SHARD_BYTES)
        checkpoint = open_checkpoint(directory / "model")
        settings = ["--sparsity", "0.25", "--samples", "4", "--seq-len", str(seq_len), "--dtype", "float32"]
        settings += ["--attention-removals", str(removals)]
        offloaded = _prune(directory, "offloaded", [*settings, "--offload"])
        resident = _prune(directory, "resident", settings)
        result = {
            "schema_version": 1,
            "kind": "offload_benchmark",
            "checkpoint": {
                "weight_bytes": checkpoint.weight_bytes,
                "num_shards": len({info.file for info in checkpoint.tensors.values()}),
                "num_hidden_layers": layers,
                "dtype": "bfloat16",
                **_SHAPE,
            },
            "computed_in": "float32",
            "limit_bytes": limit,
            "offloaded": offloaded,
            "resident": resident,
            "same_plan": offloaded["sha256"] == resident["sha256"],
            "environment": describe_environment(),
        }
    write_text(out, json.dumps(result, indent=2) + "\n")
    peaks = (
        f"{offloaded['peak_anonymous_bytes'] / 1e9:.2f} GB, in memory {resident['peak_anonymous_bytes'] / 1e9:.2f} GB"
    )
    typer.echo(f"{checkpoint.weight_bytes / 1e9:.2f} GB of weights; peak from disk {peaks}")
    if not result["same_plan"] or offloaded["peak_anonymous_bytes"] > limit:
        raise SystemExit("The plans differ, or the limit was exceeded.")


def _prune(directory: Path, name: str, settings: list[str]) -> dict[str, Any]:
    """Runs ``sentei prune`` in a process of its own and samples its memory until it ends."""
    out = directory / name
    command = [str(Path(sys.executable).with_name("sentei")), "prune", str(directory / "model"), "-o", str(out)]
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(_SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"sentei prune ended with exit code {process.returncode}.")
    return {
        "peak_anonymous_bytes": peak,
        "duration_s": time.monotonic() - started,
        "sha256": {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in _COMPARED},
        "pruned_weight_bytes": open_checkpoint(out).weight_bytes,
    }


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    values = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(values[0]) * 1024 if values else 0


if __name__ == "__main__":
    typer.run(main)
