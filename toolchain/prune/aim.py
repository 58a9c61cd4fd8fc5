"""The shape that meets a target: solved for, measured, corrected and solved again, before anything is removed.

Which neurons and which layers' attentions go makes no difference to speed, so models of random weights and the shape
are measured. What they cost is compared with what was predicted, and the budgets are corrected by the ratio: a
secant's step, which closes in fast where the error is nearly the same for shapes that are nearly the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint
from toolchain.documents import read_document
from toolchain.errors import SenteiError
from toolchain.model.context_length import context_length
from toolchain.outputs import START_OVER, write_text
from toolchain.parts_cache import digest_of
from toolchain.plan.target_record import PartCostsRecord, TargetRecord, TargetRound, TargetValue
from toolchain.progress import Progress
from toolchain.prune.budget.allocation import Protected
from toolchain.prune.budget.least_damage import Choice, least_damage
from toolchain.prune.budget.target import (
    Measured,
    Target,
    budget_of,
    check_targets,
    predicted,
    unreachable,
    with_measured,
)
from toolchain.prune.search.damages import Predicted
from toolchain.prune.settings import Aim

_MOST_ROUNDS, _TOLERANCE = 3, 0.03
# More attentions than this share of all never go: what is left of such a model is of no use.
_MOST_REMOVED = 0.5
# Widths that a layer may have; more make the solver slow, and differ by less than a measurement can tell.
_MOST_WIDTHS = 64
_FILE = "target.json"


def widths_to_choose(aim: Aim, align: int) -> tuple[int, ...]:
    """The widths that a layer may have, ascending: multiples of ``align`` from the narrowest that was measured on.

    Raises:
        SenteiError: There is none but the full one.
    """
    known = aim.costs.document.costs["weight_bytes"].widths
    full, units = known[-1], range(-(-known[0] // align), (known[-1] - 1) // align + 1)
    step = -(-len(units) // _MOST_WIDTHS) if units else 1
    if not units:
        raise SenteiError(f"--align {align} leaves no FFN width between {known[0]} and {full}.", "Lower --align.")
    return (*sorted(align * unit for unit in units[::-1][::step]), full)


def most_removals(num_layers: int, protected: Protected) -> int:
    """How many attentions may go for a target."""
    return min(int(num_layers * _MOST_REMOVED), num_layers - len(protected.attention))


def check_aim(aim: Aim, checkpoint: Checkpoint, *, align: int, protected: Protected) -> None:
    """Refuses costs of another model, and targets that need no pruning or that no pruning meets.

    Raises:
        SenteiError: See above; a target out of reach comes with the best that can be had.
    """
    aim.costs.document.check_model(checkpoint.directory, checkpoint.config)
    check_targets(aim.targets, aim.costs.document, context_length(checkpoint.config).extended)
    num_layers = len(checkpoint.layout)
    widths = widths_to_choose(aim, align)
    stay = num_layers - most_removals(num_layers, protected)
    smallest = [
        LayerLayout(attention=layer < stay, intermediate_size=widths[-1 if layer in protected.ffn else 0])
        for layer in range(num_layers)
    ]
    if error := unreachable(aim.targets, aim.costs.document, smallest):
        raise error


def blank_record(aim: Aim) -> TargetRecord:
    """What a plan says before a shape is known."""
    document = aim.costs.document
    return TargetRecord(
        asked=[each.asked for each in aim.targets],
        costs_sha256=aim.costs.sha256,
        served=f"{document.served.engine}, {document.load.in_words}",
        costs={
            quantity: PartCostsRecord(
                outside=parts.outside, attention=parts.attention, widths=parts.widths, ffn=parts.ffn
            )
            for quantity, parts in document.costs.items()
        },
    )


def find_shape(aim: Aim, damages: Predicted, directory: Path, progress: Progress) -> TargetRecord:
    """Solves and measures until a shape is within 3 % of the target, or its interval does not exclude it.

    Before a shape is accepted because of its interval alone, it is measured as often again.

    Args:
        aim: What is asked for.
        damages: Of every choice.
        directory: Keeps what was measured; a run that was interrupted goes on with it.
        progress: Told of every shape.

    Returns:
        With the rounds, and which one is taken: the least damaging of those that meet the target, or else the nearest;
        and whether its interval is all that speaks for it.

    Raises:
        SenteiError: No shape meets the target, or one cannot be measured.
    """
    directory.mkdir(parents=True, exist_ok=True)
    record, file = blank_record(aim), directory / _FILE
    before = read_document(file, TargetRecord, hint=START_OVER).rounds if file.exists() else []
    corrections = [1.0] * len(aim.targets)
    timed = any(target.is_timed for target in aim.targets)
    for number in range(_MOST_ROUNDS if timed else 1):
        budgets = [
            budget_of(target, aim.costs.document, correction=correction)
            for target, correction in zip(aim.targets, corrections, strict=True)
        ]
        choice = least_damage(damages.damages, budgets)
        if choice is None or any(_is(each, choice) for each in record.rounds):
            break
        found = next((each for each in before if _is(each, choice)), None)
        if found is None:
            with progress(f"Target: shape {number + 1}, at most {_MOST_ROUNDS}", 1) as advance:
                found = _tried(aim, damages, choice, directory, timed=timed)
                advance()
        record = record.model_copy(update={"rounds": [*record.rounds, found]})
        if found not in before:
            write_text(file, record.model_dump_json() + "\n")
        if _close(aim.targets, found):
            break
        corrections = [_correction(*pair) for pair in zip(aim.targets, found.values, strict=True)]
    if not record.rounds:
        raise SenteiError(f"No shape meets {', '.join(record.asked)} as predicted.", "Ask for less.")
    taken = _best(aim.targets, record.rounds)
    found = record.rounds[taken]
    met = _met(aim.targets, found)
    return record.model_copy(
        update={"taken": taken, "met": met, "left_open": met and _is_left_open(aim.targets, found.values)}
    )


def _tried(aim: Aim, damages: Predicted, choice: Choice, directory: Path, *, timed: bool) -> TargetRound:
    removed = sorted(damages.order[: choice.num_removals])
    layout = [
        LayerLayout(attention=layer not in removed, intermediate_size=width)
        for layer, width in enumerate(choice.widths)
    ]
    values = predictions = [predicted(target, aim.costs.document, layout) for target in aim.targets]
    if timed:
        shapes = {"shape": tuple(layout)}
        if any(target.name == "speedup" for target in aim.targets):
            shapes["whole"] = aim.costs.document.whole
        # By its name, so that what was measured of another shape is never taken for it.
        place = directory / f"shape-{digest_of(asdict(choice))}"

        def with_times(measured: Mapping[str, Measured]) -> list[TargetValue]:
            return [
                with_measured(value, target, measured["shape"], measured.get("whole"))
                for value, target in zip(predictions, aim.targets, strict=True)
            ]

        values = with_times(aim.measure(shapes, place, lambda found: _is_left_open(aim.targets, with_times(found))))
    return TargetRound(
        intermediate_size=list(choice.widths),
        removed_attention=removed,
        predicted_damage=damages.damages.of(choice),
        ffn_damage=damages.damages.of_ffns(choice),
        attention_damage=damages.damages.attentions[choice.num_removals],
        values=values,
    )


def _is(found: TargetRound, choice: Choice) -> bool:
    shape = (tuple(found.intermediate_size), len(found.removed_attention))
    return shape == (choice.widths, choice.num_removals)


def _share(target: Target, value: TargetValue) -> float:
    """Of what may be spent, as measured; as counted where nothing is measured."""
    return target.share(value.predicted if value.measured is None else value.measured)


def _is_open(target: Target, value: TargetValue) -> bool:
    """Whether the measurement's interval does not exclude the target."""
    low, high = value.measured_low, value.measured_high
    return low is not None and high is not None and low <= target.value <= high


