"""``sentei import``."""

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.console import Output, pick_dtype
from toolchain.cli.options import ForceOption, JsonOption, OutOption, QuietOption, dtype_option
from toolchain.outputs import writes_directory


@writes_directory
def import_(
    gguf: Annotated[Path | None, typer.Argument(metavar="MODEL.gguf", help="Without it: the demo model.")] = None,
    *,
    out: OutOption,
    dtype: Annotated[str, dtype_option("What the weights are stored in.")] = "bfloat16",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a GGUF file into a standard model directory."""
    output = Output(as_json=as_json, quiet=quiet)
    import torch

    from toolchain.checkpoint.directory import open_checkpoint
    from toolchain.model.gguf import demo_gguf, import_gguf

    import_gguf(gguf or demo_gguf(), out, dtype=pick_dtype(dtype, auto=torch.bfloat16) or torch.bfloat16, force=force)
    checkpoint = open_checkpoint(out)
    result = {
        "directory": str(out),
        "model_type": checkpoint.family.model_type,
        "num_parameters": checkpoint.num_parameters,
    }
    output.result(
        result,
        lambda console: console.print(f"{out}: {result['model_type']}, {checkpoint.num_parameters:,} parameters"),
    )
