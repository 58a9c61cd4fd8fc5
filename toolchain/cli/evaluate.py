"""``sentei evaluate``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from toolchain.cli.console import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    OffloadOption,
    Output,
    QuietOption,
    compute_dtype,
    pick_device,
)


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model, pruned or not.")],
    *,
    text: Annotated[Path, typer.Option(help="Text: .txt, .jsonl or .parquet (field text).")],
    windows: Annotated[int | None, typer.Option(help="How many windows; without it, all of the text.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window; windows do not overlap.")] = 2048,
    against: Annotated[Path | None, typer.Option(help="The original, to be measured on the same windows.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for evaluation.json.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload: OffloadOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity on a text."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.calibration import load_windows
    from toolchain.checkpoint import open_checkpoint
    from toolchain.evaluation import perplexity
    from toolchain.modeling import load_tokenizer
    from toolchain.output import check_output_directory, new_directory, write_text
    from toolchain.pipeline import open_walk

    if out is not None:
        check_output_directory(out, force=force, inputs=[directory, *([against] if against else [])])
    picked_device = pick_device(device)
    checkpoints = [open_checkpoint(each) for each in (against, directory) if each is not None]
    token_windows = load_windows(text, load_tokenizer(directory), num_samples=windows, seq_len=seq_len)
    evaluations = []
    for checkpoint in checkpoints:
        computed_in = compute_dtype(dtype, picked_device, checkpoint.dtype)
        walk = open_walk(checkpoint, dtype=computed_in, device=picked_device, offload=offload)
        with output.progress(f"Perplexity of {checkpoint.directory.name}", len(token_windows.ids)) as advance:
            measured = perplexity(walk, token_windows.ids, on_window=advance)
        role = "pruned" if checkpoint.is_pruned else "original"
        evaluations.append(
            {
                "model": role,
                "directory": checkpoint.directory.resolve().name,
                "text": text.name,
                "text_sha256": token_windows.sha256,
                **asdict(measured),
            }
        )
        del walk
    result = {"schema_version": 1, "kind": "evaluation", "evaluations": evaluations}
    if out is not None:
        with new_directory(out, force=force) as partial:
            write_text(partial / "evaluation.json", json.dumps(result, indent=2) + "\n")

    def show(console: Console) -> None:
        for each in evaluations:
            error = "" if each["standard_error"] is None else f" ± {each['standard_error']:.2f}"
            console.print(
                f"{each['directory']}: perplexity {each['perplexity']:.2f}{error} on {each['text']} "
                f"({each['num_windows']} windows of {each['seq_len']} tokens)"
            )

    output.result({**evaluations[-1], **({"against": evaluations[0]} if against else {})}, show)
