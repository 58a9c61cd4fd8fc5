"""What a plan says of the target that it was made for: asked, predicted, measured, and what each part costs."""

from typing import Self

from pydantic import Field, model_validator

from toolchain.costs.parts import PartCosts
from toolchain.documents import Record

# Quantities of which every plan for a target has the costs.
SHOWN = ("ttft_ms", "ms_per_output_token", "kv_bytes_per_token")


class TargetValue(Record):
    """One quantity of a shape in ``unit`` (x, ms, tok/s or GiB), with its 95 % interval; null where there is none.

    ``measured`` is of models of random weights and this shape; null for memory, which is counted, and ``measured_low``
    and ``measured_high`` with it.
    """

    asked: str
    unit: str
    predicted: float
    predicted_low: float | None
    predicted_high: float | None
    measured: float | None = None
    measured_low: float | None = None
    measured_high: float | None = None


class TargetRound(Record):
    """A shape that was solved for and measured, with the damage predicted for it, in nats per token.

    ``ffn_damage`` and ``attention_damage`` are what narrower FFNs, layer by layer, and fewer attentions have of it.
    """

    intermediate_size: list[int]
    removed_attention: list[int]
    predicted_damage: float
    ffn_damage: list[float]
    attention_damage: float
    values: list[TargetValue]


class PartCostsRecord(Record):
    """What each part of the model costs, of one quantity; see :class:`toolchain.costs.parts.PartCosts`."""

    outside: float
    attention: float
    widths: list[int] = Field(min_length=1)
    ffn: list[float] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_cost_for_each_width(self) -> Self:
        if len(self.ffn) != len(self.widths) or sorted(set(self.widths)) != self.widths:
            raise ValueError("ffn is not the cost at each of the ascending widths")
        return self

    @property
    def parts(self) -> PartCosts:
        """For computing."""
        return PartCosts(outside=self.outside, attention=self.attention, widths=tuple(self.widths), ffn=tuple(self.ffn))


class TargetRecord(Record):
    """The target that widths and the number of attentions were chosen for, and how near they come to it.

    ``costs_sha256`` is over ``costs.json``; ``served`` says in words what it was measured with, and under which load.
    ``costs`` are its costs by quantity: milliseconds, ``weight_bytes`` and ``kv_bytes_per_token``.
    ``rounds`` are in the order in which they were tried, ``taken`` is the number of the one that the plan follows (from
    0; null until it is known), and ``met`` says whether its measurements are within 3 % of the target or leave it open:
    ``left_open`` if one of them is further off, and only its interval contains the target.
    """

    asked: list[str]
    costs_sha256: str
    served: str
    costs: dict[str, PartCostsRecord]
    rounds: list[TargetRound] = Field(default_factory=list)
    taken: int | None = Field(default=None, ge=0)
    met: bool | None = None
    left_open: bool = False

    @model_validator(mode="after")
    def _taken_is_there(self) -> Self:
        if self.taken is not None and self.taken >= len(self.rounds):
            raise ValueError("taken is the number of none of the rounds")
        if any(len(each.ffn_damage) != len(each.intermediate_size) for each in self.rounds):
            raise ValueError("ffn_damage has not a number for each layer")
        if missing := [name for name in SHOWN if name not in self.costs]:
            raise ValueError(f"costs have no {missing[0]}")
        return self

    @property
    def followed(self) -> TargetRound | None:
        """The round that the plan follows; ``None`` until it is known."""
        return None if self.taken is None else self.rounds[self.taken]
