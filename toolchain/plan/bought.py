"""What a plan for a target bought with what: time and memory of each part, and the damage that it was saved for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from toolchain.plan.target_record import TargetRecord

KV = "kv_bytes_per_token"
# Of the times, the one that the first of these targets is about; the throughput's where memory alone was asked for.
_TIMES = {"ttft": "ttft_ms", "tpot": "tpot_ms"}
_THROUGHPUT = "ms_per_output_token"
Part = Literal["outside", "attention", "ffn"]


@dataclass(frozen=True, kw_only=True)
class Bought:
    """One kind of part of the whole model, before and after.

    Attributes:
        part: What belongs to no layer, all attentions, or all FFNs.
        count_before: Attentions, or neurons of all FFNs; 1 for what belongs to no layer.
        count_after: Likewise.
        ms_before: What it costs, of :func:`timed`.
        ms_after: Likewise.
        kv_before: Bytes of KV cache per token.
        kv_after: Likewise.
        damage: Predicted, in nats per token, before compensation; 0 for what belongs to no layer.
    """

    part: Part
    count_before: int
    count_after: int
    ms_before: float
    ms_after: float
    kv_before: float
    kv_after: float
    damage: float

    @property
    def ms_per_nat(self) -> float | None:
        """Milliseconds saved for each nat; ``None`` where nothing was given for them."""
        return (self.ms_before - self.ms_after) / self.damage if self.damage > 0 else None

    @property
    def kv_per_nat(self) -> float | None:
        """Bytes of KV cache per token saved for each nat; ``None`` likewise."""
        return (self.kv_before - self.kv_after) / self.damage if self.damage > 0 else None


def timed(target: TargetRecord) -> str:
    """The time that is shown: that of the first target which is about one, ``ttft_ms`` for instance."""
    names = [each.partition("=")[0] for each in target.asked if not each.startswith("memory")]
    return _TIMES.get(names[0], _THROUGHPUT) if names else _THROUGHPUT


def bought(target: TargetRecord) -> list[Bought]:
    """The parts of the whole model; empty until the target has a shape."""
    followed = target.followed
    if followed is None:
        return []
    widths, full = followed.intermediate_size, _full(target)
    layers, kept = len(widths), len(widths) - len(followed.removed_attention)
    attention, whole, narrowed = _attention(target), _ffns(target, [full] * len(widths)), _ffns(target, widths)
    outside = target.costs[timed(target)].outside
    return [
        Bought(part="outside", count_before=1, count_after=1, ms_before=outside, ms_after=outside, kv_before=0.0,
               kv_after=0.0, damage=0.0),
        Bought(part="attention", count_before=layers, count_after=kept, ms_before=layers * attention[0],
               ms_after=kept * attention[0], kv_before=layers * attention[1], kv_after=kept * attention[1],
               damage=followed.attention_damage),
        Bought(part="ffn", count_before=layers * full, count_after=sum(widths), ms_before=whole, ms_after=narrowed,
               kv_before=0.0, kv_after=0.0, damage=sum(followed.ffn_damage)),
    ]  # fmt: skip


def bought_of_layer(target: TargetRecord, layer: int, *, width: int, attends: bool, damage: float) -> list[Bought]:
    """The attention and the FFN of one layer of a plan, which may have been edited since.

    Args:
        target: With a shape.
        layer: Number of the layer.
        width: What its FFN keeps.
        attends: Whether its attention is kept.
        damage: What the removal of its attention did, in nats per token; 0 if it is kept.
    """
    followed = target.followed
    assert followed is not None, "a plan for a target follows a shape"
    attention = _attention(target)
    ms, kv = attention if attends else (0.0, 0.0)
    full = _full(target)
    same = width == followed.intermediate_size[layer]
    return [
        Bought(part="attention", count_before=1, count_after=int(attends), ms_before=attention[0], ms_after=ms,
               kv_before=attention[1], kv_after=kv, damage=damage),
        Bought(part="ffn", count_before=full, count_after=width, ms_before=_ffns(target, [full]),
               ms_after=_ffns(target, [width]), kv_before=0.0, kv_after=0.0,
               damage=followed.ffn_damage[layer] if same else 0.0),
    ]  # fmt: skip


def _full(target: TargetRecord) -> int:
    return target.costs[timed(target)].widths[-1]


def _attention(target: TargetRecord) -> tuple[float, float]:
    """Milliseconds, and bytes of KV cache per token, of one attention."""
    return target.costs[timed(target)].attention, target.costs[KV].attention


def _ffns(target: TargetRecord, widths: Sequence[int]) -> float:
    """Milliseconds of FFNs of these widths."""
    return float(target.costs[timed(target)].parts.of_widths(widths).sum())
