"""What a plan says of the target that it was made for: asked, predicted, measured."""

from typing import Self

from pydantic import Field, model_validator

from toolchain.documents import Record


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
    """A shape that was solved for and measured, with the damage predicted for it, in nats per token."""

    intermediate_size: list[int]
    removed_attention: list[int]
    predicted_damage: float
    values: list[TargetValue]


class TargetRecord(Record):
    """The target that widths and the number of attentions were chosen for, and how near they come to it.

    ``costs_sha256`` is over ``costs.json``; ``served`` says in words what it was measured with, and under which load.
    ``rounds`` are in the order in which they were tried, ``taken`` is the number of the one that the plan follows (from
    0; null until it is known), and ``met`` says whether its measurements are within 3 % of the target or leave it open.
    """

    asked: list[str]
    costs_sha256: str
    served: str
    rounds: list[TargetRound] = Field(default_factory=list)
    taken: int | None = Field(default=None, ge=0)
    met: bool | None = None

    @model_validator(mode="after")
    def _taken_is_there(self) -> Self:
        if self.taken is not None and self.taken >= len(self.rounds):
            raise ValueError("taken is the number of none of the rounds")
        return self

    @property
    def followed(self) -> TargetRound | None:
        """The round that the plan follows; ``None`` until it is known."""
        return None if self.taken is None else self.rounds[self.taken]
