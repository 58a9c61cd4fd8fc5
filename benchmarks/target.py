"""Whether targets are met and worth it: two loads, a plan for each, beside plans by parameters that are as fast.

    python benchmarks/target.py MODEL -o target.json --calibration calibration.jsonl --held-out other.txt
    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/target.py MODEL -o target_vllm.json --calibration ... --held-out ... \\
        --target speedup=1.2 --load 64:32:1 --unseen 0 \\
        --engine "--engine vllm --engine-option=--max-model-len=128 --repeats 1 --num-prompts 16"

Costs come from ``sentei profile``, plans from ``sentei prune``. For each load the plan for the target, a plan by
parameters whose predicted speed is the same, and the original are exported and measured in turn, and read text that
took no part in pruning. Shapes that nobody fitted anything to are measured at the model's full depth, and compared with
what the costs say of them.

Work is done in cells, and each is kept in ``<out>.work`` when it is finished: the same command goes on after whatever
ended it, ``--cells`` runs some of them, and a cell whose files are deleted is done again. ``seconds`` of a cell are
those of the command that finished it. Results stand in ``benchmarks/results/``.

Minutes of each cell for the demo model with the defaults, on two processor cores that do nothing else; from the
processor time of smaller runs, not measured: costs-0 2.5, target-0 3, parameters-0 2, speed-0 1.5, costs-1 2, target-1
4, parameters-1 2, speed-1 2, each text 0.5, unseen 5; together 24. A load of 16 requests of 1500 tokens
(``--load 64:32:1 --load 1500:16:16``) reads 8 TFLOP of prompts twice in each of 19 starts, which is another hour.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from serving.benchmark.environment import describe_environment
from serving.benchmark.journal import Journal
from serving.benchmark.run import measure_all
from serving.benchmark.side import open_side
from serving.profile.measure import Bench, bench_as_profiled, measure_models
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.cli.commands.profile import onnx_export
from toolchain.costs.document import TIMES, CostsDocument, read_costs
from toolchain.errors import SenteiError
from toolchain.json_files import read_json_object
from toolchain.metrics.perplexity import perplexity
from toolchain.model.disk_layers import open_walk
from toolchain.model.loading import bos_of, load_tokenizer
from toolchain.outputs import write_text
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE
from toolchain.prune.budget.allocation import RANKED_ALPHA, allocate, block_parameters
from toolchain.significance import ratio_interval
from toolchain.text.windows import load_windows

_SENTEI = "from toolchain.cli.entry import main; main()"
_ALIGN = 64
_GOALS = {"target": 0.05, "unseen": 0.04, "perplexity": 0.95, "seconds": 1.3}
# Sparsities that are tried: finer than one step of an FFN's width.
_STEPS = 400


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured, and how.

    Attributes:
        model: The original.
        work: Where finished cells and what they need are kept.
        loads: Input and output tokens and requests at a time, of each load.
        target: As for ``sentei prune``.
        calibration: Likewise.
        held_out: Texts that perplexity is measured on.
        samples: Calibration windows.
        seq_len: Tokens per window, also of the held-out texts.
        windows: Of each held-out text.
        repeats: Starts of each plan that is measured.
        unseen: Shapes that no cost was fitted to.
        engine: Options of ``sentei profile``.
        search: As for ``sentei prune``.
        dtype: Likewise.
    """

    model: Path
    work: Path
    loads: Sequence[tuple[int, int, int]]
    target: str
    calibration: Sequence[str]
    held_out: Sequence[Path]
    samples: int
    seq_len: int
    windows: int
    repeats: int
    unseen: int
    engine: Sequence[str]
    search: str
    dtype: str


