"""What plans say when asked: how two differ, and why a layer is as it is."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from toolchain.errors import SenteiError
from toolchain.plan.bought import bought_of_layer, timed
from toolchain.plan.document import CalibrationRecord, PlanDocument, Removal
from toolchain.plan.plan import PruningPlan

_FOUND = {"layers", "stage_1", "trace", "block_steps"}


def difference(first: PruningPlan, second: PruningPlan) -> dict[str, Any]:
    """Where two plans for the same model differ.

    Returns:
        ``settings`` (name → the two values), ``layers`` (one entry a layer that differs: ``attention`` and
        ``intermediate_size`` as pairs, and ``neurons_kept_by_both``) and, as pairs, ``num_block_parameters`` and
        ``metric`` after the last step of each.

    Raises:
        SenteiError: The plans are for different models.
    """
    one, other = first.document, second.document
    if one.base_model.weights_sha256 != other.base_model.weights_sha256:
        raise SenteiError(f"The plans are for different models, {one.base_model.name} and {other.base_model.name}.")
    before, after = one.model_dump(exclude=_FOUND), other.model_dump(exclude=_FOUND)
    layers = []
    for a, b, kept_a, kept_b in zip(one.layers, other.layers, first.kept_neurons, second.kept_neurons, strict=True):
        if a.attention != b.attention or not np.array_equal(kept_a, kept_b):
            layers.append(
                {
                    "layer": a.layer,
                    "attention": [a.attention, b.attention],
                    "intermediate_size": [a.intermediate_size, b.intermediate_size],
                    "neurons_kept_by_both": len(np.intersect1d(kept_a, kept_b)),
                }
            )
    return {
        "settings": {name: [before[name], after[name]] for name in before if before[name] != after[name]},
        "layers": layers,
        "num_block_parameters": [plan.steps[-1].num_block_parameters for plan in (first, second)],
        "metric": [plan.steps[-1].metric for plan in (first, second)],
    }


def sources_of(calibration: CalibrationRecord) -> list[str]:
    """The texts of a calibration, each of a mixture with its windows and weight."""
    if len(calibration.sources) < 2:
        return [calibration.source]
    return [f"{each.source} ({each.num_windows} windows, weight {each.weight:.3g})" for each in calibration.sources]


def reasons(plan: PruningPlan, layer: int) -> dict[str, Any]:
    """What the search saw of a layer.

    Returns:
        ``attention``: ``decision``, ``protected``, and ``steps``, one entry a step the layer was a candidate in: the
        ``metric`` its removal would have left, its ``rank`` among ``num_candidates``, and what was ``removed`` instead
        with the metric ``best``; a candidate that lost a race early has the metric on ``num_tokens`` tokens, and one
        that shared the best metric with others a ``tie``: its ``perplexity``, and the ``best`` one, which decided.
        ``blocks``: what a method that removes whole attentions and FFNs gave those of the layer in its first step, as
        far as it looks at them one by one; ``None`` for 2SSP.
        ``ffn``: ``intermediate_size`` of ``full``, ``protected``, ``importance_kept`` (the kept neurons' share of the
        layer's summed squared scores), ``least_kept`` and ``most_removed`` (scores; ``None`` where there is none).
        ``bought``: where the plan was made for a target, which time is meant (``timed``) and, for the layer's
        ``attention`` and ``ffn``, what :class:`toolchain.plan.bought.Bought` has, with ``ms_per_nat`` and
        ``kv_per_nat``; else ``None``.

    Raises:
        SenteiError: There is no such layer.
    """
    document = plan.document
    if not 0 <= layer < len(document.layers):
        raise SenteiError(f"There is no layer {layer}.", f"This model has layers 0 to {len(document.layers) - 1}.")
    kept, scores = plan.kept_neurons[layer], plan.importance[layer].astype(np.float64)
    removed = np.setdiff1d(np.arange(len(scores)), kept)
    energy = float((scores**2).sum())
    return {
        "layer": layer,
        "metric": document.metric,
        "attention": {
            "decision": document.layers[layer].attention,
            "protected": layer in document.protected.attention,
            "steps": [seen for number, step in enumerate(document.trace, 1) if (seen := _seen(number, step, layer))],
        },
        "blocks": _first_look(document, layer),
        "ffn": {
            "intermediate_size": len(kept),
            "full": len(scores),
            "protected": layer in document.protected.ffn,
            "importance_kept": float((scores[kept] ** 2).sum()) / energy if energy else 1.0,
            "least_kept": float(scores[kept].min()) if len(kept) else None,
            "most_removed": float(scores[removed].max()) if len(removed) else None,
        },
        "bought": _bought(document, layer, len(kept)),
    }


def _bought(document: PlanDocument, layer: int, width: int) -> dict[str, Any] | None:
    target = document.target
    if target is None or target.followed is None or layer >= len(target.followed.ffn_damage):
        return None
    attends = document.layers[layer].attention == "keep"
    found = bought_of_layer(
        target, layer, width=width, attends=attends, damage=0.0 if attends else _nats_of(document, layer)
    )
    return {
        "timed": timed(target),
        "served": target.served,
        **{each.part: {**asdict(each), "ms_per_nat": each.ms_per_nat, "kv_per_nat": each.kv_per_nat} for each in found},
    }


def _nats_of(document: PlanDocument, layer: int) -> float:
    """What the search saw the removal of an attention do, after those before it; 0 where it saw none."""
    before = document.metric_after_stage_1
    for step in document.trace:
        if step.removed == layer:
            # Other metrics are differences already, or no nats: what they changed by stands for the damage.
            return math.log(step.metric / before) if document.metric == "perplexity" else abs(step.metric - before)
        before = step.metric
    return 0.0


def _first_look(document: PlanDocument, layer: int) -> dict[str, float] | None:
    if not document.block_steps:
        return None
    candidates = document.block_steps[0].candidates or {}
    return {name: score for name, score in candidates.items() if name.split()[-1].split("-")[0] == str(layer)}


def _seen(number: int, step: Removal, layer: int) -> dict[str, Any] | None:
    dropped = step.dropped or {}
    common = {
        "step": number,
        "removed": step.removed,
        "best": step.metric,
        "num_candidates": len(step.candidates) + len(dropped),
    }
    if layer in dropped:
        lost = dropped[layer]
        lost_early = {"metric": lost.metric, "best": lost.best, "num_tokens": lost.num_tokens, "rank": None}
        return {**common, **lost_early, "tie": None}
    if layer not in step.candidates:
        return None
    # Best first, whichever way the metric goes: the candidate that was removed is the best.
    distance = {each: abs(value - step.metric) for each, value in step.candidates.items()}
    rank = 1 + sum(value < distance[layer] for value in distance.values())
    ties = step.ties or {}
    tie = {"perplexity": ties[layer], "best": ties[step.removed]} if layer in ties else None
    return {**common, "metric": step.candidates[layer], "num_tokens": None, "rank": rank, "tie": tie}
