"""How long the search takes: ours against the plain way, side by side in one process.

The plain way tries a candidate by leaving its attention out of Transformers' own model, running that over the whole
window, and taking the cross-entropy of its logits. Both ways do every step, in turn, on weights of their own, and must
remove the same attention.

    python benchmarks/search.py -o benchmarks/results/search_demo_float32.json
    python benchmarks/search.py --shape 1b --seq-len 512 --steps 2 -o benchmarks/results/search_1b_float32.json
"""

import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from serving.environment import describe_environment
from toolchain.allocation import allocate, block_parameters
from toolchain.attention_search import removals
from toolchain.calibration import load_windows
from toolchain.checkpoint import open_checkpoint
from toolchain.families import FAMILIES
from toolchain.gguf_import import demo_gguf, import_gguf
from toolchain.importance import neuron_importance
from toolchain.layer_walk import LayerWalk, attention_removed
from toolchain.metrics import PerplexityMetric
from toolchain.modeling import RemovedAttention, decoder_layers, load_model, load_tokenizer, remove_attention
from toolchain.output import write_text
from toolchain.plan import top_neurons
from toolchain.surgery import narrow_ffn

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
    """One removal by both ways: seconds, layer forwards, and arithmetic in FLOPs."""

    removed: int
    num_candidates: int
    plain_s: float
    ours_s: float
    plain_flops: float
    ours_flops: float
    largest_difference: float


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    shape: Annotated[Shape, typer.Option(help="The demo model, or random weights of a 1B shape.")] = Shape.demo,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for both ways.")] = "float32",
    sparsity: Annotated[float, typer.Option(help="Of the decoder blocks.")] = 0.5,
    seq_len: Annotated[int, typer.Option(help="Tokens of the window.")] = 2048,
    samples: Annotated[int, typer.Option(help="Windows for stage 1.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Removals; without it, as many as the formula asks for.")] = None,
) -> None:
    """Times stage 2 by both ways, and stage 1 against bare forward passes."""
    model, windows, num_removals, width = _prepare(shape, getattr(torch, dtype), sparsity, seq_len, samples)
    stage_1, importance = _time_stage_1(model, windows)
    narrow_ffn(model, LLAMA, [top_neurons(scores, width) for scores in importance])
    ids = windows[:1]
    walk = LayerWalk(copy.deepcopy(model), LLAMA)
    taken = []
    for step in itertools.islice(_steps(model, walk, ids), steps or num_removals):
        taken.append(step)
        typer.echo(f"attention {step.removed}: plain {step.plain_s:.1f} s, ours {step.ours_s:.1f} s", err=True)
    peak = _peak_flops(model.dtype)
    plain_s, ours_s = sum(step.plain_s for step in taken), sum(step.ours_s for step in taken)
    result = {
        "schema_version": 1,
        "kind": "search_benchmark",
        "shape": shape.value,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "sparsity": sparsity,
        "seq_len": seq_len,
        "intermediate_size": width,
        "removed_attention": [step.removed for step in taken],
        "speedup": plain_s / ours_s,
        "plain_s": plain_s,
        "ours_s": ours_s,
        "speedup_by_arithmetic_alone": sum(s.plain_flops for s in taken) / sum(s.ours_flops for s in taken),
        "layer_forwards": {
            "plain": sum(step.num_candidates for step in taken) * len(decoder_layers(model, LLAMA)),
            "ours": walk.num_layer_forwards,
        },
        "floor": {
            "peak_flops_per_s": peak,
            "formula": "FLOPs of ours at the rate of a large matrix product in this dtype",
            "seconds": sum(step.ours_flops for step in taken) / peak,
            "ours_over_floor": ours_s / (sum(step.ours_flops for step in taken) / peak),
            "plain_over_floor": plain_s / (sum(step.plain_flops for step in taken) / peak),
        },
        "largest_relative_difference_of_a_candidate": max(step.largest_difference for step in taken),
        "stage_1": stage_1,
        "steps": [vars(step) for step in taken],
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(result, indent=2) + "\n")
    typer.echo(f"{result['speedup']:.2f}x ({result['speedup_by_arithmetic_alone']:.2f}x by arithmetic alone)")


