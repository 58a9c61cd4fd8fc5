"""How long the search takes: ours, exact and racing, against the plain way, side by side in one run.

The plain way tries a candidate by leaving its attention out of Transformers' own model, running that over the whole
window, and taking the cross-entropy of its logits. All ways do every step, in turn, on weights of their own. The exact
one must remove the same attention as the plain one; where racing removes another is in the result.

The plain way runs in a process of its own, which waits while others run: ours asks the C library to keep freed memory
(``toolchain.memory.keep_freed_memory``), which cannot be taken back in a process, and the plain way has what a script
of Transformers has.

    python benchmarks/search.py -o search_demo_float32.json
    python benchmarks/search.py --shape 1b --seq-len 512 --steps 2 --no-racing -o search_1b_float32.json

Results stand in ``benchmarks/results/``.
"""

import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from serving.benchmark.environment import describe_environment
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.memory import keep_freed_memory
from toolchain.metrics.token_metrics import PerplexityMetric
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.layer_walk import LayerWalk, attention_removed
from toolchain.model.loading import decoder_layers, load_model, load_tokenizer, remove_attention
from toolchain.model.slicing import narrow_ffn
from toolchain.outputs import write_text
from toolchain.plan.plan import top_neurons
from toolchain.prune.budget.allocation import allocate, block_parameters
from toolchain.prune.search.attention import Tried, removals
from toolchain.prune.search.importance import neuron_importance
from toolchain.text.windows import load_windows

LLAMA = FAMILIES["llama"]
# TinyLlama's shape: the head is 6 % of it.
SHAPE_1B = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


