"""The pruning plan: what is removed from each layer, as files a person can read, edit and apply again.

``plan.json`` holds the decisions, one line per layer; ``plan.safetensors`` beside it holds every neuron's importance,
so that a width can be changed by hand without new calibration, and hashes of passages of the text that was read, so
that it is known again (see :mod:`toolchain.text.fingerprints`). A plan is never mutated. No torch here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from toolchain.architecture.layout import LayerLayout
from toolchain.documents import read_document
from toolchain.errors import SenteiError, reason_of
from toolchain.json_files import read_json
from toolchain.outputs import whole_file, write_text
from toolchain.plan.document import (
    SCHEMA_VERSION,
    BlockStep,
    CompensationRecord,
    PlanDocument,
    PlannedLayer,
    Removal,
    Rung,
    document_to_json,
    upgraded,
)
from toolchain.plan.sweep_document import SWEEP_FILE, SweepDocument
from toolchain.safetensors_files import check_header_size

PLAN_FILE, SCORES_FILE = "plan.json", "plan.safetensors"
_READ_VERSIONS = (1, SCHEMA_VERSION)
_HASHES = "text_hashes."
_LONGEST_NAME = 200
# What text was read for.
ReadIn = Literal["calibration", "healing"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A point at which pruning can stop.

    Attributes:
        number: 0 is the original model.
        label: What this step did.
        num_block_parameters: Left in the decoder blocks.
        metric: After the step.
    """

    number: int
    label: str
    num_block_parameters: int
    metric: float


