"""The tables of ``benchmarks/quality.py``: what was decided before any result, and then the results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean
from typing import Any

from lost_nats import still_lost

from toolchain.significance import mcnemar, smallest_difference

POWER = 0.8
TEXTS = ("wikitext-2", "c4")
_ALL = "all questions"
# Which score of a task is meant: its own, acc_norm where it has it and else acc, or acc everywhere.
OWN, ACC = "own", "acc"
Cells = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two models' answers to the same questions.

    Attributes:
        num_questions: All of them.
        lost: Those that only the first answered rightly.
        gained: Those that only the second answered rightly.
    """

    num_questions: int
    lost: int
    gained: int

    @property
    def p_value(self) -> float:
        """The p-value of the exact McNemar test, two-sided."""
        return mcnemar(lost=self.lost, gained=self.gained)


def paired(before: Cells, after: Cells, tasks: Sequence[str], score: str) -> Paired | None:
    """Two rows' answers to tasks taken together; ``None`` where one of them is missing or was asked otherwise."""
    num_questions = lost = gained = 0
    for task in tasks:
        one, other = before.get(task), after.get(task)
        if one is None or other is None or one["prompts_sha256"] != other["prompts_sha256"]:
            return None
        pairs = list(zip(_right(one, score), _right(other, score), strict=True))
        num_questions += len(pairs)
        lost += pairs.count(("1", "0"))
        gained += pairs.count(("0", "1"))
    return Paired(num_questions=num_questions, lost=lost, gained=gained)


def markdown(
    settings: Mapping[str, Any], num_questions: Mapping[str, int], rows: Mapping[str, Cells], *, baseline: str
) -> str:
    """The whole page.

    Args:
        settings: As ``quality_<model>.json`` holds them.
        num_questions: By task.
        rows: By name, ``original`` or a method and its target: cells by column.
        baseline: The method that others are compared with.
    """
    # By target, whatever was filled first; the original, which has none, before all.
    rows = dict(sorted(rows.items(), key=lambda row: _named(row[0])[1]))
    parts = [f"# {settings['model']}", _before(settings, num_questions, baseline), _texts(rows, baseline)]
    if tasks := list(num_questions):
        parts += [
            "Score of each task: `acc_norm` where it has one, else `acc`. In brackets, against the original's answers.",
            _scores(rows, tasks, OWN),
            "`acc` of each task, likewise.",
            _scores(rows, tasks, ACC),
            f"Against `{baseline}` at the same target, in the score of the first table: questions lost and gained.",
            _against_baseline(rows, tasks, baseline),
        ]
    return "\n\n".join(parts) + "\n"


def _before(settings: Mapping[str, Any], num_questions: Mapping[str, int], baseline: str) -> str:
    """What holds whatever comes out: protocol, test and power."""
    lines = [
        f"Calibrated on {settings['calibration']}; perplexity on {' and '.join(settings['texts'].values())}, the texts "
        f"{'for choosing' if settings['choose'] else 'that are kept back'}. Sparsity is of the "
        "decoder blocks' parameters. Perplexity / …: geometric mean of both texts. Still lost: the part of the nats "
        f"that {baseline} loses at the same target, `ln(perplexity / original) / ln({baseline} / original)`, mean of "
        "both texts. s and CPU s: seconds of pruning by the clock and of all processors."
    ]
    if num_questions:
        discordant = settings["discordant"]
        found = {
            name: smallest_difference(num_questions=number, discordant=discordant, power=POWER)
            for name, number in {**num_questions, _ALL: sum(num_questions.values())}.items()
        }
        shown = ", ".join(
            f"{name} ({number:,}) {'none' if found[name] is None else f'{100 * found[name]:.1f}'}"
            for name, number in {**num_questions, _ALL: sum(num_questions.values())}.items()
        )
        lines += [
            "Test: exact McNemar, two-sided, on the discordant questions, which only one of two models answers "
            "rightly; −a +b are those that were lost and gained, and * is p below 0.05. The test over all questions "
            "together decides; those of single tasks are not adjusted for their number.",
            f"Power, stated before any result: if {discordant:.0%} of the questions are discordant (assumed), the "
            f"smallest true differences that are found at p < 0.05 with {POWER:.0%} power are, in points: {shown}.",
        ]
    return "\n\n".join(lines)


