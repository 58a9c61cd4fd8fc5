"""``sentei calibration-text``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.console import Output, compute_dtype, pick_device
from toolchain.cli.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    OriginalArgument,
    QuietOption,
    out_option,
    resume_option,
    seed_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import write_text, writes_file

# More would be refused memory on any machine.
_LARGEST_BATCH = 65_536


@writes_file
def calibration_text(
    model: OriginalArgument,
    *,
    out: Annotated[Path, out_option("JSONL file to write, for --calibration.")],
    tokens: Annotated[int, typer.Option(help="Tokens to write, at least: number of windows times their length.")] = 32
    * 2048,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per document, at most; most end earlier.")] = 1024,
    batch_size: Annotated[int, typer.Option(max=_LARGEST_BATCH, help="Documents written together.")] = 16,
    temperature: Annotated[float, typer.Option(help="1 samples from the model's own distribution.")] = 1.0,
    seed: Annotated[int, seed_option("The same seed and batch size write the same text.")] = 0,
    resume: Annotated[bool, resume_option("run")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let the model write its own calibration text, where yours may not be used (self-calibration)."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.checkpoint.directory import open_checkpoint, resolve_model
    from toolchain.parts_cache import Parts, unfinished_parts
    from toolchain.text.self_written import WritingSettings, write_documents

    if out.suffix != ".jsonl":
        raise SenteiError(f"{out}: documents are written as JSONL.", "Give a name that ends in .jsonl.")
    picked_device, directory = pick_device(device), resolve_model(model)
    settings = WritingSettings(
        num_tokens=tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        device=picked_device,
        dtype=compute_dtype(dtype, picked_device, open_checkpoint(directory).dtype),
    )
    with output.telling_what_stays(), unfinished_parts(out, force=force, resume=resume) as work:
        documents = write_documents(directory, settings, Parts(work), progress=output.progress)
        write_text(out, "".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in documents))
    output.result(
        {"file": str(out), "num_documents": len(documents)},
        lambda console: console.print(
            f"{out}: {len(documents)} documents\nRead some; then sentei prune {model} --calibration {out} ...",
        ),
    )
