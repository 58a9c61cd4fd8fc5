"""``sentei heal``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import Output, pick_device, pick_dtype, window_length
from toolchain.cli.options import (
    DeviceOption,
    ForceOption,
    JsonOption,
    OutOption,
    QuietOption,
    against_option,
    dtype_option,
    mixture_option,
    resume_option,
    seed_option,
    seq_len_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import writes_directory

if TYPE_CHECKING:
    import torch

    from toolchain.heal.heal import HealSettings
    from toolchain.text.sources import TextSource

SEQ_LEN = 512
_BATCH_SIZE = 8
_LORA_LEARNING_RATE, _FULL_LEARNING_RATE = 3e-4, 2e-4
_DEFAULT_RANK = 32


@writes_directory
def heal(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model.")],
    *,
    against: Annotated[str, against_option("What it learns from: the original, a directory or hub id.")],
    data: Annotated[
        list[str],
        mixture_option(
            "Text to learn from: .txt, .jsonl or .parquet (field text, or messages: chats), a directory of them, or "
            "hub:NAME:CONFIG:SPLIT; several times for a mixture, as in 0.7:en.txt.",
        ),
    ],
    out: OutOption,
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Windows per update.")] = _BATCH_SIZE,
    seq_len: Annotated[int | None, seq_len_option(default=SEQ_LEN)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"By default {_LORA_LEARNING_RATE:g}, with --full {_FULL_LEARNING_RATE:g}.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help=f"Rank of the adapters, which are merged at the end; {_DEFAULT_RANK} by default.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights instead of adapters: 16 bytes of memory per weight.")
    ] = False,
    resume: Annotated[bool, resume_option("healing")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, dtype_option("auto, bfloat16 or float32 (auto: bfloat16 if the device multiplies it).")
    ] = "auto",
    seed: Annotated[int, seed_option("Orders the text, and draws the adapters.")] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a pruned model to answer like the original again; shapes and format stay the same."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.checkpoint.directory import open_checkpoint, resolve_model
    from toolchain.heal.heal import heal as run
    from toolchain.ranks.joining import join
    from toolchain.text.sources import parse_sources

    if full and lora_rank is not None:
        raise SenteiError("--full trains all weights, and --lora-rank adapters.", "Give one of them.")
    settings = healing_settings(
        parse_sources(data), steps=steps, seq_len=window_length(output, open_checkpoint(directory), seq_len, SEQ_LEN),
        seed=seed, device=pick_device(device), dtype=dtype, batch_size=batch_size, learning_rate=learning_rate,
        lora_rank=lora_rank, full=full,
    )  # fmt: skip
    with output.telling_what_stays():
        result = run(
            directory, resolve_model(against), out, settings, force=force, resume=resume, ranks=join(),
            listener=output.listener,
        )  # fmt: skip
    output.result({"directory": str(out), **result}, lambda console: show_healing(console, out, result))


def healing_settings(
    data: "Sequence[TextSource]",
    *,
    steps: int,
    seq_len: int,
    seed: int,
    device: str,
    dtype: str,
    batch_size: int = _BATCH_SIZE,
    learning_rate: float | None = None,
    lora_rank: int | None = None,
    full: bool = False,
) -> "HealSettings":
    """What ``sentei heal`` was asked for; without the last four arguments, what it does by default.

    Args:
        data: Texts to learn from.
        steps: Updates of the weights.
        seq_len: Tokens per window.
        seed: Orders the windows, and draws the adapters.
        device: As picked.
        dtype: As given, or ``auto``.
        batch_size: Windows per update.
        learning_rate: ``None`` for the usual one.
        lora_rank: Likewise.
        full: Train all weights instead of adapters.

    Raises:
        SenteiError: The dtype is not known.
    """
    from toolchain.heal.heal import HealSettings

    usual_rate, usual_rank = (_FULL_LEARNING_RATE, None) if full else (_LORA_LEARNING_RATE, _DEFAULT_RANK)
    return HealSettings(
        data=data, steps=steps, batch_size=batch_size, seq_len=seq_len, seed=seed, device=device,
        dtype=_dtype(dtype, device), learning_rate=usual_rate if learning_rate is None else learning_rate,
        lora_rank=usual_rank if lora_rank is None else lora_rank,
    )  # fmt: skip


def _dtype(name: str, device: str) -> "torch.dtype":
    """Half the width where the device's matrix units take it: eight times faster on a CPU with AMX."""
    import torch

    if device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    picked = pick_dtype(name, auto=torch.bfloat16 if fast else torch.float32)
    assert picked is not None
    return picked


def show_healing(console: Console, out: Path, result: dict[str, Any]) -> None:
    """Prints what was trained, and how much closer to the original the model came."""
    trained = f"LoRA of rank {result['lora_rank']}, merged" if result["lora_rank"] else "all weights"
    console.print(f"{out}: {result['steps']} steps of {result['batch_size']} x {result['seq_len']} tokens ({trained})")
    passes = result["steps"] * result["batch_size"] / (result["num_windows"] - result["num_held_out"])
    if passes > 1:
        console.print(f"  text         {result['text']} was read {passes:.2g} times: more text is better")
    console.print(
        f"  perplexity   {result['perplexity_before']:.4g} → {result['perplexity_after']:.4g} "
        f"(original {result['perplexity_original']:.4g})"
    )
    console.print(f"  divergence   {result['divergence_before']:.4g} → {result['divergence_after']:.4g} nats per token")
    console.print(f"on {result['num_held_out']} windows of that text which it did not learn from")
