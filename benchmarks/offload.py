"""Prunes a checkpoint larger than the memory allowed, with ``--offload``; the plan must be the same as without.

A checkpoint of random weights and Llama's shape is generated, 3 GB in several shards. ``sentei prune`` runs on it as it
does by default, gradients and compensation included, from disk and in memory, each in a process of its own, and is
measured stage by stage from outside (``measured_command.py`` says how). From disk, its anonymous memory must stay below
the limit; in memory, below 1.3 times the weights and what a fit takes.

    python benchmarks/offload.py -o offload.json

Results stand in ``benchmarks/results/``; ``docs/decisions/memory.md`` says what is counted.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measured_command import measure_sentei
from random_checkpoint import generate

from serving.benchmark.environment import describe_environment
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.outputs import write_text
from toolchain.prune.memory_needed import memory_needed
from toolchain.prune.methods import DEFAULT
from toolchain.prune.settings import PruneSettings

_SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
_SHARD_BYTES = 1_000_000_000
_SAMPLES = 4
_COMPARED = ("plan.json", "plan.safetensors", "model.safetensors.index.json")


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    layers: Annotated[int, typer.Option(help="Decoder layers, of 88 MB each.")] = 34,
    limit_gb: Annotated[float, typer.Option(help="Anonymous memory allowed, in 10^9 bytes.")] = 1.5,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    removals: Annotated[int, typer.Option(help="Attentions to remove.")] = 2,
    dtype: Annotated[str, typer.Option(help="Computed in.")] = "float32",
) -> None:
    """Prunes from disk and in memory, and compares peaks and plans."""
    limit = int(limit_gb * 1e9)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        generate(directory / "model", {**_SHAPE, "num_hidden_layers": layers}, max_shard_bytes=_SHARD_BYTES)
        checkpoint = open_checkpoint(directory / "model")
        settings = ["--sparsity", "0.25", "--samples", str(_SAMPLES), "--seq-len", str(seq_len), "--dtype", dtype]
        settings += ["--attention-removals", str(removals)]
        offloaded = _prune(checkpoint, directory / "offloaded", [*settings, "--offload"], out)
        resident = _prune(checkpoint, directory / "resident", settings, out)
        asked = PruneSettings(
            sparsity=0.25, calibration=[], num_samples=_SAMPLES, seq_len=seq_len, align=64, attention_removals=removals,
            device="cpu", dtype=getattr(torch, dtype), seed=0, **DEFAULT.settings,
        )  # fmt: skip
        result = {
            "schema_version": 2,
            "kind": "offload_benchmark",
            "checkpoint": {
                "weight_bytes": checkpoint.weight_bytes,
                "num_shards": len({info.file for info in checkpoint.tensors.values()}),
                "num_hidden_layers": layers,
                "dtype": "bfloat16",
                **_SHAPE,
            },
            "computed_in": dtype,
            "weight_bytes_in_memory": checkpoint.num_parameters * getattr(torch, dtype).itemsize,
            "limit_bytes": limit,
            "counted_before_the_run": {
                name: memory_needed(checkpoint, asked, offload=name == "offloaded").peak
                for name in ("offloaded", "resident")
            },
            "offloaded": offloaded,
            "resident": resident,
            "same_plan": offloaded["sha256"] == resident["sha256"],
            "environment": describe_environment(),
        }
    write_text(out, json.dumps(result, indent=1) + "\n")
    peaks = [f"{each['cost']['peak_anonymous_bytes'] / 1e9:.2f} GB" for each in (offloaded, resident)]
    typer.echo(f"{checkpoint.weight_bytes / 1e9:.2f} GB of weights; peak from disk {peaks[0]}, in memory {peaks[1]}")
    if not result["same_plan"] or offloaded["cost"]["peak_anonymous_bytes"] > limit:
        raise SystemExit("The plans differ, or the limit was exceeded.")


def _prune(checkpoint: Checkpoint, directory: Path, settings: list[str], out: Path) -> dict[str, Any]:
    """Runs ``sentei prune`` and measures it."""
    done = measure_sentei(
        ["prune", str(checkpoint.directory), "-o", str(directory), *settings],
        log=out.with_name(f"{out.stem}-{directory.name}.log"), reads=[checkpoint.directory],
    )  # fmt: skip
    if done.error is not None:
        raise SystemExit(done.error)
    return {
        "cost": done.cost,
        "times_the_checkpoint_was_read": round(done.cost["bytes_from_disk"] / checkpoint.weight_bytes, 2),
        "sha256": {file: hashlib.sha256((directory / file).read_bytes()).hexdigest() for file in _COMPARED},
        "weights_sha256": open_checkpoint(directory).fingerprint,
        "pruned_weight_bytes": open_checkpoint(directory).weight_bytes,
    }


if __name__ == "__main__":
    typer.run(main)