def _is_left_open(targets: Sequence[Target], values: Sequence[TargetValue]) -> bool:
    """Whether a value is off its target by more than the tolerance, and only its interval does not exclude it."""
    return any(
        _is_open(target, value) and abs(_share(target, value) - 1) > _TOLERANCE
        for target, value in zip(targets, values, strict=True)
    )


def _met(targets: Sequence[Target], found: TargetRound) -> bool:
    """Whether each target is met within the tolerance, or its interval leaves that open. Bytes have no tolerance."""
    return all(
        _share(target, value) <= 1 + (_TOLERANCE if target.is_timed else 0) or _is_open(target, value)
        for target, value in zip(targets, found.values, strict=True)
    )


def _close(targets: Sequence[Target], found: TargetRound) -> bool:
    """Whether all is met and the tightest target is not met by far more than is asked for."""
    pairs = list(zip(targets, found.values, strict=True))
    target, value = max(pairs, key=lambda pair: _share(*pair))
    return _met(targets, found) and (_share(target, value) >= 1 - _TOLERANCE or _is_open(target, value))


def _correction(target: Target, value: TargetValue) -> float:
    return _share(target, value) / target.share(value.predicted)


def _best(targets: Sequence[Target], rounds: Sequence[TargetRound]) -> int:
    def order(number: int) -> tuple[bool, float]:
        found = rounds[number]
        met = _met(targets, found)
        worst = max(_share(target, value) for target, value in zip(targets, found.values, strict=True))
        return not met, found.predicted_damage if met else worst

    return min(range(len(rounds)), key=order)
