"""From the files' numbers to the sentences and tables of the report. No HTML here but the charts' fragments."""

import math
from collections.abc import Mapping
from typing import Any

from serving.report import removal_charts as charts
from serving.report.decision import decision_view
from serving.report.format import flatten, format_bytes, format_change, format_count, format_ratio
from serving.report.inputs import ReportInputs
from serving.report.quality import evaluation_view
from serving.report.speed import benchmark_view
from serving.report.translate import Say
from serving.saved_json import Source, fields_of
from toolchain.plan.bought import bought, timed
from toolchain.plan.document import PlanDocument
from toolchain.plan.target_record import TargetRecord, TargetValue
from toolchain.plan.views import sources_of
from toolchain.significance import normal_margin


def build_view(inputs: ReportInputs, say: Say) -> dict[str, Any]:
    """Everything the template prints.

    Raises:
        SenteiError: A file lacks fields.
        MissingDependencyError: plotly is not installed.
    """
    document = inputs.plan.document if inputs.plan else None
    benchmarks = [benchmark_view(source, number, say) for number, source in enumerate(inputs.benchmarks)]
    quality = _quality(inputs, document, say)
    return {
        "title": _title(inputs, document, say),
        "decision": decision_view(inputs.verdict, say) if inputs.verdict else None,
        "size": _size(inputs),
        "quality": quality,
        "evaluated": bool(inputs.evaluations),
        "evaluation": evaluation_view(inputs.evaluations, say),
        "layers": _layers(inputs, say) if inputs.plan else None,
        "bought": _bought(document.target, say) if document and document.target else None,
        "trace": _trace(document, say) if document and document.trace else None,
        "benchmarks": benchmarks,
        "verifications": [_verification(source, say) for source in inputs.verifications],
        "provenance": _provenance(document, say) if document else None,
    }


def _title(inputs: ReportInputs, document: PlanDocument | None, say: Say) -> str:
    if inputs.verdict:
        return inputs.verdict.model
    if document:
        return document.base_model.name
    if inputs.summary:
        with fields_of(inputs.summary) as summary:
            return str(summary["original"]["name"])
    if inputs.benchmarks:
        with fields_of(inputs.benchmarks[0]) as results:
            return str(results["models"]["original"]["name"])
    return say("A pruned model")


def _size(inputs: ReportInputs) -> dict[str, Any] | None:
    """Stored weights before and after: from the checkpoint's summary, else from a benchmark."""
    if inputs.summary:
        with fields_of(inputs.summary) as summary:
            before, after = summary["original"], summary["pruned"]
            return {
                "original": format_bytes(before["weight_bytes"]),
                "pruned": format_bytes(after["weight_bytes"]),
                "change": format_change(after["weight_bytes"] / before["weight_bytes"]),
                "parameters": f"{format_count(before['num_parameters'])} → {format_count(after['num_parameters'])}",
                "sparsity": f"{100 * summary['sparsity']:.1f} %",
            }
    if inputs.benchmarks:
        with fields_of(inputs.benchmarks[0]) as results:
            weights = results["sizes"]["weight_bytes"]
            if weights["ratio"] is None:  # one server, measured alone
                return None
            return {
                "original": format_bytes(weights["original"]),
                "pruned": format_bytes(weights["pruned"]),
                "change": format_change(weights["ratio"]),
                "parameters": None,
                "sparsity": None,
            }
    return None


def _quality(inputs: ReportInputs, document: PlanDocument | None, say: Say) -> dict[str, Any] | None:
    """Perplexity before and after; text the plan was not made from comes first."""
    # Perplexities of a text compare only where both models read the same tokens of it.
    evaluated: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    warnings = []
    for source in inputs.evaluations:
        with fields_of(source) as content:
            warnings += [
                say(
                    "%(share)s of %(text)s was read in calibration or healing, where the model looks too good.",
                    share=f"{100 * overlap['share']:.3g} %", text=overlap["text"],
                )
                for overlap in content.get("text_overlaps", [])
                if overlap["share"]
            ]  # fmt: skip
            for entry in content["evaluations"]:
                read = (
                    str(entry["text"]),
                    *(entry.get(name) for name in ("text_sha256", "num_windows", "seq_len", "bos")),
                    bool(entry.get("chat_template")),
                )
                evaluated.setdefault(read, {})[entry["model"]] = {
                    "perplexity": _positive(entry["perplexity"]),
                    "standard_error": None if entry["standard_error"] is None else float(entry["standard_error"]),
                    **{name: int(entry[name]) for name in ("num_windows", "seq_len", "num_tokens")},
                }
    bars: list[tuple[str, float, float | None]] = []
    texts = [_evaluated(read[0], sides) for read, sides in evaluated.items() if {"original", "pruned"} <= set(sides)]
    warnings += [
        say("The two models read %(text)s in different ways, so its perplexities are not compared.", text=text)
        for text in _read_differently(evaluated)
    ]
    if texts:
        first = texts[0]
        bars = [
            (say(side), first[side]["perplexity"], first[side]["standard_error"]) for side in ("original", "pruned")
        ]
    calibration = _calibration_perplexity(inputs, document)
    if not bars and calibration:
        bars = [(say(name.replace("_", " ")), value, None) for name, value in calibration.items()]
    if not bars:
        return None
    before, after = bars[0][1], bars[-1][1]
    judged = _judged(inputs, texts[0]) if texts else None
    return {
        "original": f"{before:.4g}",
        "pruned": f"{after:.4g}",
        "ratio": f"{after / before:.2f}",
        "change": format_change(after / before),
        "verdict": judged["verdict"] if judged else "worse" if after > before else "better",
        "interval": judged and judged["interval"] and _times_interval(judged["interval"], say),
        "calibrated": not texts or bool(document and texts[0]["text"] == document.calibration.source),
        "text": texts[0]["text"] if texts else None,
        "texts": texts,
        "warnings": warnings,
        "calibration": {name: f"{value:.4g}" for name, value in (calibration or {}).items()},
        "chart": charts.perplexity_chart(bars, say),
        "bars": ", ".join(f"{label}: {value:.4g}" for label, value, _ in bars),
    }