@dataclass(frozen=True)
class PruningPlan:
    """A plan and the scores behind it.

    Attributes:
        document: ``plan.json``.
        importance: One float32 array ``[intermediate_size of the base model]`` per layer; higher is kept. Empty where
            the scores do not lie beside the document, as in exports.
        text_hashes: Of the text read in ``calibration`` and ``healing``, as far as known; see
            :func:`toolchain.text.fingerprints.hash_passages`.
    """

    document: PlanDocument
    importance: tuple[NDArray[np.float32], ...]
    text_hashes: Mapping[ReadIn, NDArray[np.uint64]] = field(default_factory=dict)

    @property
    def layout(self) -> tuple[LayerLayout, ...]:
        """The shape of each layer after pruning."""
        return tuple(
            LayerLayout(attention=layer.attention == "keep", intermediate_size=layer.intermediate_size)
            for layer in self.document.layers
        )

    @property
    def narrows(self) -> bool:
        """Whether any FFN is narrower than the base model's."""
        return any(
            layer.intermediate_size < self.document.base_model.intermediate_size for layer in self.document.layers
        )

    @property
    def kept_neurons(self) -> tuple[NDArray[np.int64], ...]:
        """Indices of the kept neurons of each layer, ascending; only of a plan with its scores."""
        assert self.importance, "the plan was loaded without its scores"
        return tuple(
            top_neurons(scores, layer.intermediate_size)
            if layer.kept_neurons is None
            else np.sort(np.asarray(layer.kept_neurons, dtype=np.int64))
            for layer, scores in zip(self.document.layers, self.importance, strict=True)
        )

    @property
    def removed_attention(self) -> tuple[int, ...]:
        """Layers without attention: first in the order the search removed them, then those removed by hand."""
        removed = [layer.layer for layer in self.document.layers if layer.attention == "remove"]
        searched = [step.removed for step in self.document.trace if step.removed in removed]
        return (*searched, *(layer for layer in removed if layer not in searched))

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every point at which pruning can stop, the original first."""
        document = self.document
        points: list[tuple[str, Rung | Removal | BlockStep]] = [(_rung_label(rung), rung) for rung in document.stage_1]
        points += [(f"attention {step.removed} removed", step) for step in document.trace]
        points += zip(_block_labels(document.block_steps), document.block_steps, strict=True)
        original = Step(
            number=0,
            label="original",
            num_block_parameters=document.base_model.num_block_parameters,
            metric=document.metric_original,
        )
        return (
            original,
            *(
                Step(
                    number=number,
                    label=label,
                    num_block_parameters=point.num_block_parameters,
                    metric=point.metric,
                )
                for number, (label, point) in enumerate(points, 1)
            ),
        )

    def cut(self, step: int) -> "PruningPlan":
        """The plan as it was after ``step`` of :attr:`steps`; edits by hand are not carried over.

        Raises:
            SenteiError: There is no such step.
        """
        document = self.document
        last = len(self.steps) - 1
        if not 0 <= step <= last:
            raise SenteiError(f"There is no step {step}.", f"This plan has steps 0 to {last}; see sentei plan curve.")
        if document.block_steps:
            return self.at([], [], document.block_steps[:step])
        return self.at(document.stage_1[:step], document.trace[: max(0, step - len(document.stage_1))])

    def unhealed(self) -> "PruningPlan":
        """The same plan as it was before any healing."""
        return self.changed({"healing": []})

    def changed(self, changes: Mapping[str, Any]) -> "PruningPlan":
        """The same plan with other fields in its document; what it was healed with goes with the records of that."""
        document = self.document.model_copy(update=changes)
        hashes = {name: each for name, each in self.text_hashes.items() if name != "healing" or document.healing}
        return replace(self, document=document, text_hashes=hashes)

    def at(
        self, stage_1: Sequence[Rung], trace: Sequence[Removal], block_steps: Sequence[BlockStep] = ()
    ) -> "PruningPlan":
        """The same plan after other steps, not healed: widths of the last rung, attentions of the trace removed.

        Of a method that removes whole attentions and FFNs, what its last step says.
        """
        base = self.document.base_model
        widths = stage_1[-1].intermediate_size if stage_1 else [base.intermediate_size] * base.num_hidden_layers
        removed = {step.removed for step in trace}
        if block_steps:
            removed |= set(block_steps[-1].attention)
            widths = [0 if layer in block_steps[-1].ffn else width for layer, width in enumerate(widths)]
        layers = [
            PlannedLayer(layer=layer, attention="remove" if layer in removed else "keep", intermediate_size=width)
            for layer, width in enumerate(widths)
        ]
        changes: dict[str, Any] = {
            "stage_1": list(stage_1), "trace": list(trace), "block_steps": list(block_steps), "layers": layers,
            "healing": [],
        }  # fmt: skip
        if self.document.compensation is not None:
            changes["compensation"] = CompensationRecord()
        if self.document.limit is not None:
            changes["limit"] = self.document.limit.model_copy(update={"measured": None})
        return self.changed(changes)

    def summary(self) -> dict[str, Any]:
        """The plan for machines: what ``sentei plan show --json`` prints; without scores, kept neurons are null."""
        kept: Sequence[Any] = (
            [each.tolist() for each in self.kept_neurons]
            if self.importance
            else [layer.kept_neurons for layer in self.document.layers]
        )
        return {
            **self.document.model_dump(exclude={"layers", "stage_1", "trace", "block_steps"}),
            "metric_after_stage_1": self.document.metric_after_stage_1,
            "layers": [
                {**layer.model_dump(), "kept_neurons": neurons}
                for layer, neurons in zip(self.document.layers, kept, strict=True)
            ],
            "removed_attention": list(self.removed_attention),
            "stage_1": [rung.model_dump() for rung in self.document.stage_1],
            "trace": [step.model_dump(exclude_none=True) for step in self.document.trace],
            "block_steps": [step.model_dump(exclude_none=True) for step in self.document.block_steps],
        }

    def save(self, directory: Path) -> None:
        """Writes ``plan.safetensors`` and then ``plan.json`` into an existing directory, each whole or not at all.

        A process that is killed between the two leaves a plan that can be loaded: a search finds its scores before the
        first of its plans is saved, and they stay the same.
        """
        scores: dict[str, NDArray[Any]] = {f"importance.{layer}": each for layer, each in enumerate(self.importance)}
        scores |= {f"{_HASHES}{name}": each for name, each in self.text_hashes.items()}
        with whole_file(directory / SCORES_FILE) as partial:
            # Not by the library's save_file, which makes files that their owner alone may read.
            partial.write_bytes(save(scores))
        write_text(directory / PLAN_FILE, document_to_json(self.document))


def _rung_label(rung: Rung) -> str:
    low, high = min(rung.intermediate_size), max(rung.intermediate_size)
    return f"FFN narrowed to {low}" + (f"-{high}" if high > low else "")


def _block_labels(steps: Sequence[BlockStep]) -> list[str]:
    """What each step took away, and put back."""
    labels = []
    before: set[tuple[str, int]] = set()
    for step in steps:
        after = {("attention", layer) for layer in step.attention} | {("FFN", layer) for layer in step.ffn}
        gone, back = after - before, before - after
        labels.append(
            "; ".join(f"{_named(parts)} {what}" for parts, what in ((gone, "removed"), (back, "back")) if parts)
        )
        before = after
    return labels


def _named(parts: set[tuple[str, int]]) -> str:
    """Such as "blocks 3, 4 and FFN 7": whole blocks first, then what is only half of one."""
    layers: dict[str, list[int]] = {"block": [], "attention": [], "FFN": []}
    for part, layer in sorted(parts):
        whole = {("attention", layer), ("FFN", layer)} <= parts
        if not whole or part == "FFN":
            layers["block" if whole else part].append(layer)
    return " and ".join(
        f"{name}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        for name, numbers in layers.items()
        if numbers
    )


def top_neurons(scores: NDArray[np.float32], width: int) -> NDArray[np.int64]:
    """The ``width`` neurons with the highest scores, ascending; ties go to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:width]).astype(np.int64)


