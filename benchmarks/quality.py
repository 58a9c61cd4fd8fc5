"""How much of a model is left: perplexity and tasks of every method at every size, one table, filled cell by cell.

A cell is one method at one sparsity on one text or task. Cells are written as they are finished, so that the table can
be filled over several runs, and extended by another method, size, text or limit: only what is missing is computed.
Pruned models are kept in ``--work``. A cell is done anew if a method's arguments changed; if its code did, delete its
rows.

    python benchmarks/quality.py -o quality.json --data ../shared/data --work /tmp/quality
    python benchmarks/quality.py -o quality.json --data ../shared/data --work /tmp/quality --methods 2ssp --sparsity 0.5

Calibrated on the C4 sample's documents 0 to 599 and evaluated on 600 to 999 only. Results stand in
``benchmarks/results/``.
"""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any

import torch
import typer

from serving.benchmark.environment import describe_environment
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.evaluate.lm_eval_tasks import load_task, run_task
from toolchain.evaluate.task_requests import TaskRequest
from toolchain.metrics.perplexity import perplexity
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, load_model, load_tokenizer
from toolchain.outputs import write_text
from toolchain.parts_cache import digest_of
from toolchain.significance import mcnemar
from toolchain.text.windows import load_windows


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to prune, as a command line.

    Attributes:
        name: In the table.
        commands: ``sentei`` commands, run in turn. Each writes ``{out}``, may read ``{before}``, which the one before
            it wrote, and knows ``{model}``, ``{sparsity}``, ``{calibration}``, ``{samples}``, ``{seq_len}`` and
            ``{dtype}``.
    """

    name: str
    commands: tuple[str, ...]


_PRUNE = (
    "prune {model} -o {out} --sparsity {sparsity} --calibration {calibration} --samples {samples} --seq-len {seq_len} "
    "--dtype {dtype}"
)
_OURS = f"{_PRUNE} --align 1 --widths ranked --compensate --search racing"
METHODS = (
    Method(name="2ssp", commands=(f"{_PRUNE} --method 2ssp --align 1",)),
    # As many parameters.
    Method(name="ours", commands=(_OURS,)),
    Method(name="shortgpt", commands=(f"{_PRUNE} --method shortgpt",)),
    Method(name="sliding-window", commands=(f"{_PRUNE} --method sliding-window",)),
    Method(name="blockpruner", commands=(f"{_PRUNE} --method blockpruner",)),
    Method(name="evopress", commands=(f"{_PRUNE} --method evopress --evopress-budget small",)),
    Method(
        name="ours+heal",
        commands=(_OURS, "heal {before} --against {model} --data {calibration} -o {out} --steps 20"),
    ),
)
BASELINE = "2ssp"
TASKS = {
    "winogrande": "winogrande_xl_dev.jsonl",
    "arc_easy": "arc_easy_dev.jsonl",
    "arc_challenge": "arc_challenge_dev.jsonl",
    "hellaswag": "hellaswag_dev_2000.jsonl",
    "piqa": "piqa_valid.jsonl",
    "mmlu": "mmlu_validation.jsonl",
}
_NUM_CALIBRATION_DOCUMENTS = 600
_SENTEI = "from toolchain.cli.app import main; main()"


def main(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file, gone on with if it exists; .md beside it.")],
    data: Annotated[Path, typer.Option(help="Directory with the texts and tasks; see its README.")],
    work: Annotated[Path, typer.Option(help="Directory for the pruned models.")],
    sparsity: Annotated[list[float], typer.Option(help="Of the decoder blocks; several times.")] = [0.25, 0.375, 0.5],  # noqa: B006
    methods: Annotated[str, typer.Option(help="Names, comma-separated; without it, all.")] = "",
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens a window, for calibration too.")] = 2048,
    limit: Annotated[int, typer.Option(help="The first so many questions of each task.")] = 150,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    dtype: Annotated[str, typer.Option(help="Computed in, to prune and to evaluate.")] = "float32",
    max_minutes: Annotated[float, typer.Option(help="Start no new cell after so long.")] = float("inf"),
) -> None:
    """Fills the table."""
    chosen = [method for method in METHODS if not methods or method.name in methods.split(",")]
    work.mkdir(parents=True, exist_ok=True)
    calibration, texts = _texts(data, work)
    tasks = {name: data / file for name, file in TASKS.items()}
    model = work / "original"
    if not model.exists():
        import_gguf(demo_gguf(), model)
    table = _Table(out, deadline=time.monotonic() + 60 * max_minutes)
    table.settings = {
        "num_windows": windows, "seq_len": seq_len, "limit": limit, "num_calibration_windows": samples,
        "calibration": f"C4, documents 0 to {_NUM_CALIBRATION_DOCUMENTS - 1}", "model": "SmolLM2-135M-Instruct",
        "dtype": dtype, "methods": {method.name: list(method.commands) for method in METHODS},
    }  # fmt: skip

    def measure_texts(row: str, walk: Callable[[], LayerWalk], depends_on: Mapping[str, Any]) -> None:
        for name, path in texts.items():
            asked = {**depends_on, "text": _digest(path), "windows": windows, "seq_len": seq_len, "dtype": dtype}
            table.fill(row, name, asked, partial(lambda path: _perplexity(walk(), path, windows, seq_len, model), path))

    def measure_tasks(row: str, walk: Callable[[], LayerWalk], depends_on: Mapping[str, Any]) -> None:
        for name, file in tasks.items():
            asked = {**depends_on, "questions": _digest(file), "limit": limit, "dtype": dtype}
            table.fill(
                row, name, asked, partial(lambda name, file: _task(walk(), name, file, limit, model), name, file)
            )

    # Texts of all rows come first: the ratio of perplexities is the first question, and tasks take longest.
    for measure in (measure_texts, measure_tasks):
        measure("original", cache(partial(_walk, model, dtype)), {})
        for target in sparsity:
            values = {
                "sparsity": target, "samples": samples, "seq_len": seq_len, "model": model, "calibration": calibration,
                "dtype": dtype,
            }  # fmt: skip
            for method in chosen:
                row = f"{method.name} {target:g}"
                depends_on = {
                    "commands": method.commands, "sparsity": target, "samples": samples, "seq_len": seq_len,
                    "calibration": _digest(calibration), "dtype": dtype,
                }  # fmt: skip
                place = work / f"{method.name}-{target:g}-{digest_of(depends_on)}"
                prune = partial(_prune, method, place, values)
                if table.fill(row, "pruning", depends_on, prune) is not None:
                    measure(row, cache(partial(_pruned_walk, place, dtype, prune)), depends_on)
    table.save()
    typer.echo(table.markdown())


def _walk(directory: Path, dtype: str) -> LayerWalk:
    checkpoint = open_checkpoint(directory)
    return LayerWalk(load_model(checkpoint, dtype=getattr(torch, dtype)), checkpoint.family)


def _pruned_walk(place: Path, dtype: str, prune: Callable[[], object]) -> LayerWalk:
    """What a row measures, pruned again if an earlier run's model is gone."""
    if not place.exists():
        prune()
    return _walk(place, dtype)


