"""How much of a model is left: perplexity and tasks of every method at every size, filled cell by cell.

    python benchmarks/quality.py MODEL --data ../shared/data --work /tmp/quality -o benchmarks/results
    python benchmarks/quality.py MODEL --data ../shared/data --work /tmp/quality -o /tmp/short --limit 20 --windows 2 \\
        --methods 2ssp,ours --sparsity 0.25

MODEL is any model directory (``sentei import -o MODEL`` makes the demo model). Results go to ``quality_<model>.json``,
and as tables to ``quality_<model>.md``, which says before any result which test decides and what it can find.

**Protocol of the texts.** Documents 0 to 499 of the C4 sample calibrate, and nothing else does. Documents 500 to 599
and WikiText-2's validation text are for choosing between variants, as often as one likes: ``--choose`` evaluates on
them, without the tasks, which have no part for choosing, into ``quality_<model>_choose.json``. Documents 600 to 999,
WikiText-2's test text and the tasks are kept back: they are looked at without ``--choose``. They are not unseen any
more: earlier versions of the default were measured on them in November 2026.

A cell is one method at one sparsity on one text or task. Cells are written as they are finished, so that the table can
be filled over several runs, and extended by another method or size: only what is missing is computed. What changes a
number for all cells (limit, windows, dtype, weights ...) may not change within a file: such a run is refused. Pruned
models are kept in ``--work``. A cell is done anew if a method's arguments changed; if its code did, delete its rows.
"""

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_table import markdown

from serving.benchmark.environment import describe_environment, machine
from toolchain.checkpoint.directory import Checkpoint, model_name, open_checkpoint
from toolchain.cli.console import pick_device
from toolchain.errors import SenteiError
from toolchain.evaluate.lm_eval_tasks import LoadedTask, load_task, run_task
from toolchain.evaluate.task_requests import BatchSize, TaskRequest, parse_batch_size
from toolchain.metrics.perplexity import perplexity
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, load_tokenizer
from toolchain.outputs import write_text
from toolchain.parts_cache import digest_of
from toolchain.text.windows import load_windows


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to prune, as a command line.

    Attributes:
        name: In the table.
        command: A ``sentei`` command. It writes ``{out}``, and knows ``{model}``, ``{sparsity}``, ``{calibration}``,
            ``{samples}``, ``{seq_len}``, ``{dtype}`` and ``{device}``.
        after: The method whose result, ``{before}``, it goes on with.
    """

    name: str
    command: str
    after: "Method | None" = None

    @property
    def commands(self) -> list[str]:
        """All that are run, in turn."""
        return [*(self.after.commands if self.after else []), self.command]


_PRUNE = (
    "prune {model} -o {out} --sparsity {sparsity} --calibration {calibration} --samples {samples} --seq-len {seq_len} "
    "--dtype {dtype} --device {device}"
)
# As many parameters as 2SSP.
_OURS = Method(name="ours", command=f"{_PRUNE} --align 1 --widths ranked --compensate --search racing")
METHODS = (
    Method(name="2ssp", command=f"{_PRUNE} --method 2ssp --align 1"),
    _OURS,
    Method(name="shortgpt", command=f"{_PRUNE} --method shortgpt"),
    Method(name="sliding-window", command=f"{_PRUNE} --method sliding-window"),
    Method(name="blockpruner", command=f"{_PRUNE} --method blockpruner"),
    Method(name="evopress", command=f"{_PRUNE} --method evopress --evopress-budget small"),
    # With the rate, since a row that is there counts as long as its command is the same.
    Method(
        name="ours+heal",
        command="heal {before} --against {model} --data {calibration} -o {out} --steps 20 --learning-rate 3e-4 "
        "--device {device}",
        after=_OURS,
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
# Documents of the C4 sample by what they are for, from the first to before the last; see the protocol above.
CALIBRATING, CHOOSING, FINAL = (0, 500), (500, 600), (600, 1000)
_SENTEI = "from toolchain.cli.app import main; main()"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured, and how.

    Attributes:
        model: The unpruned model.
        data: Directory with the texts and tasks.
        work: Directory for the pruned models.
        choose: Evaluate on the texts for choosing, without tasks.
        windows: Of each text.
        seq_len: Tokens per window, for calibration too.
        limit: The first so many questions of each task; ``None`` for all.
        samples: Calibration windows.
        dtype: Computed in, to prune and to evaluate.
        device: Likewise.
        batch_size: Requests that a model reads at a time.
        discordant: The share of discordant questions that the power is stated for.
    """

    model: Checkpoint
    data: Path
    work: Path
    choose: bool
    windows: int
    seq_len: int
    limit: int | None
    samples: int
    dtype: str
    device: str
    batch_size: BatchSize
    discordant: float


