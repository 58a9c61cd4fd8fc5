"""What pruning keeps of its speed in an ONNX export, and whether ours is as fast as the vendor's own.

The demo model, and the same pruned by 25 and 50 %, are exported in float32 and int4; the unpruned one is also built by
onnxruntime-genai's model builder as its users run it, with the same choice of precisions. All run in
onnxruntime-genai in this one process, taking turns in alternating order, so that whatever else the machine does meets
each of them. All are loaded anew for each repeat, in rotating order: where weights come to lie in memory changes speed
by some percent, for as long as a model stays loaded. How much chance can do is shown by the original, which is loaded
twice. Efficiency is the measured gain in decode tokens/s by the reduction in bytes read per decoded token.

    python benchmarks/onnx_speed.py -o onnx_speed.json

Results stand in ``benchmarks/results/``.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, get_args

import torch
import typer

from export.onnx_graph import Precision, export_onnx
from serving.benchmark.environment import describe_environment
from serving.engines.genai import GenaiModel
from serving.forecast.model_facts import ModelFacts, onnx_facts
from toolchain.errors import SenteiError
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.loading import load_tokenizer
from toolchain.outputs import write_text
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import PruneSettings
from toolchain.significance import ratio_interval
from toolchain.text.embedded import documents, write_halves
from toolchain.text.sources import TextSource

_GOALS = {"fp32": 0.95, "int4": 0.90}  # of efficiency
_VENDOR_GOAL = 0.98  # of the vendor's tokens/s
_VENDOR_OPTIONS = {"fp32": [], "int4": ["matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"]}
_PHASES = ("prefill", "decode")
Rates = dict[str, dict[str, list[float]]]


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    sparsity: Annotated[list[float], typer.Option(help="Several times.")] = [0.25, 0.5],  # noqa: B006
    precision: Annotated[list[str], typer.Option(help="Several times.")] = ["fp32", "int4"],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Times that all exports are loaded.")] = 12,
    turns: Annotated[int, typer.Option(help="Turns of each export in a repeat, after one that does not count.")] = 3,
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option(help="Output tokens.")] = 64,
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 8,
) -> None:
    """Prunes, exports and measures."""
    with tempfile.TemporaryDirectory() as temporary:
        models = _models(Path(temporary), sparsity, samples)
        results = [_measure(Path(temporary), models, each, repeats, turns, input_len, output_len) for each in precision]
    document = {
        "schema_version": 1,
        "kind": "onnx_benchmark",
        "model": "SmolLM2-135M-Instruct",
        "runtime": "onnxruntime-genai, one sequence, greedy, without an end-of-sequence token",
        "sparsity": sparsity,
        "repeats": repeats,
        "turns": turns,
        "input_len": input_len,
        "output_len": output_len,
        "metrics": {
            "prefill": "prompt tokens / time to the first token",
            "decode": "output tokens after the first / the time they took",
            "decode_bytes": "weights read by a step, the head's included, + cache at input_len + output_len / 2 tokens",
            "tokens_per_s": "one value a repeat, the median of its turns",
            "gain": "tokens/s by the original's: exp(mean of ln over repeats), with the 95 % t-interval of that mean",
            "efficiency": "decode gain / (the original's decode_bytes / the pruned model's)",
        },
        "results": results,
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(document, indent=2) + "\n")


def _models(directory: Path, sparsities: Sequence[float], samples: int) -> dict[str, Path]:
    """The demo model and what is left of it."""
    models = {"original": directory / "original"}
    import_gguf(demo_gguf(), models["original"])
    (directory / "text").mkdir()
    write_halves(directory / "text")
    for sparsity in sparsities:
        name = f"pruned_{sparsity:g}"
        models[name] = directory / name
        settings = PruneSettings(
            sparsity=sparsity, calibration=[TextSource(directory / "text" / "calibration.txt")],
            num_samples=samples, seq_len=512, align=64, attention_removals=None, device="cpu", dtype=torch.float32,
            seed=0,
        )  # fmt: skip
        prune(models["original"], models[name], settings, model_name="SmolLM2-135M-Instruct")
        typer.echo(f"{name} is pruned")
    return models


def _measure(
    directory: Path, models: dict[str, Path], precision: str, repeats: int, turns: int, input_len: int, output_len: int
) -> dict[str, Any]:
    exports = {name: directory / f"{name}-{precision}" for name in (*models, "vendor")}
    for name, model in models.items():
        export_onnx(model, exports[name], precision=next(p for p in get_args(Precision) if p == precision))
    build_with_vendor(models["original"], exports["vendor"], precision)
    for export in exports.values():
        _never_end(export)
    vendor_error = _error_of_loading(exports["vendor"])
    if vendor_error:
        typer.echo(f"{precision}: the vendor's own export does not load: {vendor_error}")
        del exports["vendor"]
    exports["original_again"] = exports["original"]
    facts = {name: onnx_facts(export) for name, export in exports.items()}
    rates = _take_turns(exports, _prompt(models["original"], input_len), repeats, turns, output_len)
    shape = {"input_len": input_len, "output_len": output_len, "concurrency": 1}
    compared = {name: _compare(rates, facts, name, _GOALS[precision], shape) for name in models if name != "original"}
    for name, each in compared.items():
        gain, efficiency = each["gain"]["decode"]["value"], each["efficiency"]
        typer.echo(
            f"{precision} {name}: decode {gain:.3f} times the original's, {each['bytes_reduction']:.3f} times fewer "
            f"bytes; efficiency {efficiency['value']:.3f} ({efficiency['low']:.3f} to {efficiency['high']:.3f})"
        )
    return {
        "precision": precision,
        "tokens_per_s": rates,
        "median_tokens_per_s": {
            name: {phase: median(values) for phase, values in each.items()} for name, each in rates.items()
        },
        "decode_bytes": {name: each.decode_bytes(**shape) for name, each in facts.items()},
        "size_on_disk_bytes": {name: each.size_on_disk_bytes for name, each in facts.items()},
        "compared": compared,
        "against_itself": _against_itself(rates),
        "against_vendor": {"error": vendor_error} if vendor_error else _against_vendor(rates, precision),
    }


def _against_itself(rates: Rates) -> dict[str, Any]:
    again = {phase: ratio_interval(rates["original"][phase], rates["original_again"][phase]) for phase in _PHASES}
    ratio = again["decode"]
    typer.echo(f"original, loaded twice: decode {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    return again


def _against_vendor(rates: Rates, precision: str) -> dict[str, Any]:
    vendor = {phase: ratio_interval(rates["vendor"][phase], rates["original"][phase]) for phase in _PHASES}
    ratio = vendor["decode"]
    typer.echo(
        f"{precision} original: decode {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) times the "
        "vendor's own export"
    )
    return {**vendor, "goal": _VENDOR_GOAL, "shown": ratio["low"] >= _VENDOR_GOAL}


def _error_of_loading(export: Path) -> str:
    """The builder can write what its own runtime does not load: tied embeddings with an int8 head, in 0.18.0."""
    try:
        GenaiModel(export)
    except SenteiError as error:
        return error.message.replace(f"{export.parent}/", "")
    return ""


def _compare(
    rates: Rates, facts: dict[str, ModelFacts], name: str, goal: float, shape: dict[str, int]
) -> dict[str, Any]:
    gain = {phase: ratio_interval(rates["original"][phase], rates[name][phase]) for phase in _PHASES}
    reduction = facts["original"].decode_bytes(**shape) / facts[name].decode_bytes(**shape)
    efficiency = {key: gain["decode"][key] / reduction for key in ("value", "low", "high")}
    return {
        "gain": gain,
        "bytes_reduction": reduction,
        "efficiency": efficiency,
        "goal": goal,
        "shown": efficiency["low"] >= goal,
    }


def build_with_vendor(model: Path, out: Path, precision: str) -> None:
    """Builds as users of onnxruntime-genai do, with the same choice of precisions."""
    options = ["--extra_options", *_VENDOR_OPTIONS[precision]] if _VENDOR_OPTIONS[precision] else []
    command = ["-i", model, "-o", out, "-p", precision, "-e", "cpu", "-c", out.with_suffix(".cache"), *options]
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, command)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _never_end(export: Path) -> None:
    """Lets every answer have its full length."""
    path = export / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model"]["eos_token_id"] = []
    path.write_text(json.dumps(settings), encoding="utf-8")
    (export / "sentei_export.json").unlink(missing_ok=True)  # its list of hashes no longer holds


def _prompt(model: Path, input_len: int) -> list[int]:
    return load_tokenizer(model)(" ".join(documents()))["input_ids"][:input_len]


def _take_turns(exports: dict[str, Path], prompt: Sequence[int], repeats: int, turns: int, output_len: int) -> Rates:
    """Tokens/s of each export, by phase, one value a repeat."""
    rates: Rates = {name: {phase: [] for phase in _PHASES} for name in exports}
    for repeat in range(repeats):
        first = repeat % len(exports)
        names = [*exports][first:] + [*exports][:first]
        loaded = {name: GenaiModel(exports[name]) for name in names}
        measured: Rates = {name: {phase: [] for phase in _PHASES} for name in names}
        for turn in range(turns + 1):
            for name in names if turn % 2 == 0 else reversed(names):
                for phase, value in _run(loaded[name], prompt, output_len).items():
                    measured[name][phase].append(value)
        for name, phases in measured.items():
            for phase, (_, *values) in phases.items():
                rates[name][phase].append(median(values))
    return rates


def _run(model: GenaiModel, prompt: Sequence[int], output_len: int) -> dict[str, float]:
    started_s = time.perf_counter()
    tokens = model.stream(prompt, output_len)
    next(tokens)
    first_s = time.perf_counter()
    given = sum(1 for _ in tokens)
    last_s = time.perf_counter()
    assert given + 1 == output_len
    return {"prefill": len(prompt) / (first_s - started_s), "decode": given / (last_s - first_s)}


if __name__ == "__main__":
    typer.run(main)
