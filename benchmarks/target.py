"""Whether a target is met: by a pruned model, exported and measured against the original by ``sentei benchmark``.

Costs come from ``sentei profile``. Beside the target, shapes that nobody fitted anything to are measured at the model's
full depth, and compared with what the costs say of them.

    sentei profile MODEL --engine onnx --input-len 64 --output-len 32 -o costs.json
    python benchmarks/target.py MODEL -o target.json --costs costs.json --target speedup=1.25 --calibration text.jsonl

What was done is kept in ``<out>.work``: the same command goes on after whatever ended it. Results stand in
``benchmarks/results/``.
"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from serving.benchmark.environment import describe_environment
from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.run import benchmark
from serving.profile.measure import Bench, bench_as_profiled, measure_models
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.cli.profile import onnx_export
from toolchain.costs.document import TIMES, CostsDocument, read_costs
from toolchain.json_files import read_json_object
from toolchain.outputs import write_text
from toolchain.plan.plan import load_plan
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE
from toolchain.prune.budget.target import parse_targets
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import Aim, PruneSettings
from toolchain.text.sources import parse_sources

_GOALS = {"target": 0.05, "unseen": 0.04}


def main(
    model: Annotated[Path, typer.Argument(help="The original.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    costs: Annotated[Path, typer.Option(help="What sentei profile wrote here.")],
    target: Annotated[list[str], typer.Option(help="As for sentei prune.")],
    calibration: Annotated[list[str] | None, typer.Option(help="As for sentei prune.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    repeats: Annotated[int, typer.Option(help="Of the benchmark.")] = 5,
    unseen: Annotated[int, typer.Option(help="Shapes that were not used.")] = 12,
) -> None:
    """Prunes, exports, measures, and compares with the prediction."""
    read, checkpoint, work = read_costs(costs), open_checkpoint(model), out.with_name(f"{out.name}.work")
    served = read.document.served
    export = onnx_export(served.precision, served.device)
    bench = bench_as_profiled(read.document, checkpoint, export=export, on_progress=print)
    aim = Aim(targets=parse_targets(target), costs=read, measure=lambda *asked: measure_models(bench, *asked))
    pruned = work / "pruned"
    if not pruned.exists():
        work.mkdir(parents=True, exist_ok=True)
        settings = PruneSettings(
            sparsity=0.0, calibration=parse_sources(calibration or []), num_samples=samples, seq_len=seq_len, align=64,
            attention_removals=None, device="cpu", dtype=torch.float32, seed=0, widths="ranked", compensate=True,
            aim=aim,
        )  # fmt: skip
        prune(checkpoint, pruned, settings, model_name=model.name, resume=True)
    measured = _benchmark(bench, model, pruned, work, repeats)
    shapes = _unseen(bench, read.document, work, unseen) if unseen else []
    document = {
        "schema_version": 1,
        "kind": "target_benchmark",
        "model": model.name,
        "served": served.model_dump(mode="json"),
        "load": read.document.load.model_dump(mode="json"),
        "costs": {name: parts.model_dump() for name, parts in read.document.costs.items()},
        "check": [each.model_dump() for each in read.document.check],
        "target": read_json_object(pruned / PRUNING_SUMMARY_FILE)["target"],
        "layers": [each.model_dump(exclude_none=True) for each in load_plan(pruned).document.layers],
        "measured": measured,
        "unseen": shapes,
        "unseen_median_error": {
            name: median(abs(each[name]["error"]) for each in shapes) for name in TIMES if shapes and name in shapes[0]
        },
        "goals": _GOALS,
        "environment": describe_environment(),
    }
    write_text(out, json.dumps(document, indent=1) + "\n")
    shutil.rmtree(work)
    print(json.dumps({"measured": measured, "unseen_median_error": document["unseen_median_error"]}))


def _benchmark(bench: Bench, model: Path, pruned: Path, work: Path, repeats: int) -> dict[str, Any]:
    """The gain of the pruned model, metric by metric, as a user measures it."""
    sides = {"original": model, "pruned": pruned}
    if bench.export:
        for name, directory in list(sides.items()):
            sides[name] = work / f"export-{name}"
            if not sides[name].exists():
                bench.export(directory, sides[name])
    if not (place := work / "benchmark").exists():
        benchmark(*sides.values(), replace(bench.settings, repeats=repeats), out=place, resume=True, on_progress=print)
    metrics = read_json_object(place / RESULTS_FILE)["measurements"][0]["metrics"]
    names = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
    return {name: {key: metrics[name][key] for key in ("original", "pruned", "gain")} for name in names}


def _unseen(bench: Bench, costs: CostsDocument, work: Path, count: int) -> list[dict[str, Any]]:
    """Random shapes of the whole depth, three at a time beside the unpruned one: predicted and measured gains."""
    rng = np.random.default_rng(0)
    known = costs.costs["ttft_ms"].widths
    rows = []
    for group in range(0, count, 3):
        shapes = {f"shape-{number}": _random_shape(rng, costs, known) for number in range(group, min(group + 3, count))}
        started = time.monotonic()
        measured = measure_models(bench, {"whole": costs.whole, **shapes}, work / f"unseen-{group}")
        print(f"{group + len(shapes)} of {count} shapes, {time.monotonic() - started:.0f} s")
        for name, layout in shapes.items():
            row: dict[str, Any] = {"num_attentions": sum(layer.attention for layer in layout),
                                   "intermediate_size": [layer.intermediate_size for layer in layout]}  # fmt: skip
            for quantity in (each for each in TIMES if each in costs.costs):
                pairs = zip(measured["whole"][quantity], measured[name][quantity], strict=True)
                gain = fmean(whole / each for whole, each in pairs)
                predicted = costs.predicted_gain(quantity, layout)
                row[quantity] = {
                    **predicted.model_dump(), "measured_gain": gain, "error": predicted.value / gain - 1,
                }  # fmt: skip
            rows.append(row)
    return rows


def _random_shape(rng: np.random.Generator, costs: CostsDocument, known: list[int]) -> tuple[LayerLayout, ...]:
    """From a third to all of the width on average, and up to a third of the attentions gone."""
    layers, full = costs.model.num_hidden_layers, known[-1]
    middle, gone = rng.uniform(0.4, 1.0) * full, rng.integers(0, layers // 3 + 1)
    removed = set(rng.choice(layers, gone, replace=False).tolist())
    widths = np.clip(np.round(rng.normal(middle, 0.15 * full, layers) / 64) * 64, known[0], full).astype(int)
    return tuple(
        LayerLayout(attention=layer not in removed, intermediate_size=int(width)) for layer, width in enumerate(widths)
    )


if __name__ == "__main__":
    typer.run(main)
