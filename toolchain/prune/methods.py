"""The pruning methods: one table that says what each is made of and which options it knows. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class MethodName(StrEnum):
    """What ``--method`` takes."""

    two_ssp = "2ssp"
    shortgpt = "shortgpt"
    sliding_window = "sliding-window"
    blockpruner = "blockpruner"
    evopress = "evopress"


# What a person gets without --method; a name of comparisons alone, not of --method.
DEFAULT_NAME = "sentei"
# Only the two-stage search knows these; the methods that remove whole blocks take none of them.
_TWO_STAGE_OPTIONS = (
    "sweep", "target", "costs", "align", "tensor_parallel", "compensate", "attention_removals", "widths",
    "protect", "metric", "chat_template", "search", "max_degradation", "max_metric", "min_metric", "limit_metric",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """One pruning method.

    Attributes:
        name: What tables of results call it.
        settings: The fields of :class:`toolchain.prune.pipeline.PruneSettings` that make it this method.
        removes_blocks: Removes whole attentions and FFNs; otherwise it is the two-stage search.
        has_budget: ``--evopress-budget`` says how much it tries.
        unknown_options: Options that it refuses, whatever their value is.
        fixed_options: Options that it takes with this value alone.
        refusal: Begins the sentence that refuses an option, after ``--method NAME``; the option ends the sentence.
        way_out: What to do then.
    """

    name: str
    settings: Mapping[str, Any]
    removes_blocks: bool = False
    has_budget: bool = False
    unknown_options: tuple[str, ...] = ()
    fixed_options: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    way_out: str = ""


def _block_method(name: MethodName, *, has_budget: bool = False) -> PruningMethod:
    return PruningMethod(
        name=name.value,
        settings={"method": name.value},
        removes_blocks=True,
        has_budget=has_budget,
        unknown_options=_TWO_STAGE_OPTIONS,
        refusal="removes whole blocks as published and knows no",
        way_out="Leave it out, or prune with 2SSP.",
    )


_TABLE = (
    PruningMethod(
        name=MethodName.two_ssp.value,
        # The published code reads text without special tokens, whatever the tokenizer adds.
        settings={"method": MethodName.two_ssp.value, "as_served": False},
        unknown_options=("target", "costs"),
        fixed_options={"compensate": False, "widths": "uniform"},
        refusal="is the published method, which knows no",
        way_out="Leave one of them out.",
    ),
    # 2SSP, and what sentei adds to the published method.
    PruningMethod(
        name=DEFAULT_NAME,
        settings={"method": MethodName.two_ssp.value, "widths": "ranked", "compensate": True},
    ),
    _block_method(MethodName.shortgpt),
    _block_method(MethodName.sliding_window),
    _block_method(MethodName.blockpruner),
    _block_method(MethodName.evopress, has_budget=True),
)
METHODS: Mapping[str, PruningMethod] = {method.name: method for method in _TABLE}
DEFAULT = METHODS[DEFAULT_NAME]
