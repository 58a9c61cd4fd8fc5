"""The whole path on real models, measured cell by cell: prune, evaluate, export to vLLM and ONNX, verify.

    python benchmarks/real_models.py MODEL... -o real_models.json --data ../shared/data --work /tmp/real_models

A MODEL is a model directory or a .gguf file, which is imported. A cell is one step of one model, method and sparsity:
the product's own command in a process of its own, measured from outside (``measured_command.py`` says how memory and
reads are counted). Each is written as soon as it is finished, so that a run that is killed loses one cell, and the same
command goes on. A cell that failed holds why; ``--again`` runs such cells once more. A cell is done anew if the model,
the texts or the arguments changed; if the code did, delete its cell.

    python benchmarks/real_models.py MODEL -o real_models.json --data ../shared/data --work /tmp/real_models \\
        --cells '*/default 0.25/*' --samples 4 --seq-len 256 --windows 2

runs some of them, small. Calibrated on the C4 sample's documents 0 to 599; evaluated on 600 to 999 and on WikiText-2.
Pruned models stay in ``--work``; an export is deleted when it was verified. Results stand in ``benchmarks/results/``.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any

import typer
from lost_nats import still_lost
from measured_command import measure_sentei

from serving.benchmark.environment import describe_environment
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.outputs import write_text
from toolchain.parts_cache import digest_of

METHODS: Mapping[str, tuple[str, ...]] = {"default": (), "2ssp": ("--method", "2ssp")}
SPARSITIES = (0.25, 0.375, 0.5)
ORIGINAL = "original"
_NUM_CALIBRATION_DOCUMENTS = 600
_EXPORTS = ("export vllm", "export onnx")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the path.

    Attributes:
        name: In the table.
        command: Arguments; ``{model}``, ``{source}`` (what is imported), ``{out}`` and ``{pruned}`` (the row's model)
            are paths, the rest is settings.
        writes: Suffix of what it writes beside the row's model; ``None`` if nothing is kept.
        needs: The step that writes what it reads.
    """

    name: str
    command: tuple[str, ...]
    writes: str | None = None
    needs: str | None = None


_TEXTS = ("--text", "{wikitext}", "--text", "{c4}", "--windows", "{windows}", "--seq-len", "{seq_len}")
IMPORT = Step(name="import", command=("import", "{source}", "-o", "{out}"), writes="")
PRUNE = Step(
    name="prune", writes="",
    command=(
        "prune", "{model}", "-o", "{out}", "--sparsity", "{sparsity}", "--calibration", "{calibration}",
        "--samples", "{samples}", "--seq-len", "{seq_len}", "--align", "{align}", "{method}",
    ),
)  # fmt: skip
# Each export compares itself with its checkpoint: vLLM's in Transformers, ONNX in ONNX Runtime.
AFTER = (
    Step(name="evaluate", command=("evaluate", "{pruned}", "-o", "{out}", *_TEXTS), writes="-evaluation"),
    Step(name="export onnx", command=("export", "onnx", "{pruned}", "-o", "{out}"), writes="-onnx"),
    Step(name="export vllm", command=("export", "vllm", "{pruned}", "-o", "{out}"), writes="-vllm"),
    Step(
        name="verify vllm", needs="export vllm",
        command=("verify", "{export}", "--against", "{pruned}", "--engine", "vllm"),
    ),
)  # fmt: skip
STEP_NAMES = ("import", "prune", *(step.name for step in AFTER))


