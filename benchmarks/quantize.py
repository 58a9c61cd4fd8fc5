"""What quantising costs a model, pruned or not: perplexity with every scheme's rounded matrices and inputs.

Each model is quantised with ``sentei quantize``; Transformers then computes in float32 with what was rounded, inputs
included where the scheme rounds them.

    python benchmarks/quantize.py original pruned --calibration calibration.txt --text evaluation.txt -o quantize.json
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from export.quantize import SCHEMES, needs_text, quantize
from serving.benchmark.environment import describe_environment
from serving.verify.quantized_weights import rounded_matrices
from serving.verify.rounded import carry, distances, round_inputs
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.checkpoint.quantized import open_quantized
from toolchain.metrics.perplexity import perplexity
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, load_model, load_tokenizer
from toolchain.outputs import write_text
from toolchain.text.windows import load_windows


def main(
    models: Annotated[list[Path], typer.Argument(help="Model directories.")],
    *,
    calibration: Annotated[Path, typer.Option(help="Text that w4a16 is calibrated with.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    windows: Annotated[int, typer.Option(help="Windows to measure on.")] = 24,
    seq_len: Annotated[int, typer.Option(help="Tokens a window, of both.")] = 1024,
) -> None:
    """Quantises every model with every scheme, and measures each."""
    measured = []
    for directory in models:
        tokenizer = load_tokenizer(directory)
        bos = bos_of(open_checkpoint(directory).family, tokenizer)
        seen = load_windows(calibration, tokenizer, num_samples=samples, seq_len=seq_len, bos=bos)
        unseen = load_windows(text, tokenizer, num_samples=windows, seq_len=seq_len, bos=bos)
        for scheme in (None, *SCHEMES):
            result = measure(directory, scheme, seen.ids, unseen.ids)
            typer.echo(f"{directory.name} {scheme or 'as it is'}: {result['perplexity']:.3f}")
            measured.append({"model": directory.name, "scheme": scheme, **result})
    document = {
        "schema_version": 1,
        "kind": "quantize_benchmark",
        "computed_in": "float32",
        "calibration": {"text": calibration.name, "num_samples": samples, "sha256": seen.sha256},
        "text": {"text": text.name, "sha256": unseen.sha256},
        "measured": measured,
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(document, indent=2) + "\n")


def measure(directory: Path, scheme: str | None, seen: torch.Tensor, unseen: torch.Tensor) -> dict[str, Any]:
    """Perplexity and size of one model with one scheme; ``None`` leaves it as it is."""
    checkpoint = open_checkpoint(directory)
    model, weight_bytes, rounding = load_model(checkpoint, dtype=torch.float32), checkpoint.weight_bytes, {}
    if scheme is not None:
        with tempfile.TemporaryDirectory() as temporary:
            exported = Path(temporary) / scheme
            told = quantize(directory, exported, scheme=scheme, windows=seen if needs_text(scheme) else None)
            weight_bytes = told["weight_bytes"]
            rounding = {"group_size": told["group_size"], "quantised_with": told["quantised_with"]}
            rounded = rounded_matrices(open_quantized(exported))
            rounding["largest_relative_error"] = max(each.relative_error for each in distances(checkpoint, rounded))
            carry(model, rounded)
            round_inputs(model, rounded)
    result = perplexity(LayerWalk(model, checkpoint.family), unseen)
    return {"weight_bytes": weight_bytes, **asdict(result), **rounding}


if __name__ == "__main__":
    typer.run(main)