def main(
    model: Annotated[Path, typer.Argument(help="The original.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write.")],
    calibration: Annotated[list[str], typer.Option(help="As for sentei prune.")],
    held_out: Annotated[list[Path], typer.Option(help="Text of other documents; several times.")],
    target: Annotated[str, typer.Option(help="As for sentei prune.")] = "speedup=1.25",
    load: Annotated[list[str], typer.Option(help="INPUT:OUTPUT:CONCURRENCY; twice.")] = ["64:32:1", "1000:16:2"],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option(help="Of each held-out text.")] = 8,
    repeats: Annotated[int, typer.Option(help="Starts of each plan; at least 2.")] = 3,
    unseen: Annotated[int, typer.Option(help="Shapes that no cost was fitted to; 0 leaves that cell out.")] = 12,
    engine: Annotated[
        str, typer.Option(help="Engine and options, as for sentei profile; they come last.")
    ] = "--engine onnx",
    search: Annotated[str, typer.Option(help="As for sentei prune.")] = "exact",
    dtype: Annotated[str, typer.Option(help="As for sentei prune.")] = "float32",
    cells: Annotated[str, typer.Option(help="Only these, as in costs-0,target-0.")] = "",
) -> None:
    """Fills the cells, and writes the document."""
    asked = Asked(
        model=model, work=out.with_name(f"{out.name}.work"), loads=[_load(each) for each in load], target=target,
        calibration=calibration, held_out=held_out, samples=samples, seq_len=seq_len, windows=windows,
        repeats=repeats, unseen=unseen, engine=engine.split(), search=search,
        dtype=dtype,
    )  # fmt: skip
    asked.work.mkdir(parents=True, exist_ok=True)
    _check_same(asked)
    wanted = [each for each in cells.split(",") if each]
    jobs = _jobs(asked)
    if unknown := set(wanted) - set(jobs):
        raise typer.BadParameter(f"there is no cell {sorted(unknown)[0]}; there are {', '.join(jobs)}")
    for name, job in jobs.items():
        if (file := asked.work / f"{name}.json").exists() or (wanted and name not in wanted):
            continue
        started, used = time.monotonic(), _processor_s()
        found = job()
        seconds = {"seconds": time.monotonic() - started, "processor_seconds": _processor_s() - used}
        write_text(file, json.dumps({**found, **seconds}, indent=1) + "\n")
        print(f"{name}: {seconds['seconds']:.0f} s, of processors {seconds['processor_seconds']:.0f} s", flush=True)
    files = {name: asked.work / f"{name}.json" for name in jobs}
    document = _document(
        asked, {name: read_json_object(file) for name, file in files.items() if file.exists()}, wanted=list(jobs)
    )
    write_text(out, json.dumps(document, indent=1) + "\n")
    if document["not_done"]:
        print(f"still to do: {', '.join(document['not_done'])}")
    else:
        print(json.dumps(document["goals"], indent=1))