class _Table:
    """The cells so far, and where they are kept."""

    def __init__(self, path: Path, *, deadline: float) -> None:
        self._path, self._deadline = path, deadline
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.cells: dict[str, dict[str, Any]] = before.get("rows", {})
        self.settings: dict[str, Any] = {}

    def fill(
        self, row: str, column: str, depends_on: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """A cell's content: what is there if it depended on the same, else computed; ``None`` past the deadline."""
        key = digest_of(depends_on)
        cell = self.cells.get(row, {}).get(column)
        if cell is None or cell["key"] != key:
            if time.monotonic() > self._deadline:
                return None
            typer.echo(f"{row}: {column} ...", err=True)
            started = time.monotonic()
            cell = {**compute(), "seconds": round(time.monotonic() - started, 1), "key": key}
            self.cells.setdefault(row, {})[column] = cell
            self.save()
        return cell

    def save(self) -> None:
        """Writes the table, as JSON and as Markdown."""
        document = {
            "schema_version": 1, "kind": "quality_benchmark", "settings": self.settings, "rows": self.cells,
            "environment": describe_environment(),
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        write_text(self._path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        """The table for people: perplexities, shares of right answers in %, and what they say together."""
        columns = ["wikitext-2", "c4", *TASKS]
        header = [
            "method",
            "sparsity",
            "parameters",
            *columns,
            "mean of tasks",
            "kept",
            f"perplexity / {BASELINE}",
            "s",
            "CPU s",
        ]
        lines = [" | ".join(header), " | ".join("---" for _ in header)]
        for row, cells in self.cells.items():
            name, _, target = row.partition(" ")
            pruning = cells.get("pruning", {})
            accuracies = self._accuracies(row)
            original = self._accuracies("original")
            kept = fmean(accuracies) / fmean(original) if accuracies and original else None
            ratio = self._ratio(row, f"{BASELINE} {target}") if target else None
            lines.append(
                " | ".join(
                    [
                        name,
                        _shown(pruning.get("sparsity"), ".1%"),
                        _shown(pruning.get("num_parameters"), ",d"),
                        *(self._cell(row, column) for column in columns),
                        _shown(fmean(accuracies) if accuracies else None, ".1%"),
                        _shown(kept, ".1%"),
                        _shown(ratio, ".3f"),
                        _shown(pruning.get("seconds"), ".0f"),
                        _shown(pruning.get("cpu_seconds"), ".0f"),
                    ]
                )
            )
        notes = (
            "Perplexity of text; share of right answers (acc_norm where the task has it); perplexity against "
            f"{BASELINE}'s at the same target, geometric mean of both texts; s and CPU s: seconds of pruning, by the "
            "clock and of all processors (compare these where other work ran beside it). In brackets what a task lost "
            "and gained against the original's answers, with an exact McNemar p below 0.05 as *."
        )
        return "\n".join(f"| {line} |" for line in lines) + f"\n\n{notes}\n"

    def _accuracies(self, row: str) -> list[float] | None:
        cells = [self.cells.get(row, {}).get(task) for task in TASKS]
        return [cell["accuracy"] for cell in cells if cell is not None] if all(cells) else None

    def _ratio(self, row: str, baseline: str) -> float | None:
        ratios = []
        for text in ("wikitext-2", "c4"):
            ours, theirs = (self.cells.get(each, {}).get(text) for each in (row, baseline))
            if ours is None or theirs is None:
                return None
            ratios.append(ours["perplexity"] / theirs["perplexity"])
        return geometric_mean(ratios)

    def _cell(self, row: str, column: str) -> str:
        cell = self.cells.get(row, {}).get(column)
        if cell is None:
            return ""
        if "perplexity" in cell:
            return f"{cell['perplexity']:.2f}"
        original = self.cells.get("original", {}).get(column)
        if row == "original" or original is None or len(original["right"]) != len(cell["right"]):
            return f"{cell['accuracy']:.1%}"
        pairs = list(zip(original["right"], cell["right"], strict=True))
        lost, gained = pairs.count(("1", "0")), pairs.count(("0", "1"))
        chance = "*" if mcnemar(lost=lost, gained=gained) < 0.05 else ""
        return f"{cell['accuracy']:.1%} (−{lost} +{gained}){chance}"


def _texts(data: Path, work: Path) -> tuple[Path, dict[str, Path]]:
    """The C4 sample in two, so that nothing that calibrates can evaluate, and WikiText-2."""
    documents = (data / "c4_sample_1000docs.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    halves = {"calibrate": documents[:_NUM_CALIBRATION_DOCUMENTS], "evaluate": documents[_NUM_CALIBRATION_DOCUMENTS:]}
    for name, lines in halves.items():
        write_text(work / f"c4-{name}.jsonl", "\n".join(lines) + "\n")
    return work / "c4-calibrate.jsonl", {
        "wikitext-2": data / "wikitext2_test.txt",
        "c4": work / "c4-evaluate.jsonl",
    }


def _prune(method: Method, place: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a method's commands; keeps only what the last one writes."""
    shutil.rmtree(place, ignore_errors=True)
    before_cpu_s = _cpu_s_of_children()
    with tempfile.TemporaryDirectory(dir=place.parent) as steps:
        before = Path(steps) / "none"
        for number, command in enumerate(method.commands):
            last = number == len(method.commands) - 1
            step = place if last else Path(steps) / str(number)
            arguments = [part.format(**values, out=step, before=before) for part in command.split()]
            subprocess.run([sys.executable, "-c", _SENTEI, *arguments, "--quiet"], check=True)
            before = step
    original, pruned = open_checkpoint(values["model"]), open_checkpoint(place)
    return {
        "num_parameters": pruned.num_parameters,
        "sparsity": 1 - pruned.num_block_parameters / original.num_block_parameters,
        "cpu_seconds": round(_cpu_s_of_children() - before_cpu_s, 1),
    }


def _cpu_s_of_children() -> float:
    """Processor time of all that was started and has ended: unlike the clock, hardly longer beside other work."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _perplexity(walk: LayerWalk, path: Path, windows: int, seq_len: int, model: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    bos = bos_of(walk.family, tokenizer)
    return asdict(perplexity(walk, load_windows(path, tokenizer, num_samples=windows, seq_len=seq_len, bos=bos).ids))


def _task(walk: LayerWalk, name: str, file: Path, limit: int, model: Path) -> dict[str, Any]:
    tokenizer, task = load_tokenizer(model), load_task(TaskRequest(name=name, file=file))
    result = run_task(walk.model, tokenizer, task, limit=limit, bos=bos_of(walk.family, tokenizer))
    right = [question["scores"][result["metric"]] for question in result["questions"]]
    return {
        "metric": result["metric"],
        "accuracy": fmean(right),
        "num_questions": len(right),
        "right": "".join(str(int(each)) for each in right),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    typer.run(main)
