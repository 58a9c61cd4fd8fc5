"""Two published ways to prune heads and neurons together, FLAP and GISP, beside the product's numbers.

    python benchmarks/baselines.py MODEL -o baselines.json --data ../shared/data --work /tmp/baselines
    python benchmarks/baselines.py MODEL -o baselines.json ... --choose --methods flap --sparsity 0.375

MODEL is a model directory with the name and weights of a model in ``real_models.json``. Its settings and texts are
taken: the same calibration windows, the same windows of C4's documents 600 to 999 and WikiText-2's test text, float32,
and for each sparsity as many parameters of the decoder blocks as the default's plan has there, biases counted. The
original is measured, too, and a difference from ``real_models.json`` ends the run.

The product's plans hold neither single heads nor a bias of ``down_proj`` alone, so these models are pruned in memory
and not written (``baseline_units.py``). Every variant that a paper leaves open is measured by ``--choose``, on C4's
documents 500 to 599 and WikiText-2's validation text; :data:`CHOSEN` is the better one.

A cell is one model and method at one sparsity on one text. Cells are written as they are finished and rounds of GISP
are kept in ``--work``, so that the same command goes on where it was killed. A cell is done anew if what it depends on
changed; if the code did, delete its row.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from baseline_flap import Flap, Statistics, flap_biases, flap_scores, measure
from baseline_gisp import Gisp, rounds
from baseline_units import Kept, Pruned, Shape, num_parameters, pruned, read_shape, remove_lowest
from baselines_table import Table, perplexities
from real_models import split_texts

from serving.benchmark.environment import machine
from toolchain.checkpoint.directory import Checkpoint, model_name, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.metrics.perplexity import perplexity
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, load_tokenizer
from toolchain.outputs import write_text
from toolchain.parts_cache import digest_of
from toolchain.text.windows import load_windows

VARIANTS: Mapping[str, Flap | Gisp] = {
    "flap head": Flap(unit="head"),
    "flap head squared": Flap(unit="head", squared=True),
    "flap head UL-UM": Flap(unit="head", structure="UL-UM"),
    "flap group": Flap(unit="group"),
    "flap group squared": Flap(unit="group", squared=True),
    "gisp head": Gisp(unit="head", divisor="published"),
    "gisp head weights": Gisp(unit="head", divisor="weights"),
    "gisp group weights": Gisp(unit="group", divisor="weights"),
}
CHOSEN = {"flap": "flap head", "gisp": "gisp head"}
# Documents of the C4 sample that choose: see benchmarks/quality.py.
_CHOOSING = (500, 600)
_MOST_DIFFERENCE = 1e-3


def main(
    model: Annotated[Path, typer.Argument(help="A model directory.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file, gone on with if it exists; .md beside it.")],
    data: Annotated[Path, typer.Option(help="Directory with the texts; see its README.")],
    work: Annotated[Path, typer.Option(help="Directory for texts, statistics and rounds.")],
    against: Annotated[Path, typer.Option(help="Results of real_models.py.")] = Path(__file__).parent
    / "results/real_models.json",
    choose: Annotated[bool, typer.Option("--choose", help="All variants, on the texts for choosing.")] = False,
    sparsity: Annotated[list[float], typer.Option(help="Of the decoder blocks; several times.")] = [0.25, 0.375, 0.5],  # noqa: B006
    methods: Annotated[
        str, typer.Option(help="flap, gisp, or with --choose names of variants; comma-separated.")
    ] = "flap,gisp",
    num_rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of GISP, from nothing to 50 %.")] = 20,
    max_minutes: Annotated[float, typer.Option(help="Start no new cell or round after so long.")] = float("inf"),
) -> None:
    """Fills the table."""
    work.mkdir(parents=True, exist_ok=True)
    known = json.loads(against.read_text(encoding="utf-8"))
    deadline = time.monotonic() + 60 * max_minutes
    bench = Bench(
        checkpoint=open_checkpoint(model), known=known, work=work, choose=choose, num_rounds=num_rounds,
        texts=_texts(data, work, choose=choose), table=Table(out, known, VARIANTS, CHOSEN, deadline=deadline),
    )  # fmt: skip
    bench.fill(_asked(methods, choose=choose), sorted(sparsity))
    bench.table.save()
    typer.echo(bench.table.markdown())


def _asked(methods: str, *, choose: bool) -> dict[str, Flap | Gisp]:
    """What is measured, by the name of its rows."""
    found: dict[str, Flap | Gisp] = {}
    for name in methods.split(","):
        if name not in CHOSEN and not (choose and name in VARIANTS):
            raise SenteiError(f"--methods: {name!r} is not known.", f"Known are {', '.join(CHOSEN)}.")
        if not choose:
            found[name] = VARIANTS[CHOSEN[name]]
        else:
            found |= {each: VARIANTS[each] for each in VARIANTS if name in (each, each.split()[0])}
    return found


def _texts(data: Path, work: Path, *, choose: bool) -> dict[str, Path]:
    """Those of ``real_models.py``; with ``choose`` others evaluate, and the same calibrates."""
    texts = split_texts(data, work)
    if choose:
        lines = (data / "c4_sample_1000docs.jsonl").read_text(encoding="utf-8").split("\n")[slice(*_CHOOSING)]
        texts["c4"] = work / f"c4-{_CHOOSING[0]}-{_CHOOSING[1] - 1}.jsonl"
        write_text(texts["c4"], "\n".join(lines) + "\n")
        texts["wikitext"] = data / "wikitext2_valid.txt"
    return texts


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One model: what is computed for its cells.

    Attributes:
        checkpoint: The original.
        known: ``real_models.json``.
        work: Where statistics and rounds are kept.
        choose: On the texts for choosing.
        num_rounds: Of GISP, to the highest sparsity that ``known`` has.
        texts: By ``calibration``, ``wikitext`` and ``c4``.
        table: Where cells are kept.
    """

    checkpoint: Checkpoint
    known: Mapping[str, Any]
    work: Path
    choose: bool
    num_rounds: int
    texts: Mapping[str, Path]
    table: Table

    @property
    def name(self) -> str:
        """The model's."""
        return model_name(self.checkpoint.directory)

    @cached_property
    def rows(self) -> Mapping[str, Any]:
        """What is known of this model."""
        if self.name not in self.known["models"]:
            raise SenteiError(
                f"{self.name} was not measured by real_models.py.", f"{', '.join(self.known['models'])} were."
            )
        return self.known["models"][self.name]

    @cached_property
    def walk(self) -> LayerWalk:
        """The model, loaded when the first cell needs it."""
        walk = open_walk(self.checkpoint, dtype=torch.float32, device="cpu", offload=False)
        walk.model.requires_grad_(False)
        return walk

    @cached_property
    def shape(self) -> Shape:
        """Its units."""
        return read_shape(self.walk)

    @cached_property
    def budgets(self) -> dict[float, int]:
        """Parameters of the decoder blocks that the default's plan has, by sparsity."""
        plans = {
            float(row.split()[1]): cells["prune"]["said"] for row, cells in self.rows.items() if row[:7] == "default"
        }
        whole = num_parameters(self.shape, self.shape.everything, with_biases=False)
        return {
            target: whole - (plan["original_num_parameters"] - plan["pruned_num_parameters"])
            for target, plan in plans.items()
        }

    def windows(self, text: str) -> torch.Tensor:
        """Windows of a text, as ``sentei prune`` and ``sentei evaluate`` cut them; int64 ``[num_windows, seq_len]``."""
        tokenizer, settings = load_tokenizer(self.checkpoint.directory), self.known["settings"]
        count = settings["samples" if text == "calibration" else "windows"]
        bos = bos_of(self.checkpoint.family, tokenizer)
        return load_windows(
            self.texts[text], tokenizer, num_samples=count, seq_len=settings["seq_len"], bos=bos
        ).ids  # fmt: skip

    def fill(self, methods: Mapping[str, Flap | Gisp], sparsities: Sequence[float]) -> None:
        """Fills the cells, row after row."""
        if not self.choose:
            whole = lambda: Pruned(kept=self.shape.everything, biases=None, cpu_s=0.0)  # noqa: E731
            self._measure("original", self._depends_on(), whole)
            self._check_original()
        for name, method in methods.items():
            for target in sparsities:
                depends_on = {"method": asdict(method), "sparsity": target} | self._depends_on("calibration")
                if isinstance(method, Gisp):
                    depends_on["rounds"] = self.num_rounds
                self._measure(f"{name} {target:g}", depends_on, partial(self._prune, name, method, target))

    def _depends_on(self, *texts: str) -> dict[str, Any]:
        return {
            "weights": self.checkpoint.fingerprint, "settings": self.known["settings"],
            **{text: _digest(self.texts[text]) for text in texts},
        }  # fmt: skip

    def _measure(self, row: str, depends_on: Mapping[str, Any], prune: Callable[[], Pruned | None]) -> None:
        """Fills the cells of a row; it is pruned if one of them is missing."""
        found: list[Pruned | None] = []

        def model() -> Pruned | None:
            found[:] = found or [prune()]
            return found[0]

        place = (self.name, "choose" if self.choose else "final", row)
        self.table.fill(place, "pruning", {**depends_on}, lambda: self._counted(model()))
        for text in ("wikitext", "c4"):
            key = {**depends_on, **self._depends_on(text)}
            self.table.fill(place, text, key, partial(self._perplexity, text, model))

    def _counted(self, model: Pruned | None) -> dict[str, Any] | None:
        if model is None:
            return None
        whole = num_parameters(self.shape, self.shape.everything, with_biases=False)
        left = num_parameters(self.shape, model.kept, with_biases=model.biases is not None)
        return {
            "num_parameters": self.checkpoint.num_parameters - whole + left, "sparsity": 1 - left / whole,
            "heads": model.kept.heads.sum(1).tolist(), "neurons": model.kept.neurons.sum(1).tolist(),
            "removed_heads": int((~model.kept.heads).sum()), "num_heads": model.kept.heads.size,
            "cpu_seconds": round(model.cpu_s, 1), "cpu": machine()["cpu"],
        }  # fmt: skip

    def _perplexity(self, text: str, model: Callable[[], Pruned | None]) -> dict[str, Any] | None:
        found = model()
        if found is None:
            return None
        with pruned(self.walk, found.kept, found.biases):
            return asdict(perplexity(self.walk, self.windows(text)))

    def _check_original(self) -> None:
        """Raises where the original's perplexity is not what ``real_models.json`` says: nothing could be compared."""
        cells = self.table.rows.get(self.name, {}).get("final", {}).get("original", {})
        for text, expected in zip(("wikitext", "c4"), perplexities(self.rows["original"]), strict=True):
            if text in cells and abs(cells[text]["perplexity"] / expected - 1) > _MOST_DIFFERENCE:
                raise SenteiError(
                    f"{self.name}, {text}: perplexity is {cells[text]['perplexity']:.4f}, and {expected:.4f} in the "
                    "results that this is compared with.",
                    "Give the same model and texts.",
                )

    def _prune(self, name: str, method: Flap | Gisp, target: float) -> Pruned | None:
        if isinstance(method, Gisp):
            return self._gisp(method, target)
        statistics, measured_s = self._statistics()
        started = time.process_time()
        scores = flap_scores(self.walk, self.shape, statistics, method)
        kept = remove_lowest(
            self.shape, self.shape.everything, scores, at_most=self.budgets[target], with_biases=True
        )  # fmt: skip
        biases = flap_biases(self.walk, self.shape, statistics, kept)
        return Pruned(kept=kept, biases=biases, cpu_s=measured_s + time.process_time() - started)

    def _statistics(self) -> tuple[Statistics, float]:
        """FLAP's, and the processor's seconds that they took when they were measured."""
        path = self.work / f"{self.name}-flap-{digest_of(self._depends_on('calibration'))}.npz"
        if path.is_file():
            with np.load(path) as kept:
                arrays = dict(kept)
            return Statistics(**{key: arrays[key] for key in arrays if key != "cpu_s"}), float(arrays["cpu_s"])
        windows, _ = self.windows("calibration"), self.walk
        typer.echo(f"{self.name}: statistics of {len(windows)} windows ...", err=True)
        started = time.process_time()
        statistics = measure(self.walk, windows)
        cpu_s = time.process_time() - started
        _save(path, cpu_s=cpu_s, **asdict(statistics))
        return statistics, cpu_s

    def _gisp(self, method: Gisp, target: float) -> Pruned | None:
        """The trajectory as far as ``target``; ``None`` if the time ends before."""
        budgets = _schedule(self.shape, self.budgets, self.num_rounds)
        last = 1 + next(number for number, budget in enumerate(budgets) if budget == self.budgets[target])
        key = digest_of({**self._depends_on("calibration"), **asdict(method), "budgets": budgets})
        files = [self.work / f"{self.name}-gisp-{key}-{number:03}.npz" for number in range(1, last + 1)]
        done = sum(file.is_file() for file in files)
        kept = self.shape.everything if done == 0 else _kept(files[done - 1])
        if done < last:
            windows = self.windows("calibration")
            started = time.process_time()
            told: list[float] = []
            steps = rounds(self.walk, self.shape, windows, method, budgets[done:last], kept, told.append)
            while done < last:
                if self.table.is_late:
                    return None
                kept = next(steps)
                now = time.process_time()
                _save(files[done], cpu_s=now - started, loss=told[-1], **asdict(kept))
                typer.echo(
                    f"{self.name}: round {done + 1}: loss before {told[-1]:.3f}, {now - started:.0f} s", err=True
                )
                done, started = done + 1, now
        return Pruned(kept=kept, biases=None, cpu_s=sum(float(np.load(file)["cpu_s"]) for file in files))


def _schedule(shape: Shape, budgets: Mapping[float, int], num_rounds: int) -> list[int]:
    """Parameters that each round leaves, in equal steps to the smallest plan, and exactly a plan's where it is."""
    whole = num_parameters(shape, shape.everything, with_biases=False)
    highest = max(budgets)
    found = [round(whole * (1 - highest * number / num_rounds)) for number in range(1, num_rounds + 1)]
    for target, budget in budgets.items():
        place = round(target / highest * num_rounds) - 1
        if not math.isclose((place + 1) / num_rounds * highest, target):
            raise SenteiError(f"--rounds {num_rounds} does not pass a sparsity of {target:g}.", "Give a multiple of 4.")
        found[place] = budget
    return found


def _kept(file: Path) -> Kept:
    with np.load(file) as arrays:
        return Kept(heads=arrays["heads"], neurons=arrays["neurons"])


def _save(path: Path, **arrays: Any) -> None:
    """Written whole or not at all."""
    partial_file = path.with_suffix(".partial.npz")
    np.savez_compressed(partial_file, **arrays)
    partial_file.replace(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    try:
        typer.run(main)
    except SenteiError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
