"""``sentei quantize``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import Output, window_length
from toolchain.cli.options import (
    SEQ_LEN,
    ForceOption,
    JsonOption,
    OutOption,
    QuietOption,
    mixture_option,
    samples_option,
    seq_len_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import writes_directory


class Scheme(StrEnum):
    """What weights, and what goes into the matrices, are rounded to."""

    fp8 = "fp8"
    int8 = "int8"
    w4a16 = "w4a16"


@writes_directory
def quantize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model, pruned or not.")],
    *,
    scheme: Annotated[
        Scheme, typer.Option(help="fp8 or int8: weights and activations; w4a16: weights in 4 bits, by GPTQ.")
    ],
    out: OutOption,
    calibration: Annotated[
        list[str] | None,
        mixture_option("Text for w4a16, as for sentei prune. Without it: Python's manual."),
    ] = None,
    samples: Annotated[int, samples_option(", for w4a16")] = 32,
    seq_len: Annotated[int | None, seq_len_option(", for w4a16")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantise a model, pruned or not, with llm-compressor; vLLM serves the result with the sentei plugin."""
    output = Output(as_json=as_json, quiet=quiet)
    from export.quantize import find_python, needs_text
    from export.quantize import quantize as run
    from toolchain.checkpoint.directory import open_checkpoint
    from toolchain.model.loading import bos_of, load_tokenizer
    from toolchain.outputs import check_output_directory
    from toolchain.text.sources import local_paths, parse_sources
    from toolchain.text.windows import load_mixture

    sources = parse_sources(calibration or [])
    check_output_directory(out, force=force, inputs=[directory, *local_paths(source.text for source in sources)])
    checkpoint = open_checkpoint(directory)
    output.note(f"llm-compressor runs in {find_python()}.")
    windows = None
    if needs_text(scheme.value):
        if not calibration:
            output.note("No --calibration: taking the Python language reference. Text like your users' is better.")
        tokenizer = load_tokenizer(directory)
        bos = bos_of(checkpoint.family, tokenizer)
        length = window_length(output, checkpoint, seq_len, SEQ_LEN)
        windows = load_mixture(sources, tokenizer, num_samples=samples, seq_len=length, bos=bos).ids
    elif calibration:
        raise SenteiError(f"--scheme {scheme.value} rounds without looking at text.", "Leave --calibration out.")
    result = run(directory, out, scheme=scheme.value, windows=windows, force=force, on_line=output.note)
    output.result({"directory": str(out), **result}, lambda console: _show(console, out, directory, result))


def _show(console: Console, out: Path, source: Path, result: dict[str, Any]) -> None:
    groups = f", {result['group_size']} inputs a scale" if result["group_size"] else ""
    console.print(
        f"{out}: {result['scheme']}{groups}, weights {result['source_weight_bytes'] / 1e6:,.1f} → "
        f"{result['weight_bytes'] / 1e6:,.1f} MB"
    )
    console.print(f"  rounded      {result['num_matrices']} matrices, each compared with its source")
    console.print(f"  untouched    {result['num_other_tensors']} tensors, bit by bit")
    console.print(f"sentei verify {out} --against {source} runs it in vLLM.")
