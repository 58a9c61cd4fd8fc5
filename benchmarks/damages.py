"""What ``sentei verify`` finds by answers alone: models that compute something else with the right weights.

    python benchmarks/damages.py MODEL... -o benchmarks/results/damages.json

Each model is damaged in one place at a time, in the layers at a third, in the middle and the last but two, and answers
the first of the built-in prompts in each dtype, as an engine would. Every row has the differences over the model's own
noise, and the checks that fail. The undamaged model has a row as well; it must pass.
``docs/decisions/verification.md`` says which of these answers cannot find.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from serving.benchmark.environment import describe_environment
from serving.verify import verify as verification
from serving.verify.answers import Answers, Differences, answers_of, compare
from serving.verify.judge import judge, limits_from, noise_by_check, other_dtype
from serving.verify.reference import CheckpointReference
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.model.disk_layers import open_walk
from toolchain.model.loading import decoder_layers
from toolchain.outputs import write_text

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Change = Callable[[torch.Tensor], torch.Tensor]


def _scaled(factor: float) -> Change:
    return lambda weight: weight * factor


def _two_swapped(weight: torch.Tensor, *, first: int, second: int, size: int, dimension: int) -> torch.Tensor:
    """Blocks of ``size`` rows or columns, two of which have each other's place."""
    order = torch.arange(weight.shape[dimension])
    one, other = order[first * size : (first + 1) * size].clone(), order[second * size : (second + 1) * size].clone()
    order[first * size : (first + 1) * size], order[second * size : (second + 1) * size] = other, one
    return weight.index_select(dimension, order.to(weight.device))


def damages(checkpoint: Checkpoint) -> dict[str, tuple[str, Change]]:
    """The projection of a layer that each damage is in, and what becomes of its weight."""
    family, config = checkpoint.family, checkpoint.config
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    attention, ffn = family.attention_output, family.ffn_output
    return {
        "FFN times 1.5": (ffn, _scaled(1.5)),
        "attention times 1.5": (attention, _scaled(1.5)),
        "neurons off by one": (ffn, lambda weight: weight.roll(1, 1)),
        "attention missing": (attention, torch.zeros_like),
        # The output's columns: keys and values that heads share stay where they belong.
        "two heads swapped": (
            attention, lambda weight: _two_swapped(weight, first=0, second=heads - 1, size=head_dim, dimension=1),
        ),
        "FFN times 1.05": (ffn, _scaled(1.05)),
        "two neurons swapped": (ffn, lambda weight: _two_swapped(weight, first=100, second=900, size=1, dimension=1)),
    }  # fmt: skip


@contextmanager
def _damaged(layer: nn.Module, projection: str, change: Change) -> Iterator[None]:
    weight = layer.get_submodule(projection).get_parameter("weight")
    before = weight.data
    try:
        weight.data = change(before)
        yield
    finally:
        weight.data = before


def main(
    models: Annotated[list[Path], typer.Argument(help="Model directories.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    prompts: Annotated[int, typer.Option(help="Of the built-in ones.")] = 5,
) -> None:
    """Damages each model in each way, and lets the verdict judge."""
    found = {}
    for directory in models:
        checkpoint = open_checkpoint(directory)
        asked = verification._prompts(checkpoint, None, long=False)[:prompts]
        rows = []
        for dtype in DTYPES:
            for row in _of_dtype(checkpoint, asked, dtype):
                typer.echo(f"{directory.name}  {row['dtype']:9} {row['damage']:20} {row['layer']}  {row['failed']}")
                rows.append(row)
        found[directory.resolve().name] = rows
    document = {
        "schema_version": 1, "kind": "damages_benchmark", "num_prompts": prompts, "models": found,
        "environment": describe_environment(),
    }  # fmt: skip
    write_text(out, json.dumps(document, indent=1) + "\n")
    if any(row["failed"] for rows in found.values() for row in rows if row["damage"] == "none"):
        raise SystemExit("A model that is right did not pass.")


@torch.no_grad()
def _of_dtype(checkpoint: Checkpoint, prompts: list[list[int]], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def opened(dtype: torch.dtype) -> CheckpointReference:
        # In memory, to be damaged there.
        return CheckpointReference(open_walk(checkpoint, dtype=dtype, device="cpu", offload=False), dtype=dtype)

    noisy = opened(other_dtype(dtype, torch.float32))
    noise_answers = answers_of(noisy, prompts)
    noisy.close()
    engine = opened(dtype)
    answers: dict[tuple[str, int | None], Answers] = {("none", None): answers_of(engine, prompts)}
    layers = decoder_layers(engine._walk.model, checkpoint.family)
    for name, (projection, change) in damages(checkpoint).items():
        for index in (len(layers) // 3, len(layers) // 2, len(layers) - 3):
            with _damaged(layers[index], projection, change):
                answers[name, index] = answers_of(engine, prompts)
    del layers
    engine.close()
    *differences, noise = compare(opened(torch.float32), prompts, *answers.values(), noise_answers)
    limits = limits_from(noise, judges_maxima=dtype == torch.float32)
    for (name, index), measured in zip(answers, differences, strict=True):
        verdict = judge(measured, limits)
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "damage": name,
            "layer": index,
            "times_the_noise": _over(measured, noise, list(verdict)),
            "failed": [check for check, result in verdict.items() if not result["passed"]],
        }


def _over(measured: Differences, noise: Differences, checks: list[str]) -> dict[str, float]:
    of_noise = noise_by_check(noise)
    return {name: round(getattr(measured, name) / of_noise[name], 3) for name in checks if of_noise[name]}


if __name__ == "__main__":
    typer.run(main)