def load_plan(path: Path, *, needs_scores: bool = True) -> PruningPlan:
    """Loads and checks a plan.

    Args:
        path: ``plan.json``, or the directory that holds it.
        needs_scores: Whether a plan without its scores, such as an export carries, is refused.

    Raises:
        SenteiError: Missing, unreadable, of another schema version, inconsistent, or without scores that are needed.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise SenteiError(f"There is no plan at {file}.", "Give plan.json, or a directory that sentei prune wrote.")
    document = _read_document(file)
    scores = file.with_name(SCORES_FILE)
    if scores.is_file():
        return PruningPlan(document, *_load_arrays(scores, document))
    if needs_scores:
        raise SenteiError(
            f"{scores} is missing: it says which neurons are kept, and lies beside {PLAN_FILE} where sentei prune or "
            "apply wrote it; exports do not carry it.",
            "Give the directory of the pruned model.",
        )
    return PruningPlan(document, ())


def _read_document(file: Path) -> PlanDocument:
    raw = read_json(file)
    version = raw.get("schema_version") if isinstance(raw, Mapping) else None
    if version not in _READ_VERSIONS:
        raise SenteiError(
            f"{file}: schema_version is {version!r}, and this sentei reads {' and '.join(map(str, _READ_VERSIONS))}.",
            "Prune again, or use the sentei that wrote it.",
        )
    try:
        # From JSON, not from the parsed object: there the integer keys of `candidates` may be strings.
        document = PlanDocument.model_validate_json(json.dumps(upgraded(raw)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SenteiError(f"{file}: {where}: {first['msg']}.") from error
    _check_layers(file, document)
    _check_steps(file, document)
    return document


def load_sweep(directory: Path) -> dict[str, PruningPlan] | None:
    """The plans of a sweep by directory, from the least sparsity on; ``None`` if ``directory`` holds no sweep.

    They may be without scores, see :func:`load_plan`.

    Raises:
        SenteiError: A plan of the sweep is missing or damaged.
    """
    file = directory / SWEEP_FILE
    if not file.is_file():
        return None
    names = [entry.directory for entry in read_document(file, SweepDocument).plans]
    if outside := [name for name in names if Path(name).name != name or name == ".." or len(name) > _LONGEST_NAME]:
        raise SenteiError(f"{file}: {outside[0]!r} is not a directory beside it.")
    if not names:
        raise SenteiError(f"{file} names no plans.")
    return {str(directory / name): load_plan(directory / name, needs_scores=False) for name in names}


def _check_layers(file: Path, document: PlanDocument) -> None:
    base = document.base_model
    if [layer.layer for layer in document.layers] != list(range(base.num_hidden_layers)):
        raise SenteiError(f"{file}: layers must list 0 to {base.num_hidden_layers - 1} once each, in order.")
    for layer in document.layers:
        where = f"{file} layer {layer.layer}"
        if layer.intermediate_size > base.intermediate_size:
            raise SenteiError(
                f"{where}: intermediate_size {layer.intermediate_size} exceeds {base.intermediate_size}.",
                "Lower it, or prune again.",
            )
        if layer.kept_neurons is not None:
            _check_kept(where, layer.kept_neurons, layer.intermediate_size, base.intermediate_size)


def _check_kept(where: str, kept: Sequence[int], width: int, base_width: int) -> None:
    if outside := [neuron for neuron in kept if not 0 <= neuron < base_width]:
        raise SenteiError(f"{where}: kept_neurons names neuron {outside[0]}; allowed are 0 to {base_width - 1}.")
    if repeated := [one for one, following in pairwise(sorted(kept)) if one == following]:
        raise SenteiError(f"{where}: kept_neurons names neuron {repeated[0]} more than once.")
    if len(kept) != width:
        raise SenteiError(f"{where}: kept_neurons has {len(kept)} entries, but intermediate_size is {width}.")


def _check_steps(file: Path, document: PlanDocument) -> None:
    """Checks that every step of the search is about layers and widths that there are."""
    base = document.base_model
    layers = range(base.num_hidden_layers)
    for rung in document.stage_1:
        if len(rung.intermediate_size) != len(layers) or not _within(rung.intermediate_size, base.intermediate_size):
            raise SenteiError(
                f"{file}: stage_1 must list {len(layers)} widths from 0 to {base.intermediate_size} in each step."
            )
    named = [step.removed for step in document.trace]
    named += [layer for step in document.block_steps for layer in (*step.attention, *step.ffn)]
    if not _within(named, len(layers) - 1):
        raise SenteiError(f"{file}: trace or block_steps name a layer that is not among 0 to {len(layers) - 1}.")
    if len({step.removed for step in document.trace}) != len(document.trace):
        raise SenteiError(f"{file}: trace removes the attention of a layer twice.")


def _within(numbers: Sequence[int], highest: int) -> bool:
    return all(0 <= number <= highest for number in numbers)


def _load_arrays(
    file: Path, document: PlanDocument
) -> tuple[tuple[NDArray[np.float32], ...], dict[ReadIn, NDArray[np.uint64]]]:
    """Importance by layer, and hashes by what the text was for."""
    base = document.base_model
    check_header_size(file)
    try:
        tensors = load_file(file)
    # Of a dtype that numpy does not have.
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SenteiError(f"{file} is damaged ({reason_of(error)}).", "Copy it again.") from error
    scores = []
    for layer in range(base.num_hidden_layers):
        array = tensors.get(f"importance.{layer}")
        if array is None or array.shape != (base.intermediate_size,) or array.dtype != np.float32:
            raise SenteiError(f"{file}: importance.{layer} must be float32 [{base.intermediate_size}].")
        if not np.isfinite(array).all():
            raise SenteiError(f"{file}: importance.{layer} holds NaN or Inf.", "Prune again.")
        scores.append(array)
    hashes: dict[ReadIn, NDArray[np.uint64]] = {
        name: tensors[f"{_HASHES}{name}"] for name in get_args(ReadIn) if f"{_HASHES}{name}" in tensors
    }
    for name, each in hashes.items():
        if each.ndim != 1 or each.dtype != np.uint64:
            raise SenteiError(f"{file}: {_HASHES}{name} must be uint64 [number of hashes].")
    return tuple(scores), hashes