class Shape(StrEnum):
    """What is searched."""

    demo = "demo"
    one_billion = "1b"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One removal by all ways: what each removed, seconds it took, and arithmetic in FLOPs.

    ``chosen`` and ``seconds`` are by way. ``regret`` is how much worse, as a factor, the metric is after racing's
    choice than after the best one; ``None`` once racing is on another path.
    """

    chosen: dict[str, int]
    seconds: dict[str, float]
    num_candidates: int
    plain_flops: float
    ours_flops: float
    largest_difference: float
    regret: float | None


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    shape: Annotated[Shape, typer.Option(help="The demo model, or random weights of a 1B shape.")] = Shape.demo,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for all ways.")] = "float32",
    sparsity: Annotated[float, typer.Option(help="Of the decoder blocks.")] = 0.5,
    calibration: Annotated[Path | None, typer.Option(help="Text; without it, Python's manual.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of the window.")] = 2048,
    samples: Annotated[int, typer.Option(help="Windows for stage 1.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Removals; without it, as many as the formula asks for.")] = None,
    racing: Annotated[bool, typer.Option(help="Time --search racing as well.")] = True,
) -> None:
    """Times stage 2 by all ways, and stage 1 against bare forward passes."""
    keep_freed_memory()
    asked = {
        "shape": shape, "dtype": getattr(torch, dtype), "sparsity": sparsity, "seq_len": seq_len, "samples": samples,
        "calibration": calibration,
    }  # fmt: skip
    model, windows, num_removals, width = _prepare(**asked)
    stage_1, importance = _time_stage_1(model, windows)
    kept = [top_neurons(scores, width) for scores in importance]
    narrow_ffn(model, LLAMA, kept)
    walks = {way: LayerWalk(copy.deepcopy(model), LLAMA) for way in ("exact", *(["racing"] if racing else []))}
    taken = []
    with ProcessPoolExecutor(1, get_context("spawn"), _Plain.start, (asked, kept)) as plain:
        for step in itertools.islice(_steps(plain, walks, windows[:1]), steps or num_removals):
            taken.append(step)
            found = (f"{way} {step.chosen[way]} in {step.seconds[way]:.1f} s" for way in step.chosen)
            typer.echo(", ".join(found), err=True)
    peak = _peak_flops(model.dtype)
    seconds = {way: sum(step.seconds[way] for step in taken) for way in taken[0].seconds}
    result = {
        "schema_version": 3,
        "kind": "search_benchmark",
        "shape": shape.value,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "sparsity": sparsity,
        "calibration": calibration.name if calibration else None,
        "seq_len": seq_len,
        "intermediate_size": width,
        "removed_attention": {way: [step.chosen[way] for step in taken] for way in seconds},
        "seconds": seconds,
        "speedup_over_plain": {way: seconds["plain"] / spent for way, spent in seconds.items() if way != "plain"},
        "speedup_by_arithmetic_alone": sum(s.plain_flops for s in taken) / sum(s.ours_flops for s in taken),
        "layer_forwards": {
            "plain": sum(step.num_candidates for step in taken) * len(decoder_layers(model, LLAMA)),
            **{way: walk.num_layer_forwards for way, walk in walks.items()},
        },
        "floor": {
            "peak_flops_per_s": peak,
            "formula": "FLOPs at the rate of a large matrix product in this dtype",
            "seconds": sum(step.ours_flops for step in taken) / peak,
            "exact_over_floor": seconds["exact"] / (sum(step.ours_flops for step in taken) / peak),
            "plain_over_floor": seconds["plain"] / (sum(step.plain_flops for step in taken) / peak),
        },
        "largest_relative_difference_of_a_candidate": max(step.largest_difference for step in taken),
        "stage_1": stage_1,
        "steps": [vars(step) for step in taken],
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(result, indent=2) + "\n")
    for way, ratio in result["speedup_over_plain"].items():
        typer.echo(f"{way}: {ratio:.2f}x")
    typer.echo(f"by arithmetic alone, exact: {result['speedup_by_arithmetic_alone']:.2f}x")


def _prepare(
    *, shape: Shape, dtype: torch.dtype, sparsity: float, seq_len: int, samples: int, calibration: Path | None
) -> tuple[PreTrainedModel, torch.Tensor, int, int]:
    """The model, windows ``[samples, seq_len]``, attentions to remove and the FFN width kept."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        import_gguf(demo_gguf(), directory / "demo")
        ids = load_windows(calibration, load_tokenizer(directory / "demo"), num_samples=samples, seq_len=seq_len).ids
        if shape is Shape.demo:
            checkpoint = open_checkpoint(directory / "demo")
            model = load_model(checkpoint, dtype=dtype)
            allocation = allocate(block_parameters(checkpoint), sparsity, align=1)
            return model, ids, allocation.num_attention_removals, allocation.widths[0]
    torch.manual_seed(0)
    # Larger weights than training starts from: every attention then matters by more than rounding.
    model = LlamaForCausalLM(LlamaConfig(**SHAPE_1B, initializer_range=0.04)).to(dtype).eval()
    layers, width = SHAPE_1B["num_hidden_layers"], round(SHAPE_1B["intermediate_size"] * (1 - sparsity))
    return model, ids % SHAPE_1B["vocab_size"], layers, width


@torch.inference_mode()
def _time_stage_1(model: PreTrainedModel, windows: torch.Tensor) -> tuple[dict[str, Any], Any]:
    """Statistics of two windows against the forward passes they need, in turn; then those of all windows."""
    walk, bare, ours, some = LayerWalk(model, LLAMA), [], [], windows[:2]
    model.model(windows[:1], use_cache=False)
    for _ in range(5):
        started = time.perf_counter()
        for window in some.split(1):
            model.model(window, use_cache=False)
        bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        neuron_importance(walk, some)
        ours.append(time.perf_counter() - started)
    ratios = [mine / plain for mine, plain in zip(ours, bare, strict=True)]
    timed = {"num_windows": len(some), "bare_s": bare, "ours_s": ours, "ours_over_bare": statistics.median(ratios)}
    return timed, neuron_importance(walk, windows)


