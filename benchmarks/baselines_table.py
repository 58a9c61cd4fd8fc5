"""The cells of ``baselines.py``, on disk and as tables for people."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import typer
from lost_nats import still_lost

from serving.benchmark.environment import describe_environment
from toolchain.errors import SenteiError
from toolchain.outputs import write_text
from toolchain.parts_cache import digest_of

_COMPARED = ("default", "2ssp")


class Table:
    """The cells so far, and where they are kept."""

    def __init__(
        self,
        path: Path,
        known: Mapping[str, Any],
        variants: Mapping[str, Any],
        chosen: Mapping[str, str],
        *,
        deadline: float,
    ) -> None:
        """Goes on with what ``path`` holds.

        Args:
            path: The JSON file.
            known: ``real_models.json``.
            variants: Dataclasses, by name.
            chosen: Methods, and the names of their variants.
            deadline: Nothing is started after it; as ``time.monotonic`` says it.

        Raises:
            SenteiError: It holds cells of other settings.
        """
        self._path, self._known, self._deadline = path, known, deadline
        self._variants, self._chosen = {name: asdict(each) for name, each in variants.items()}, dict(chosen)
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if before and before["settings"] != known["settings"]:
            raise SenteiError(f"{path} was measured with other settings.", "Give another file to --out.")
        self.rows: dict[str, dict[str, dict[str, dict[str, Any]]]] = before.get("models", {})

    @property
    def is_late(self) -> bool:
        """Whether nothing more is to be started."""
        return time.monotonic() > self._deadline

    def fill(
        self, place: tuple[str, str, str], column: str, depends_on: Mapping[str, Any],
        compute: Callable[[], dict[str, Any] | None],
    ) -> None:  # fmt: skip
        """Computes a cell that is missing or depended on something else, if there is time."""
        model, part, row = place
        key = digest_of(depends_on)
        cell = self.rows.get(model, {}).get(part, {}).get(row, {}).get(column)
        if (cell is not None and cell["key"] == key) or self.is_late:
            return
        typer.echo(f"{model}: {part}: {row}: {column} ...", err=True)
        if (computed := compute()) is not None:
            self.rows.setdefault(model, {}).setdefault(part, {}).setdefault(row, {})[column] = {**computed, "key": key}
            self.save()

    def save(self) -> None:
        """Writes the table, as JSON and as Markdown."""
        document = {
            "schema_version": 1, "kind": "baselines_benchmark", "settings": self._known["settings"],
            "variants": self._variants, "chosen": self._chosen,
            "models": self.rows, "environment": describe_environment(),
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        write_text(self._path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        """For people: for each model what is left of it, and what chose the variants."""
        parts = []
        for model, found in self.rows.items():
            known = self._known["models"][model]
            parts += [
                f"## {model}",
                *_final(known, found.get("final", {}), self._chosen),
                *_choices(found.get("choose", {})),
            ]
        return "\n\n".join([*parts, _NOTES]) + "\n"


def _final(known: Mapping[str, Any], rows: Mapping[str, Any], methods: Iterable[str]) -> Iterable[str]:
    """What is left, beside what is known: one line per method and sparsity."""
    if not rows:
        return
    names = "removed", "heads removed", "parameters", "WikiText-2", "C4", "times the original's", "still lost", "CPU s"
    lines = [f"| | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    original = perplexities(known["original"])
    num_heads = next((cells["pruning"]["num_heads"] for cells in rows.values() if "pruning" in cells), None)
    for target in (row.split()[1] for row in known if row.startswith("default ")):
        lost = perplexities(known[f"2ssp {target}"])
        for method in _COMPARED:
            cells = known[f"{method} {target}"]
            said = cells["prune"]["said"]
            per_layer = num_heads // len(said["intermediate_size"]) if num_heads else 0
            words = [
                f"{method} {target}", f"{said['sparsity']:.1%}", str(per_layer * len(said["removed_attention"])),
                f"{said['pruned_num_parameters']:,}", *_quality(perplexities(cells), original, lost),
                f"{cells['prune']['cost']['cpu_s']:.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(words)} |")
        for method in methods:
            if not {"pruning", "wikitext", "c4"} <= set(cells := rows.get(f"{method} {target}", {})):
                continue
            counted = cells["pruning"]
            words = [
                f"{method} {target}", f"{counted['sparsity']:.1%}",
                f"{counted['removed_heads']} of {counted['num_heads']}", f"{counted['num_parameters']:,}",
                *_quality(perplexities(cells), original, lost), f"{counted['cpu_seconds']:.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(words)} |")
    yield "\n".join(lines)


def _quality(found: Sequence[float], original: Sequence[float], lost: Sequence[float]) -> list[str]:
    ratio = geometric_mean(found) / geometric_mean(original)
    share = still_lost(found, original=original, lost=lost)
    return [*(f"{each:.2f}" for each in found), f"{ratio:.3f}", f"{share:.2f}"]


def _choices(rows: Mapping[str, Any]) -> Iterable[str]:
    """Variants on the texts that choose."""
    if not rows:
        return
    names = "heads removed", "WikiText-2, validation", "C4, documents 500 to 599", "geometric mean", "CPU s"
    lines = [f"| variant | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    for row, cells in rows.items():
        if not {"pruning", "wikitext", "c4"} <= set(cells):
            continue
        found, counted = perplexities(cells), cells["pruning"]
        words = [row, str(counted["removed_heads"]), *(f"{each:.2f}" for each in found), f"{geometric_mean(found):.2f}"]
        words.append(f"{counted['cpu_seconds']:.0f}")
        lines.append(f"| {' | '.join(words)} |")
    yield "\n".join(lines)


def perplexities(cells: Mapping[str, Any]) -> list[float]:
    """On WikiText-2 and C4, of this file's cells or of those of ``real_models.json``."""
    if "evaluate" in cells:
        said = cells["evaluate"]["said"]
        return [said["wikitext2_test"]["perplexity"], said["c4"]["perplexity"]]
    return [cells[text]["perplexity"] for text in ("wikitext", "c4")]


_NOTES = (
    "Same calibration text, windows, dtype and texts as in [real_models.md](real_models.md), where `default` and "
    "`2ssp` come from. Removed: of the decoder blocks' parameters, as many as in the default's plan; FLAP's biases are "
    "counted as kept. A query head takes its rows of `q_proj` and its columns of `o_proj` along, and the last one of a "
    "group the key-value head. Times the original's: geometric mean of both texts. Still lost: the part of the nats "
    "that 2SSP loses at the same sparsity, mean of both texts. CPU s: processor seconds of pruning, on the `cpu` that "
    "the JSON names for each row; those of several processors cannot be compared. GISP's add up all rounds so far."
)