def main(
    model: Annotated[Path, typer.Argument(help="A model directory.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory; what it holds of this model is gone on with.")],
    data: Annotated[Path, typer.Option(help="Directory with the texts and tasks; see its README.")],
    work: Annotated[Path, typer.Option(help="Directory for the pruned models.")],
    choose: Annotated[bool, typer.Option("--choose", help="On the texts for choosing, without tasks.")] = False,
    sparsity: Annotated[list[float], typer.Option(help="Of the decoder blocks; several times.")] = [0.25, 0.375, 0.5],  # noqa: B006
    methods: Annotated[str, typer.Option(help="Names, comma-separated; without it, all.")] = "",
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window, for calibration too.")] = 2048,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many questions of each task; without it, all.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    dtype: Annotated[str, typer.Option(help="Computed in, to prune and to evaluate.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Requests that a model reads at a time: a number, or auto.")] = "16",
    discordant: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            help="Share of questions that only one of two models answers rightly, assumed for the "
            "power: 0.14 to 0.35 between the pruned demo models.",
        ),
    ] = 0.25,
    max_minutes: Annotated[float, typer.Option(help="Start no new cell after so long.")] = float("inf"),
) -> None:
    """Fills the tables."""
    known = [method.name for method in METHODS]
    names = methods.split(",") if methods else known
    if unknown := [name for name in names if name not in known]:
        raise SenteiError(f"--methods: {unknown[0]!r} is not known.", f"Known are {', '.join(known)}.")
    asked = Asked(
        model=open_checkpoint(model), data=data, work=work, choose=choose, windows=windows, seq_len=seq_len,
        limit=limit, samples=samples, dtype=dtype, device=pick_device(device), discordant=discordant,
        batch_size=parse_batch_size(batch_size),
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    calibration, texts = texts_of(data, work, choose=choose)
    # All questions are read before anything is pruned: how many there are decides what can be found.
    tasks = (
        {} if choose else {name: load_task(TaskRequest(name=name, file=data / file)) for name, file in TASKS.items()}
    )
    num_questions = {name: _num_questions(task, limit) for name, task in tasks.items()}
    settings = _settings(asked, texts, num_questions)
    table = Table(
        results_file(out, asked), settings, num_questions, deadline=time.monotonic() + 60 * max_minutes
    )  # fmt: skip
    table.save()
    _fill(table, asked, [method for method in METHODS if method.name in names], sparsity, calibration, texts, tasks)
    typer.echo(table.markdown())


def results_file(out: Path, asked: Asked) -> Path:
    """Where the results of a model go; those for choosing have a file of their own."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name(asked.model.directory))
    return out / f"quality_{name}{'_choose' if asked.choose else ''}.json"


def texts_of(data: Path, work: Path, *, choose: bool) -> tuple[Path, dict[str, Path]]:
    """The text that calibrates, and those that evaluate, by the protocol above; C4's parts are written to ``work``."""
    documents = (data / "c4_sample_1000docs.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    if len(documents) < FINAL[1]:
        raise SenteiError(f"{data / 'c4_sample_1000docs.jsonl'} has {len(documents)} documents, not {FINAL[1]}.")
    files = {}
    for part in (CALIBRATING, CHOOSING if choose else FINAL):
        files[part] = work / f"c4-{part[0]}-{part[1] - 1}.jsonl"
        write_text(files[part], "\n".join(documents[slice(*part)]) + "\n")
    return files.pop(CALIBRATING), {
        "wikitext-2": data / ("wikitext2_valid.txt" if choose else "wikitext2_test.txt"),
        "c4": next(iter(files.values())),
    }


def _num_questions(task: LoadedTask, limit: int | None) -> int:
    return sum(len(list(part.eval_docs)[:limit]) for part in task.parts.values())


def _settings(asked: Asked, texts: Mapping[str, Path], num_questions: Mapping[str, int]) -> dict[str, Any]:
    """What all cells of a file have in common."""
    return {
        "model": model_name(asked.model.directory), "weights_sha256": asked.model.fingerprint, "choose": asked.choose,
        "calibration": f"C4, documents {CALIBRATING[0]} to {CALIBRATING[1] - 1}",
        "texts": {name: file.name for name, file in texts.items()},
        "num_windows": asked.windows, "seq_len": asked.seq_len, "num_calibration_windows": asked.samples,
        "limit": asked.limit, "num_questions": dict(num_questions), "num_fewshot": 0, "batch_size": asked.batch_size,
        "dtype": asked.dtype, "discordant": asked.discordant,
    }  # fmt: skip


def _fill(
    table: "Table", asked: Asked, methods: list[Method], sparsities: list[float], calibration: Path,
    texts: Mapping[str, Path], tasks: Mapping[str, LoadedTask],
) -> None:  # fmt: skip
    def measure_texts(row: str, walk: Callable[[], LayerWalk], depends_on: Mapping[str, Any]) -> None:
        for name, path in texts.items():
            table.fill(row, name, {**depends_on, "text": _digest(path)}, partial(_perplexity, walk, path, asked))

    def measure_tasks(row: str, walk: Callable[[], LayerWalk], depends_on: Mapping[str, Any]) -> None:
        for name, task in tasks.items():
            table.fill(row, name, {**depends_on, "questions": task.sha256}, partial(_task, walk, task, asked))

    # Texts of all rows come first: the ratio of perplexities is the first question, and tasks take longest.
    for measure in (measure_texts, measure_tasks):
        measure("original", cache(partial(_walk, asked.model.directory, asked)), {})
        for target in sparsities:
            for method in methods:
                pruned = _Pruned(table, asked, method, target, calibration)
                if pruned.fill() is not None:
                    measure(pruned.row, cache(pruned.walk), pruned.depends_on)


class _Pruned:
    """A row's model: made once, kept, and made again where it is gone."""

    def __init__(self, table: "Table", asked: Asked, method: Method, sparsity: float, calibration: Path) -> None:
        self._table, self._asked, self._method = table, asked, method
        self._sparsity, self._calibration = sparsity, calibration
        self._before = _Pruned(table, asked, method.after, sparsity, calibration) if method.after else None
        self.row = f"{method.name} {sparsity:g}"
        self.depends_on = {
            "commands": method.commands, "sparsity": sparsity, "calibration": _digest(calibration),
            "weights": asked.model.fingerprint, "samples": asked.samples, "seq_len": asked.seq_len,
            "dtype": asked.dtype,
        }  # fmt: skip
        self.place = asked.work / f"{method.name}-{sparsity:g}-{digest_of(self.depends_on)}"

    def fill(self) -> dict[str, Any] | None:
        """The cell that says what pruning took, of all commands; ``None`` past the deadline."""
        before = self._before.fill() if self._before else {}
        if before is None:
            return None
        return self._table.fill(self.row, "pruning", self.depends_on, partial(self._prune, before))

    def walk(self) -> LayerWalk:
        """The model."""
        self._make()
        return _walk(self.place, self._asked)

    def _make(self) -> None:
        if self.place.exists():
            return
        if self._before:
            self._before._make()
        asked = self._asked
        values = {
            "model": asked.model.directory, "sparsity": self._sparsity, "calibration": self._calibration,
            "samples": asked.samples, "seq_len": asked.seq_len, "dtype": asked.dtype, "device": asked.device,
            "out": self.place, "before": self._before.place if self._before else None,
        }  # fmt: skip
        arguments = [part.format(**values) for part in self._method.command.split()]
        if code := subprocess.run([sys.executable, "-c", _SENTEI, *arguments, "--quiet"]).returncode:
            raise SenteiError(f"{self.row}: sentei {arguments[0]} ended with exit code {code}; what it says is above.")

    def _prune(self, before: Mapping[str, Any]) -> dict[str, Any]:
        if self._before:
            self._before._make()  # if it is gone; its time is in ``before``
        shutil.rmtree(self.place, ignore_errors=True)
        began, cpu_before = time.monotonic(), _cpu_s_of_children()
        self._make()
        used = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_s_of_children() - cpu_before}
        pruned = open_checkpoint(self.place)
        return {
            "num_parameters": pruned.num_parameters,
            "sparsity": 1 - pruned.num_block_parameters / self._asked.model.num_block_parameters,
            **{name: round(value + before.get(name, 0), 1) for name, value in used.items()},
            "cpu": machine()["cpu"],
        }


def _walk(directory: Path, asked: Asked) -> LayerWalk:
    return open_walk(open_checkpoint(directory), dtype=getattr(torch, asked.dtype), device=asked.device, offload=False)


class Table:
    """The cells so far, and where they are kept."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], num_questions: Mapping[str, int], *, deadline: float
    ) -> None:
        """Goes on with what is in the file.

        Raises:
            SenteiError: It holds cells of other settings, which must not stand beside new ones.
        """
        self._path, self._deadline = path, deadline
        self._settings, self._num_questions = settings, num_questions
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.rows: dict[str, dict[str, Any]] = before.get("rows", {})
        known = before.get("settings", settings)
        if differing := [name for name in settings if known.get(name) != settings[name]]:
            name = differing[0]
            raise SenteiError(
                f"{path} was measured with another {name} ({known.get(name)}, now {settings[name]}).",
                "Ask as before, or give another directory to --out.",
            )

    def fill(
        self, row: str, column: str, depends_on: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """A cell's content: what is there if it depended on the same, else computed; ``None`` past the deadline."""
        key = digest_of(depends_on)
        cell = self.rows.get(row, {}).get(column)
        if cell is None or cell["key"] != key:
            if time.monotonic() > self._deadline:
                return None
            typer.echo(f"{row}: {column} ...", err=True)
            started = time.monotonic()
            found = compute()
            cell = {"seconds": round(time.monotonic() - started, 1), **found, "key": key}
            self.rows.setdefault(row, {})[column] = cell
            self.save()
        return cell

    def save(self) -> None:
        """Writes the results, as JSON and as Markdown."""
        document = {
            "schema_version": 2, "kind": "quality_benchmark", "settings": self._settings,
            "methods": {method.name: method.commands for method in METHODS}, "rows": self.rows,
            "environment": describe_environment(),
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        write_text(self._path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        """The results for people."""
        return markdown(self._settings, self._num_questions, self.rows, baseline=BASELINE)


def _cpu_s_of_children() -> float:
    """Processor time of all that was started and has ended: unlike the clock, hardly longer beside other work."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _perplexity(walk: Callable[[], LayerWalk], path: Path, asked: Asked) -> dict[str, Any]:
    tokenizer = load_tokenizer(asked.model.directory)
    bos = bos_of(asked.model.family, tokenizer)
    windows = load_windows(path, tokenizer, num_samples=asked.windows, seq_len=asked.seq_len, bos=bos)
    return asdict(perplexity(walk(), windows.ids))


def _task(walk: Callable[[], LayerWalk], task: LoadedTask, asked: Asked) -> dict[str, Any]:
    tokenizer = load_tokenizer(asked.model.directory)
    result = run_task(
        walk().model, tokenizer, task, limit=asked.limit, bos=bos_of(asked.model.family, tokenizer),
        batch_size=asked.batch_size,
    )  # fmt: skip
    questions = result["questions"]
    metrics = [name for name in ("acc", "acc_norm") if name in questions[0]["scores"]]
    return {
        "metric": result["metric"],
        "num_questions": len(questions),
        "prompts_sha256": result["prompts_sha256"],
        "right": {name: "".join(str(int(each["scores"][name])) for each in questions) for name in metrics},
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    try:
        typer.run(main)
    except SenteiError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