def _jobs(asked: Asked) -> dict[str, Callable[[], dict[str, Any]]]:
    """What fills each cell, in the order in which they need each other."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for number in range(len(asked.loads)):
        jobs[f"costs-{number}"] = lambda number=number: _profile(asked, number)
        jobs[f"target-{number}"] = lambda number=number: _prune_to_target(asked, number)
        jobs[f"parameters-{number}"] = lambda number=number: _prune_by_parameters(asked, number)
        jobs[f"speed-{number}"] = lambda number=number: _speed(asked, number)
        jobs[f"text-{number}"] = lambda number=number: _text(asked, number)
    jobs["text-original"] = lambda: {"perplexity": _perplexities(asked, asked.model)}
    if asked.unseen:
        jobs["unseen"] = lambda: _unseen(asked)
    return jobs


def _profile(asked: Asked, number: int) -> dict[str, Any]:
    input_len, output_len, concurrency = asked.loads[number]
    _sentei(
        "profile", str(asked.model), "-o", str(_costs(asked, number)), "--input-len", str(input_len),
        "--output-len", str(output_len), "--concurrency", str(concurrency), "--num-prompts",
        str(2 if concurrency == 1 else concurrency), "--repeats", "3" if concurrency == 1 else "1", "--resume",
        *asked.engine,
    )  # fmt: skip
    document = read_costs(_costs(asked, number)).document
    return {"check": [each.model_dump() for each in document.check]}


def _prune_to_target(asked: Asked, number: int) -> dict[str, Any]:
    return _pruned(asked, f"target-{number}", "--target", asked.target, "--costs", str(_costs(asked, number)))


def _prune_by_parameters(asked: Asked, number: int) -> dict[str, Any]:
    """As many parameters less as, by the costs, make it as fast as the plan for the target."""
    checkpoint, costs = open_checkpoint(asked.model), read_costs(_costs(asked, number)).document
    sizes, parts = block_parameters(checkpoint), costs.costs["ms_per_output_token"].parts
    wanted = parts.of(open_checkpoint(asked.work / f"target-{number}").layout)
    for step in range(1, _STEPS):
        allocation = allocate(sizes, step / _STEPS, align=_ALIGN, alpha=RANKED_ALPHA)
        layout = [
            LayerLayout(attention=layer >= allocation.num_attention_removals, intermediate_size=width)
            for layer, width in enumerate(allocation.widths)
        ]
        if min(allocation.widths) < parts.widths[0]:
            break
        if parts.of(layout) <= wanted:
            return _pruned(asked, f"parameters-{number}", "--sparsity", f"{step / _STEPS:g}")
    raise SenteiError("No plan by parameters is predicted to be as fast as the plan for the target.")


def _pruned(asked: Asked, name: str, *options: str) -> dict[str, Any]:
    texts = [word for text in asked.calibration for word in ("--calibration", text)]
    place = asked.work / name
    if not place.exists():
        _sentei(
            "prune", str(asked.model), "-o", str(place), *options, *texts, "--samples", str(asked.samples),
            "--seq-len", str(asked.seq_len), "--dtype", asked.dtype, "--align", str(_ALIGN), "--search",
            asked.search, "--resume",
        )  # fmt: skip
    summary = read_json_object(place / PRUNING_SUMMARY_FILE)
    return {name: summary.get(name) for name in ("sparsity", "intermediate_size", "removed_attention", "target")}


def _speed(asked: Asked, number: int) -> dict[str, Any]:
    """Both plans in turn, as a benchmark measures two, and of the first load the original with them."""
    bench, place = _bench(asked, number), asked.work / f"speed-{number}"
    place.mkdir(exist_ok=True)
    models = {name: asked.work / f"{name}-{number}" for name in ("target", "parameters")}
    if number == 0:
        models["original"] = asked.model
    if bench.export:
        for name, directory in list(models.items()):
            models[name] = place / f"export-{name}"
            if not models[name].exists():
                bench.export(directory, models[name])
    sides = {name: open_side(name, directory, bench.settings) for name, directory in models.items()}
    journal = Journal(place)
    measure_all(bench.settings, sides, journal, print, open_session=bench.open_session)
    found = {
        name: [journal.get((repeat, 0, name)) for repeat in range(bench.settings.repeats)] for name in models
    }  # fmt: skip
    rates = {name: [each["metrics"]["output_throughput"] for each in runs if each] for name, runs in found.items()}
    return {
        "output_throughput": rates,
        "gain": ratio_interval(rates["original"], rates["target"]) if "original" in rates else None,
        "target_by_parameters": ratio_interval(rates["parameters"], rates["target"]),
    }


def _text(asked: Asked, number: int) -> dict[str, Any]:
    return {name: _perplexities(asked, asked.work / f"{name}-{number}") for name in ("target", "parameters")}


def _perplexities(asked: Asked, directory: Path) -> dict[str, float]:
    checkpoint, tokenizer = open_checkpoint(directory), load_tokenizer(asked.model)
    walk = open_walk(checkpoint, dtype=torch.float32, device="cpu", offload=False)
    bos = bos_of(checkpoint.family, tokenizer)
    found = {}
    for text in asked.held_out:
        windows = load_windows(text, tokenizer, num_samples=asked.windows, seq_len=asked.seq_len, bos=bos)
        found[text.name] = perplexity(walk, windows.ids).perplexity
    return found


def _unseen(asked: Asked) -> dict[str, Any]:
    """Random shapes of the whole depth in turn with the unpruned one: predicted and measured gains, first load."""
    bench, costs = _bench(asked, 0, repeats=2), read_costs(_costs(asked, 0)).document
    rng = np.random.default_rng(0)
    shapes = {f"shape-{number}": _random_shape(rng, costs) for number in range(asked.unseen)}
    measured = measure_models(bench, {"whole": costs.whole, **shapes}, asked.work / "unseen")
    rows = []
    for name, layout in shapes.items():
        row: dict[str, Any] = {"num_attentions": sum(layer.attention for layer in layout),
                               "intermediate_size": [layer.intermediate_size for layer in layout]}  # fmt: skip
        for quantity in (each for each in TIMES if each in costs.costs):
            pairs = zip(measured["whole"][quantity], measured[name][quantity], strict=True)
            gain = fmean(whole / each for whole, each in pairs)
            predicted = costs.predicted_gain(quantity, layout)
            row[quantity] = {**predicted.model_dump(), "measured": gain, "error": predicted.value / gain - 1}
        rows.append(row)
    errors = {name: median(abs(row[name]["error"]) for row in rows) for name in TIMES if name in rows[0]}
    return {"shapes": rows, "median_error": errors}


def _random_shape(rng: np.random.Generator, costs: CostsDocument) -> tuple[LayerLayout, ...]:
    """From 0.4 to all of the width on average, and up to a third of the attentions gone."""
    layers, widths = costs.model.num_hidden_layers, costs.costs["ttft_ms"].widths
    full = widths[-1]
    middle, gone = rng.uniform(0.4, 1.0) * full, rng.integers(0, layers // 3 + 1)
    removed = set(rng.choice(layers, gone, replace=False).tolist())
    drawn = np.clip(np.round(rng.normal(middle, 0.15 * full, layers) / _ALIGN) * _ALIGN, widths[0], full).astype(int)
    return tuple(
        LayerLayout(attention=layer not in removed, intermediate_size=int(width)) for layer, width in enumerate(drawn)
    )


def _document(asked: Asked, cells: dict[str, dict[str, Any]], *, wanted: list[str]) -> dict[str, Any]:
    """What is known so far; goals are looked at when all cells are there."""
    not_done = [name for name in wanted if name not in cells]
    known = [_costs(asked, number) for number in range(len(asked.loads)) if f"costs-{number}" in cells]
    costs = [read_costs(each).document for each in known]
    return {
        "schema_version": 1,
        "kind": "target_benchmark",
        "model": asked.model.name,
        "target": asked.target,
        "settings": {
            **_settings(asked),
            "model": asked.model.name,
            "calibration": [Path(each.rpartition(":")[2]).name for each in asked.calibration],
        },
        "not_done": not_done,
        "goals": None if not_done else _goals(asked, cells),
        "cells": cells,
        "costs": [each.content() for each in costs],
        "environment": describe_environment(),
    }


def _goals(asked: Asked, cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each goal with what was found, and whether it is reached."""
    loads = range(len(asked.loads))
    asked_gain = float(asked.target.removeprefix("speedup=")) if asked.target.startswith("speedup=") else None
    gain = cells["speed-0"]["gain"]
    error = None if asked_gain is None else gain["value"] / asked_gain - 1
    unseen = cells["unseen"]["median_error"]["ms_per_output_token"] if asked.unseen else None
    better = [_perplexity_ratio(cells[f"text-{number}"]) for number in loads]
    speeds = [cells[f"speed-{number}"]["target_by_parameters"] for number in loads]
    shapes = {(tuple(cell["intermediate_size"]), tuple(cell["removed_attention"]))
              for cell in (cells[f"target-{number}"] for number in loads)}  # fmt: skip
    seconds = [cells[f"target-{number}"]["seconds"] / cells[f"parameters-{number}"]["seconds"] for number in loads]
    return {
        "target is met": {"at most": _GOALS["target"], "error": error, "gain": gain,
                          "reached": error is not None and abs(error) <= _GOALS["target"]},
        "unseen plans": {"at most": _GOALS["unseen"], "median_error": unseen,
                         "reached": None if unseen is None else unseen <= _GOALS["unseen"]},
        "each plan is better on its load": {
            "at most": _GOALS["perplexity"], "perplexity by that of the plan by parameters": better,
            "speed by that of the plan by parameters": speeds, "different plans": len(shapes),
            "reached": len(shapes) == len(asked.loads) and max(better) <= _GOALS["perplexity"]
            and all(each["high"] >= 1 for each in speeds),
        },
        "seconds by those of a prune without a target": {
            "at most": _GOALS["seconds"], "ratios": seconds, "reached": max(seconds) <= _GOALS["seconds"],
        },
    }  # fmt: skip