def _prepare(
    shape: Shape, dtype: torch.dtype, sparsity: float, seq_len: int, samples: int
) -> tuple[PreTrainedModel, torch.Tensor, int, int]:
    """The model, windows ``[samples, seq_len]``, attentions to remove and the FFN width kept."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        import_gguf(demo_gguf(), directory / "demo")
        ids = load_windows(None, load_tokenizer(directory / "demo"), num_samples=samples, seq_len=seq_len).ids
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
    """Statistics of all windows against the forward passes they need, in turn."""
    walk, bare, ours, importance = LayerWalk(model, LLAMA), [], [], None
    model.model(windows[:1], use_cache=False)
    for _ in range(3):
        started = time.perf_counter()
        for window in windows.split(1):
            model.model(window, use_cache=False)
        bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        importance = neuron_importance(walk, windows)
        ours.append(time.perf_counter() - started)
    ratios = [mine / plain for mine, plain in zip(ours, bare, strict=True)]
    return {"bare_s": bare, "ours_s": ours, "ours_over_bare": statistics.median(ratios)}, importance


def _steps(model: PreTrainedModel, walk: LayerWalk, ids: torch.Tensor) -> Iterator[Step]:
    """Both ways, a step each in turn, the other one first every second time."""
    ours = removals(walk, PerplexityMetric(ids))
    for number in itertools.count():
        attending = _attending(model)
        started = time.perf_counter()
        if number % 2:
            found = next(ours)
            between = time.perf_counter()
            plain = _plain_step(model, ids)
            ours_s, plain_s = between - started, time.perf_counter() - between
        else:
            plain = _plain_step(model, ids)
            between = time.perf_counter()
            found = next(ours)
            ours_s, plain_s = time.perf_counter() - between, between - started
        best = min(plain, key=lambda layer: (plain[layer], layer))
        if best != found.removed:
            raise SystemExit(
                f"The plain way removes attention {best}, ours {found.removed}: {plain} {found.candidates}"
            )
        remove_attention(decoder_layers(model, LLAMA)[best], LLAMA)
        yield Step(
            removed=best,
            num_candidates=len(plain),
            plain_s=plain_s,
            ours_s=ours_s,
            plain_flops=_flops(model, ids, attending, whole=True),
            ours_flops=_flops(model, ids, attending, whole=False),
            largest_difference=max(abs(found.candidates[layer] / plain[layer] - 1) for layer in plain),
        )


@torch.inference_mode()
def _plain_step(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, float]:
    found = {}
    for index in _attending(model):
        with attention_removed(decoder_layers(model, LLAMA)[index], LLAMA):
            logits = model(ids, use_cache=False).logits
        found[index] = float(cross_entropy(logits[0, :-1].float(), ids[0, 1:]).double().exp())
    return found


def _attending(model: PreTrainedModel) -> list[int]:
    layers = decoder_layers(model, LLAMA)
    return [index for index, layer in enumerate(layers) if not isinstance(layer.self_attn, RemovedAttention)]


def _flops(model: PreTrainedModel, ids: torch.Tensor, attending: list[int], *, whole: bool) -> float:
    """Matrix products of one step: per candidate the head, and the layers from the candidate's on or all of them."""
    config, tokens = model.config, ids.numel()
    head_dim = config.hidden_size // config.num_attention_heads
    projections = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    attention = tokens * 2 * projections + 2 * tokens**2 * config.hidden_size
    ffn = tokens * 2 * 3 * config.hidden_size * decoder_layers(model, LLAMA)[0].mlp.down_proj.in_features
    head = tokens * 2 * config.hidden_size * config.vocab_size
    total = 0.0
    for candidate in attending:
        first = 0 if whole else candidate
        total += head + ffn * (config.num_hidden_layers - first)
        total += attention * sum(layer >= first and layer != candidate for layer in attending)
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