def _texts(rows: Mapping[str, Cells], baseline: str) -> str:
    compared = ["perplexity / original", f"perplexity / {baseline}", "still lost"]
    header = ["method", "sparsity", "parameters", *TEXTS, *compared, "s", "CPU s"]
    lines = []
    for row, cells in rows.items():
        name, target = _named(row)
        pruning = cells.get("pruning", {})
        before, lost, left = map(_perplexities, (rows.get("original"), rows.get(f"{baseline} {target}"), cells))
        times = ratio = share = None
        if before and left:
            times = geometric_mean(left) / geometric_mean(before)
        if lost and left:
            ratio = geometric_mean(left) / geometric_mean(lost)
        if before and lost and left:
            share = still_lost(left, original=before, lost=lost)
        lines.append(
            [
                name,
                _shown(pruning.get("sparsity"), ".1%"),
                _shown(pruning.get("num_parameters"), ",d"),
                *(_shown(cells.get(text, {}).get("perplexity"), ".2f") for text in TEXTS),
                _shown(times, ".2f"),
                _shown(ratio, ".3f"),
                _shown(share, ".2f"),
                _shown(pruning.get("seconds"), ".0f"),
                _shown(pruning.get("cpu_seconds"), ".0f"),
            ]
        )
    return _table(header, lines)


def _perplexities(cells: Cells | None) -> list[float] | None:
    """A row's on all texts; ``None`` where one is missing."""
    if cells is None or not all(text in cells for text in TEXTS):
        return None
    return [cells[text]["perplexity"] for text in TEXTS]


def _scores(rows: Mapping[str, Cells], tasks: Sequence[str], score: str) -> str:
    original = rows.get("original", {})
    header = ["method", "sparsity", *tasks, f"{_ALL} (exact McNemar)", "mean of tasks", "kept"]
    lines = []
    for row, cells in rows.items():
        name, _ = _named(row)
        shares = [_share(cells, [task], score) for task in tasks]
        means = [None if None in each else fmean(each) for each in (
            shares, [_share(original, [task], score) for task in tasks])]  # fmt: skip
        lines.append(
            [
                name,
                _shown(cells.get("pruning", {}).get("sparsity"), ".1%"),
                *(
                    _beside(_share(cells, [task], score), None if row == "original" else
                            paired(original, cells, [task], score))
                    for task in tasks
                ),
                _beside(_share(cells, tasks, score), None if row == "original" else
                        paired(original, cells, tasks, score), with_p=True),
                _shown(means[0], ".1%"),
                _shown(means[0] / means[1] if means[0] is not None and means[1] else None, ".1%"),
            ]
        )  # fmt: skip
    return _table(header, lines)


def _against_baseline(rows: Mapping[str, Cells], tasks: Sequence[str], baseline: str) -> str:
    lines = []
    for row, cells in rows.items():
        name, target = _named(row)
        if not target or name == baseline:
            continue
        other = rows.get(f"{baseline} {target}", {})
        compared = [paired(other, cells, each, OWN) for each in (*([task] for task in tasks), tasks)]
        lines.append([name, target, *(_beside(None, each) for each in compared[:-1]),
                      _beside(None, compared[-1], with_p=True)])  # fmt: skip
    return _table(["method", "target", *tasks, f"{_ALL} (exact McNemar)"], lines)


def _right(cell: Mapping[str, Any], score: str) -> str:
    """One character a question: 1 where it was answered rightly."""
    return cell["right"][cell["metric"] if score == OWN else ACC]


def _share(cells: Cells, tasks: Sequence[str], score: str) -> float | None:
    """The share of right answers to all questions of some tasks."""
    if not all(task in cells for task in tasks):
        return None
    right = "".join(_right(cells[task], score) for task in tasks)
    return right.count("1") / len(right)


def _beside(share: float | None, found: Paired | None, *, with_p: bool = False) -> str:
    parts = [] if share is None else [f"{share:.1%}"]
    if found is not None:
        p_value = f", p {'<0.001' if found.p_value < 0.001 else f'{found.p_value:.3f}'}" if with_p else ""
        parts.append(f"(−{found.lost} +{found.gained}{p_value}){'*' if found.p_value < 0.05 else ''}")
    return " ".join(parts)


def _named(row: str) -> tuple[str, str]:
    name, _, target = row.rpartition(" ")
    return (name, target) if name else (row, "")


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