class _Plain:
    """The plain way, in the process that it has for itself."""

    model: PreTrainedModel
    ids: torch.Tensor

    @classmethod
    def start(cls, asked: dict[str, Any], kept: list[np.ndarray]) -> None:
        cls.model, windows, _, _ = _prepare(**asked)
        narrow_ffn(cls.model, LLAMA, kept)
        cls.ids = windows[:1]

    @classmethod
    @torch.inference_mode()
    def try_each(cls, candidates: list[int]) -> tuple[dict[int, float], float]:
        """Perplexity without each candidate's attention, and the seconds it took."""
        started, found = time.perf_counter(), {}
        for index in candidates:
            with attention_removed(decoder_layers(cls.model, LLAMA)[index], LLAMA):
                logits = cls.model(cls.ids, use_cache=False).logits
            found[index] = float(cross_entropy(logits[0, :-1].float(), cls.ids[0, 1:]).double().exp())
        return found, time.perf_counter() - started

    @classmethod
    def remove(cls, index: int) -> None:
        remove_attention(decoder_layers(cls.model, LLAMA)[index], LLAMA)


def _steps(plain: ProcessPoolExecutor, walks: Mapping[str, LayerWalk], ids: torch.Tensor) -> Iterator[Step]:
    """All ways, a step each.

    The plain way tries half of the candidates before the others and half after them, so that a machine that becomes
    slower or faster meanwhile favours none.
    """
    searches = {way: removals(walk, PerplexityMetric(ids), race=way == "racing") for way, walk in walks.items()}
    ways, model = list(searches), walks["exact"].model
    attending = list(range(len(walks["exact"].layers)))
    on_path, resume_at = True, 0
    for number in itertools.count():
        half = len(attending) // 2
        before, seconds_before = plain.submit(_Plain.try_each, attending[:half]).result()
        seconds: dict[str, float] = {}
        found: dict[str, Tried] = {}
        for way in ways if number % 2 else reversed(ways):
            started = time.perf_counter()
            found[way] = next(searches[way])
            seconds[way] = time.perf_counter() - started
        after, seconds_after = plain.submit(_Plain.try_each, attending[half:]).result()
        seconds["plain"] = seconds_before + seconds_after
        perplexity = before | after
        best = min(perplexity, key=lambda layer: (perplexity[layer], layer))
        exact = found["exact"]
        if best != exact.removed:
            raise SystemExit(
                f"The plain way removes attention {best}, ours {exact.removed}: {perplexity} {exact.candidates}"
            )
        plain.submit(_Plain.remove, best).result()
        chosen = {"plain": best, **{way: tried.removed for way, tried in found.items()}}
        yield Step(
            chosen=chosen,
            seconds={way: seconds[way] for way in ("plain", *ways)},
            num_candidates=len(perplexity),
            plain_flops=_flops(model, ids, attending, dict.fromkeys(attending, 0)),
            ours_flops=_flops(model, ids, attending, {layer: max(layer, resume_at) for layer in attending}),
            largest_difference=max(abs(exact.candidates[layer] / perplexity[layer] - 1) for layer in perplexity),
            regret=perplexity[chosen["racing"]] / perplexity[best] if "racing" in chosen and on_path else None,
        )
        on_path = on_path and chosen.get("racing") == best
        attending.remove(best)
        resume_at = best


def _flops(model: PreTrainedModel, ids: torch.Tensor, attending: list[int], start: Mapping[int, int]) -> float:
    """Matrix products of one step: per candidate the head, and the layers from ``start`` on."""
    config, tokens = model.config, ids.numel()
    head_dim = config.hidden_size // config.num_attention_heads
    projections = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    attention = tokens * 2 * projections + 2 * tokens**2 * config.hidden_size
    ffn = tokens * 2 * 3 * config.hidden_size * decoder_layers(model, LLAMA)[0].mlp.down_proj.in_features
    head = tokens * 2 * config.hidden_size * config.vocab_size
    total = 0.0
    for candidate in attending:
        total += head + ffn * (config.num_hidden_layers - start[candidate])
        total += attention * sum(layer >= start[candidate] and layer != candidate for layer in attending)
    # Ours walks the model itself up to its last candidate as well, where its state is not known from the step before.
    return total


def _peak_flops(dtype: torch.dtype) -> float:
    size = 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    rates = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return max(rates)


if __name__ == "__main__":
    typer.run(main)