def main(
    models: Annotated[list[Path], typer.Argument(help="Model directories, or .gguf files.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file, gone on with if it exists; .md beside it.")],
    data: Annotated[Path, typer.Option(help="Directory with the texts; see its README.")],
    work: Annotated[Path, typer.Option(help="Directory for models, exports and logs.")],
    cells: Annotated[list[str], typer.Option(help="MODEL/METHOD SPARSITY/STEP, with * ; several times.")] = ["*"],  # noqa: B006
    again: Annotated[bool, typer.Option(help="Run cells that failed once more.")] = False,
    windows: Annotated[int, typer.Option(help="Windows of each text, to evaluate.")] = 16,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window, for calibration too.")] = 2048,
    align: Annotated[int, typer.Option(help="FFN widths are multiples of this.")] = 64,
) -> None:
    """Fills the table."""
    work.mkdir(parents=True, exist_ok=True)
    settings = {"windows": windows, "samples": samples, "seq_len": seq_len, "align": align}
    table = Table(out, {**settings, "calibration": f"C4, documents 0 to {_NUM_CALIBRATION_DOCUMENTS - 1}"})
    texts = split_texts(data, work)
    named = {model.stem if model.suffix == ".gguf" else model.resolve().name: model for model in models}
    if len(named) < len(models):
        raise SystemExit("Two models have one name: rename one of the directories.")
    for name, source in named.items():
        run = ModelRun(table=table, name=name, source=source, work=work, texts=texts, settings=settings, again=again)
        for row, step in run.steps():
            if any(fnmatch(f"{name}/{row}/{step.name}", pattern) for pattern in cells):
                run.fill(row, step)
    table.save()
    typer.echo(table.markdown())


