"""What a pruning summary says in words, for the terminal and the model card."""

from typing import Any

from toolchain.plan.bought import bought, timed
from toolchain.plan.target_record import TargetRecord

# What a kind of part is called.
NAMES = {"outside": "no layer's", "attention": "attentions", "ffn": "FFN neurons"}


def limit_in_words(limit: dict[str, Any]) -> str:
    """What was accepted, what there is, and on what it was measured.

    Args:
        limit: ``limit`` of ``pruning_summary.json``.
    """
    least = "at least" if limit["higher_is_better"] else "at most"
    model = "the written, compensated model" if limit["compensated"] else "the pruned model"
    where = f", on {limit['source']}" if limit["source"] else ""
    if count := limit["num_windows"]:
        where = f", on {count} window{'s' if count > 1 else ''} of {limit['text']} that decided nothing else"
    return (
        f"{limit['metric']} {least} {limit['value']:.4g}: {limit['original']:.4g} → {limit['measured']:.4g} of "
        f"{model}{where}"
    )


def target_in_words(target: dict[str, Any] | None) -> list[str]:
    """For each quantity that was asked for, what was predicted of the shape and what was measured.

    Args:
        target: ``target`` of ``pruning_summary.json``.
    """
    if target is None:
        return []
    missed = ""
    if not target["met"]:
        missed = f"; not met in {len(target['rounds'])} rounds, this is the nearest"
    elif target.get("left_open"):
        missed = "; the measurements scatter too much to tell whether that is met; a quieter machine would"
    return [
        f"{value['asked']}: predicted {_with_interval(value, 'predicted')}"
        + (f", measured {_with_interval(value, 'measured')}" if value.get("measured") is not None else "")
        + f" ({target['served']}){missed}"
        for value in target["rounds"][target["taken"]]["values"]
    ]


def bought_in_words(target: dict[str, Any] | None) -> list[str]:
    """What each kind of part costs before and after, and what was bought with what; aligned lines.

    Args:
        target: ``target`` of ``pruning_summary.json``.
    """
    if target is None:
        return []
    record = TargetRecord.model_validate(target)
    lines = []
    for each in bought(record):
        line = f"{NAMES[each.part]:<12} {each.ms_before:.4g} ms"
        if each.part != "outside":
            line = f"{NAMES[each.part]:<12} {each.count_before:,} → {each.count_after:,}: "
            line += f"{each.ms_before:.4g} → {each.ms_after:.4g} ms"
        if each.ms_per_nat is not None:
            kv = f" and {each.kv_per_nat:,.0f} KV bytes" if each.kv_per_nat else ""
            line += f", {each.damage:.3g} nats: {each.ms_per_nat:.3g} ms{kv} per nat"
        elif each.count_after < each.count_before:
            line += ", no damage"
        lines.append(line)
    return [f"by part, {timed(record)}; damage before compensation:", *lines] if lines else []


def _with_interval(value: dict[str, Any], kind: str) -> str:
    low, high = value[f"{kind}_low"], value[f"{kind}_high"]
    interval = "" if low is None else f" ({low:.4g} to {high:.4g})"
    return f"{value[kind]:.4g} {value['unit']}{interval}"


def two_removals_in_words(found: dict[str, Any]) -> str:
    """What removing two attentions would cost and gain.

    Args:
        found: ``two_removals`` of ``pruning_summary.json``.
    """
    kv, fewer_kv = (found[f"kv_bytes_per_token_{how}_removals"] for how in ("without", "with"))
    read, other = (found[f"decode_weight_bytes_{how}_removals"] for how in ("without", "with"))
    before, after = (found[f"metric_{how}_removals"] for how in ("without", "with"))
    return (
        f"no attention was removed: the KV cache takes {kv:,} bytes per token, as the original's. With "
        f"--attention-removals {len(found['layers'])}, at about the same sparsity: {fewer_kv:,} bytes per token "
        f"({fewer_kv / kv - 1:+.1%}), {read / 1e6:,.1f} → {other / 1e6:,.1f} MB of weights read per generated token, "
        f"{found['metric']} {before:.4g} → {after:.4g} before compensation"
    )