def _read_differently(evaluated: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> list[str]:
    """Texts that both models read, but never the same tokens of them."""
    sides: dict[str, list[set[str]]] = {}
    for read, by_side in evaluated.items():
        sides.setdefault(read[0], []).append(set(by_side))
    return [
        text
        for text, found in sides.items()
        if len(found) > 1 and set.union(*found) == {"original", "pruned"} and max(map(len, found)) == 1
    ]


def _positive(perplexity: Any) -> float:
    if not (isinstance(perplexity, (int, float)) and perplexity > 0):
        raise ValueError(f"perplexity is {perplexity!r}")
    return float(perplexity)


def _evaluated(text: str, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    original, pruned = sides["original"], sides["pruned"]
    return {
        "text": text,
        "original": original,
        "pruned": pruned,
        "change": format_change(pruned["perplexity"] / original["perplexity"]),
    }


def _judged(inputs: ReportInputs, text: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether perplexity changed by more than chance: by the paired test of the evaluation, else by standard errors.

    Returns:
        ``verdict`` and ``interval``, of the ratio pruned/original; ``None`` where neither is known.
    """
    for source in reversed(inputs.evaluations):  # as the perplexities shown, which are those of the last
        with fields_of(source) as content:
            for each in content.get("text_comparisons") or []:
                change = each["perplexity_ratio"]
                if each["text"] == text["text"] and change["low"] is not None:
                    return {"verdict": change["verdict"], "interval": (change["low"], change["high"])}
    sides = [text[side] for side in ("original", "pruned")]
    if any(not each["standard_error"] for each in sides):
        return None
    # Unpaired, and so wider than the paired interval that is not there.
    error = math.sqrt(sum((each["standard_error"] / each["perplexity"]) ** 2 for each in sides))
    center, margin = math.log(sides[1]["perplexity"] / sides[0]["perplexity"]), normal_margin(error)
    low, high = math.exp(center - margin), math.exp(center + margin)
    verdict = "worse" if low > 1 else "better" if high < 1 else "no difference shown"
    return {"verdict": verdict, "interval": (low, high)}


def _times_interval(interval: tuple[float, float], say: Say) -> str:
    low, high = (format_ratio(each) if abs(each - 1) > 0.05 else f"{each:.3f}" for each in interval)
    return say("%(low)sx to %(high)sx", low=low, high=high)


def _calibration_perplexity(inputs: ReportInputs, document: PlanDocument | None) -> dict[str, float] | None:
    if document and document.healing:
        return None  # it is from before the healing
    if inputs.summary:
        with fields_of(inputs.summary) as summary:
            values = summary["calibration_metric"]
            known = {name: values[name] for name in ("original", "after_stage_1", "pruned")}
            if values["name"] == "perplexity" and known["original"] and known["pruned"]:
                return {name: float(value) for name, value in known.items() if value is not None}
    if document and document.metric == "perplexity":
        return {"original": document.metric_original, "pruned": document.metric_at_end}
    return None


def _layers(inputs: ReportInputs, say: Say) -> dict[str, Any]:
    assert inputs.plan is not None
    layout, base = inputs.plan.layout, inputs.plan.document.base_model
    widths = [layer.intermediate_size for layer in layout]
    return {
        "chart": charts.layers_chart(layout, base.intermediate_size, say),
        "num_layers": len(layout),
        "removed_attention": list(inputs.plan.removed_attention),
        "width_range": f"{min(widths)}"
        if min(widths) == max(widths)
        else say("%(low)s to %(high)s", low=min(widths), high=max(widths)),
        "original_width": base.intermediate_size,
        "ffn_kept": f"{100 * sum(widths) / (base.intermediate_size * len(layout)):.1f} %",
        "two_removals": _two_removals(inputs.summary, say) if inputs.summary else None,
    }


def _two_removals(source: Source, say: Say) -> dict[str, Any] | None:
    """What removing attentions would have cost and gained, where none was removed and that was measured."""
    with fields_of(source) as summary:
        if (found := summary.get("two_removals")) is None:
            return None
        kv, fewer_kv = (found[f"kv_bytes_per_token_{how}_removals"] for how in ("without", "with"))
        return {
            "count": len(found["layers"]),
            "kv": format_bytes(kv),
            "fewer_kv": format_bytes(fewer_kv),
            "change": format_change(fewer_kv / kv),
            "read": format_bytes(found["decode_weight_bytes_without_removals"]),
            "other_read": format_bytes(found["decode_weight_bytes_with_removals"]),
            "metric": say(found["metric"] if found["metric"] in ("perplexity", "kl") else "metric"),
            "before": f"{found['metric_without_removals']:.4g}",
            "after": f"{found['metric_with_removals']:.4g}",
        }


def _bought(target: TargetRecord, say: Say) -> dict[str, Any] | None:
    """What was asked for, predicted and measured, and what each kind of part costs before and after."""
    parts = bought(target)
    if not parts or target.followed is None:
        return None
    names = {"outside": say("outside of the layers"), "attention": say("attentions"), "ffn": say("FFN neurons")}
    return {
        "served": target.served,
        "met": target.met,
        "left_open": target.left_open,
        "values": [
            {
                "asked": value.asked,
                **{
                    name: _with_interval(value, name) if getattr(value, name) is not None else say("not measured")
                    for name in ("predicted", "measured")
                },
            }
            for value in target.followed.values
        ],
        "timed": timed(target),
        "parts": [
            {
                "name": names[each.part],
                "count": "" if each.part == "outside" else f"{each.count_before:,} → {each.count_after:,}",
                "ms": f"{each.ms_before:.4g} → {each.ms_after:.4g}",
                "kv": f"{each.kv_before:,.0f} → {each.kv_after:,.0f}",
                "damage": f"{each.damage:.3g}" if each.damage else "",
                "ms_per_nat": "" if each.ms_per_nat is None else f"{each.ms_per_nat:.3g}",
                "kv_per_nat": f"{each.kv_per_nat:,.0f}" if each.kv_per_nat else "",
            }
            for each in parts
        ],
    }


def _with_interval(value: TargetValue, name: str) -> str:
    low, high = getattr(value, f"{name}_low"), getattr(value, f"{name}_high")
    interval = "" if low is None else f" ({low:.4g}–{high:.4g})"
    return f"{getattr(value, name):.4g} {value.unit}{interval}"


def _trace(document: PlanDocument, say: Say) -> dict[str, Any]:
    steps = [(say("original"), document.metric_original), (say("FFN narrowed"), document.metric_after_stage_1)]
    steps += [(say("attention %(layer)s", layer=step.removed), step.metric) for step in document.trace]
    # A metric function's name is a person's text, and Plotly reads markup in labels.
    known = document.metric if document.metric in ("perplexity", "kl", "accuracy") else "metric"
    return {
        "chart": charts.trace_chart(steps, say(known), say),
        "steps": [(label, f"{value:.5g}") for label, value in steps],
        "text": ", ".join(f"{label}: {value:.5g}" for label, value in steps),
    }


def _verification(source: Source, say: Say) -> dict[str, Any]:
    with fields_of(source) as content:
        shown = {key: value for key, value in content.items() if key not in ("schema_version", "kind", "passed")}
        # The prompts themselves can be long, and are not what a reader of the report looks for.
        fields = [(key, value) for key, value in flatten(shown, say) if len(value) <= 300]
        return {"where": source.path.parent.name, "passed": bool(content["passed"]), "fields": fields}


def _provenance(document: PlanDocument, say: Say) -> list[tuple[str, str]]:
    calibration = document.calibration
    target = document.target_sparsity
    sparsity = say("none: edited by hand") if target is None else f"{100 * target:g} %"
    windows = say("%(count)s of %(length)s tokens", count=calibration.num_samples, length=calibration.seq_len)
    return [
        (say("method"), document.described_method),
        (say("target sparsity of the decoder blocks"), sparsity),
        (say("widths are multiples of"), str(document.align)),
        (say("calibration text"), "; ".join(sources_of(calibration))),
        (say("calibration windows"), windows),
        (say("calibration token ids, SHA-256"), calibration.sha256),
        (say("weights of the original, SHA-256"), document.base_model.weights_sha256),
        (say("computed in"), document.dtype),
        (say("seed"), str(document.seed)),
        ("sentei", document.sentei_version),
        *sorted(document.versions.items()),
    ]