def _perplexity_ratio(cell: dict[str, Any]) -> float:
    """Geometric mean over the texts, the plan for the target by the one by parameters."""
    return float(np.exp(fmean(np.log(cell["target"][text] / cell["parameters"][text]) for text in cell["target"])))


def _bench(asked: Asked, number: int, *, repeats: int | None = None) -> Bench:
    costs = read_costs(_costs(asked, number)).document
    export = onnx_export(costs.served.precision, costs.served.device)
    bench = bench_as_profiled(costs, open_checkpoint(asked.model), export=export, on_progress=print)
    return replace(bench, settings=replace(bench.settings, repeats=repeats or asked.repeats))


def _costs(asked: Asked, number: int) -> Path:
    return asked.work / f"costs-{number}-of-load.json"


def _settings(asked: Asked) -> dict[str, Any]:
    return {
        "model": str(asked.model.resolve()), "loads": [list(each) for each in asked.loads], "target": asked.target,
        "calibration": list(asked.calibration), "held_out": [each.name for each in asked.held_out],
        "samples": asked.samples, "seq_len": asked.seq_len, "windows": asked.windows, "repeats": asked.repeats,
        "unseen": asked.unseen, "engine": list(asked.engine), "search": asked.search,
        "dtype": asked.dtype,
    }  # fmt: skip


def _check_same(asked: Asked) -> None:
    """Cells of other settings are not gone on with."""
    file, settings = asked.work / "settings.json", _settings(asked)
    if file.exists() and read_json_object(file) != settings:
        raise typer.BadParameter(f"{file} says that what is there was asked for otherwise. Give another --out.")
    write_text(file, json.dumps(settings, indent=1) + "\n")


def _load(text: str) -> tuple[int, int, int]:
    try:
        input_len, output_len, concurrency = map(int, text.split(":"))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not INPUT:OUTPUT:CONCURRENCY.") from error
    return input_len, output_len, concurrency


def _sentei(*arguments: str) -> None:
    if code := subprocess.run([sys.executable, "-c", _SENTEI, *arguments]).returncode:
        raise SenteiError(f"sentei {arguments[0]} ended with exit code {code}; what it says is above.")


def _processor_s() -> float:
    """Processor seconds of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SenteiError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