class Table:
    """The cells so far, and where they are kept."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Goes on with what ``path`` holds."""
        self._path = path
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.models: dict[str, dict[str, dict[str, dict[str, Any]]]] = before.get("models", {})
        self._settings = settings

    def get(self, model: str, row: str, step: str) -> dict[str, Any] | None:
        """A cell, if it was run."""
        return self.models.get(model, {}).get(row, {}).get(step)

    def put(self, model: str, row: str, step: str, cell: dict[str, Any]) -> None:
        """Keeps a cell, on disk too."""
        self.models.setdefault(model, {}).setdefault(row, {})[step] = cell
        self.save()

    def save(self) -> None:
        """Writes the table, as JSON and as Markdown."""
        document = {
            "schema_version": 1, "kind": "real_models_benchmark", "settings": self._settings, "models": self.models,
            "environment": describe_environment(),
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        write_text(self._path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        """For people: for each model what is left of it, then what each step took."""
        parts = []
        for model, rows in self.models.items():
            parts += [f"## {model}", _quality(rows), _costs(rows), *_failures(rows)]
        return "\n\n".join([*parts, _NOTES]) + "\n"


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """The way of one model: which cells there are, and how one is filled.

    Attributes:
        table: Where cells are kept.
        name: The model's.
        source: Its directory or .gguf file.
        work: Where outputs go.
        texts: Paths by the names that commands have for them.
        settings: Numbers by the names that commands have for them.
        again: Whether a cell that failed is run once more.
    """

    table: Table
    name: str
    source: Path
    work: Path
    texts: Mapping[str, Path]
    settings: Mapping[str, int]
    again: bool

    @property
    def model(self) -> Path:
        """The original's directory."""
        return self.work / self.name / ORIGINAL if self.source.suffix == ".gguf" else self.source

    @cached_property
    def identity(self) -> str:
        """What the model's weights are known by."""
        if self.source.suffix == ".gguf":
            with self.source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return open_checkpoint(self.source).fingerprint[:16]

    def steps(self) -> Iterator[tuple[str, Step]]:
        """Rows and steps, in the order in which they are run."""
        if self.source.suffix == ".gguf":
            yield ORIGINAL, IMPORT
        yield from ((ORIGINAL, step) for step in AFTER)
        for sparsity in SPARSITIES:
            for method in METHODS:
                yield from ((f"{method} {sparsity:g}", step) for step in (PRUNE, *AFTER))

    def fill(self, row: str, step: Step) -> bool:
        """Runs a cell that is missing or was made otherwise, after what it needs; whether it stands and is no error."""
        cell, key = self.table.get(self.name, row, step.name), self._key(row, step)
        if cell and cell["key"] == key and not (cell["error"] and self.again):
            return not cell["error"]
        if not all(self._is_there(*needed) for needed in self._needs(row, step)):
            return False
        self.table.put(self.name, row, step.name, {**self._run(row, step), "key": key})
        return not self.table.models[self.name][row][step.name]["error"]

    def _needs(self, row: str, step: Step) -> Iterator[tuple[str, Step]]:
        if self.source.suffix == ".gguf" and step is not IMPORT:
            yield ORIGINAL, IMPORT
        if row != ORIGINAL and step is not PRUNE:
            yield row, PRUNE
        yield from ((row, each) for each in AFTER if each.name == step.needs)

    def _is_there(self, row: str, step: Step) -> bool:
        """Whether what a step writes is there; it is run for it, again if need be. Not after it failed."""
        cell = self.table.get(self.name, row, step.name)
        if cell and cell["key"] == self._key(row, step) and not cell["error"] and not self._out(row, step).exists():
            del self.table.models[self.name][row][step.name]
        # An export that differs from its checkpoint is there all the same, for the other verification to say so too.
        return self.fill(row, step) or (step.name in _EXPORTS and self._out(row, step).exists())

    def _out(self, row: str, step: Step) -> Path:
        return self.work / self.name / f"{row.replace(' ', '-')}{step.writes}"

    def _key(self, row: str, step: Step) -> str:
        """Names everything that a cell depends on."""
        commands = [each.command for _, each in self._needs(row, step)] + [step.command]
        placeholders = {word for command in commands for word in command}
        used = {name: value for name, value in self.settings.items() if f"{{{name}}}" in placeholders}
        texts = {name: _digest(path) for name, path in self.texts.items() if f"{{{name}}}" in placeholders}
        return digest_of({"model": self.identity, "row": row, "commands": commands, **used, **texts})

    def _run(self, row: str, step: Step) -> dict[str, Any]:
        method, _, sparsity = row.partition(" ")
        pruned = self.model if row == ORIGINAL else self._out(row, PRUNE)
        export = next((self._out(row, each) for each in AFTER if each.name == step.needs), None)
        values = {
            **self.settings, **self.texts, "source": self.source, "model": self.model, "pruned": pruned,
            "out": self._out(row, step), "export": export, "sparsity": sparsity,
        }  # fmt: skip
        words = [part for word in step.command for part in (METHODS[method] if word == "{method}" else (word,))]
        arguments = [word.format(**values) for word in words] + ["--json"] + (["--force"] if "{out}" in words else [])
        log = self.work / "logs" / f"{self.name}-{row}-{step.name}.log".replace(" ", "-")
        typer.echo(f"{self.name}: {row}: {step.name} ... ({log})", err=True)
        began = {"measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load_before": os.getloadavg()[0]}
        reads = [path for path in (self.source, self.model, pruned, export) if path is not None]
        done = measure_sentei(arguments, log=log, reads=reads)
        typer.echo(f"  {done.error or 'done'} ({done.cost['wall_s']:.0f} s)", err=True)
        if step.needs and done.error is None and export is not None:
            shutil.rmtree(export, ignore_errors=True)
        elif step.name == "export onnx" and done.error is None:
            shutil.rmtree(self._out(row, step), ignore_errors=True)
        return {"error": done.error, "said": _said(done.stdout), "cost": done.cost, **began, "commit": _commit()}


def split_texts(data: Path, work: Path) -> dict[str, Path]:
    """The C4 sample in two, so that nothing that calibrates can evaluate, and WikiText-2."""
    documents = (data / "c4_sample_1000docs.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    halves = {"calibration": documents[:_NUM_CALIBRATION_DOCUMENTS], "c4": documents[_NUM_CALIBRATION_DOCUMENTS:]}
    for name, lines in halves.items():
        write_text(work / f"{name}.jsonl", "\n".join(lines) + "\n")
    return {
        "calibration": work / "calibration.jsonl",
        "c4": work / "c4.jsonl",
        "wikitext": data / "wikitext2_test.txt",
    }


def _said(stdout: str) -> dict[str, Any]:
    """The numbers of a command's own JSON that the table and a reader of the results want; no paths."""
    try:
        told = json.loads(stdout)
    except ValueError:
        return {}
    if told.get("kind") == "evaluation":
        names = ("perplexity", "standard_error", "num_tokens", "duration_s")
        return {Path(each["text"]).stem: {name: each[name] for name in names} for each in told["evaluations"]}
    if told.get("kind") == "pruning_summary":
        kept = ("sparsity", "removed_attention", "intermediate_size", "calibration_metric", "compensation")
        sizes = {f"{side}_{name}": told[side][name] for side in ("original", "pruned") for name in _SIZES}
        return {name: told[name] for name in kept} | sizes
    return {name: value for name, value in told.items() if isinstance(value, bool | int | float) or name == "engine"}


_SIZES = ("num_parameters", "weight_bytes")


def _quality(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What is left: one line per method and sparsity."""
    names = ["removed", "attentions removed", "parameters", "WikiText-2", "C4", "times the original's", "still lost"]
    lines = [f"| | {' | '.join(names)} | vLLM | ONNX |", "|" + " --- |" * (len(names) + 3)]
    original = _perplexities(rows.get(ORIGINAL, {}))
    for row, cells in rows.items():
        pruned, perplexities = cells.get("prune", {}).get("said") or {}, _perplexities(cells)
        ratio = geometric_mean(perplexities) / geometric_mean(original) if perplexities and original else None
        words = [
            row,
            f"{pruned['sparsity']:.1%}" if pruned else "",
            str(len(pruned["removed_attention"])) if pruned else "",
            f"{pruned['pruned_num_parameters']:,}" if pruned else "",
            *(f"{each:.2f}" for each in perplexities or ()),
            *([""] * (0 if perplexities else 2)),
            "" if ratio is None else f"{ratio:.3f}",
            _still_lost(rows, row),
            _verdict(cells, "verify vllm"),
            _verdict(cells, "export onnx"),
        ]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def _still_lost(rows: Mapping[str, Mapping[str, Any]], row: str) -> str:
    """Which part of the nats that 2SSP loses at the same sparsity this row still loses, on average over the texts."""
    published = row.replace("default", "2ssp")
    known = [_perplexities(rows.get(each, {})) for each in (ORIGINAL, row, published)]
    if row == published or not all(known):
        return ""
    original, left, lost = known
    return f"{still_lost(left, original=original, lost=lost):.2f}"


def _perplexities(cells: Mapping[str, Any]) -> list[float] | None:
    said = cells.get("evaluate", {}).get("said")
    return [said["wikitext2_test"]["perplexity"], said["c4"]["perplexity"]] if said else None


def _verdict(cells: Mapping[str, Any], step: str) -> str:
    if not (cell := cells.get(step)):
        return ""
    return "verified" if not cell["error"] else "FAILED"


def _costs(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What it took: one line per step, with the stages that it told of."""
    names = ["step", "load", "wall s", "CPU s", "anonymous GB", "resident GB", "from disk GB", "asked of read GB"]
    lines = [f"| | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    for row, cells in rows.items():
        for step in STEP_NAMES:
            if step not in cells:
                continue
            cost = cells[step]["cost"]
            lines.append(_cost_line(row, step, f"{cells[step]['load_before']:.1f}", cost))
            if step == "prune":
                lines += [_cost_line("", f"… {stage['stage']}", "", stage) for stage in cost["stages"]]
    return "\n".join(lines)


def _cost_line(row: str, step: str, load: str, cost: Mapping[str, Any]) -> str:
    sizes = ("peak_anonymous_bytes", "peak_resident_bytes", "bytes_from_disk", "bytes_asked_of_read")
    numbers = [f"{cost['wall_s']:.0f}", f"{cost['cpu_s']:.0f}" if "cpu_s" in cost else ""]
    numbers += [f"{cost[size] / 1e9:.2f}" if size in cost else "" for size in sizes]
    return f"| {row} | {step} | {load} | {' | '.join(numbers)} |"


def _failures(rows: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    failed = [
        f"- {row}, {step}: {' '.join(cell['error'].split())}"
        for row, cells in rows.items()
        for step, cell in cells.items()
        if cell["error"]
    ]
    return ["\n".join(failed)] if failed else []


_NOTES = (
    "Perplexity of text that took no part in pruning, and its geometric mean over both texts against the original's; "
    "still lost: the part of the nats that 2SSP loses at the same sparsity, `ln(ours / original) / ln(2SSP / "
    "original)`, mean of both texts. vLLM and ONNX: whether the export gave the checkpoint's answers, by `sentei "
    "verify` in vLLM and by `sentei export onnx`. Of each command: the machine's load in the minute before it (where "
    "other work ran beside it, compare the processors' seconds, not the clock's), seconds by the clock and of all "
    "processors, the highest memory of its processes, bytes that came from the disk while the page cache was kept "
    "empty of the model, and bytes that `read` returned, cached or not (weights are mapped, not read). A stage lasts "
    "from the end of the one before it."
)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _commit() -> str | None:
    """The version of the code that was measured; ``None`` outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    typer.run(main)
