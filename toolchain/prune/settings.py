"""What ``sentei prune`` was asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from toolchain.architecture.layout import LayerLayout
from toolchain.costs.document import Costs
from toolchain.metrics.question_metrics import question_file
from toolchain.prune.budget.allocation import Protected
from toolchain.prune.budget.limits import LimitSettings
from toolchain.prune.budget.target import Measured, Target
from toolchain.prune.methods import METHODS, MethodName, PruningMethod
from toolchain.text.sources import TextSource, local_paths


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A target in place of a sparsity.

    Attributes:
        targets: All of them are to be met.
        costs: What each part of the model costs where it will be served.
        measure: Measures models of random weights there, given their layers by name, a directory to keep its work in,
            and what says whether a measurement is to be made as often again; returns times by name and quantity, one
            per repeat.
    """

    targets: Sequence[Target]
    costs: Costs
    measure: Callable[
        [Mapping[str, Sequence[LayerLayout]], Path, Callable[[Mapping[str, Measured]], bool]], Mapping[str, Measured]
    ]


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """What ``sentei prune`` was asked for.

    Attributes:
        sparsity: Fraction of decoder-block parameters to remove; 0 where ``aim`` says how far to go.
        method: One of :class:`toolchain.prune.methods.MethodName`. Those that remove blocks know no other setting than
            ``evopress_budget``, calibration and computing.
        calibration: Texts and their weights; none for the embedded text.
        num_samples: Calibration windows; stage 2 uses the first of each text.
        seq_len: Tokens a window.
        align: FFN widths on each rank are multiples of this; 1, on a single rank, gives the published widths.
        attention_removals: Overrides the published formula, whose ``alpha`` is another one for ranked widths.
        widths: Of the FFNs: ``uniform``, as published, or ``ranked``: gradients of the loss choose widths and neurons.
        protected: Layers left alone.
        search: ``exact``, or ``racing``: drop candidates that fall behind early.
        metric: Decides what is removed; see :func:`toolchain.metrics.choose.choose_metric`.
        chat_template: Ask the metric's questions through the model's chat template.
        limit: How much damage is accepted.
        limit_metric: What the limit looks at, if that is another metric.
        tensor_parallel: Ranks that a server will split each layer over.
        compensate: Re-fit the output projections of what is left; see :mod:`toolchain.prune.compensation`.
        evopress_budget: One of :data:`toolchain.prune.block_methods.evopress.BUDGETS`.
        as_served: Each window and question begins with BOS where the tokenizer puts it. Otherwise, as published, only
            where the family falls apart without it.
        offload: Keep one layer in memory instead of all.
        device: Computed on.
        spread: A model that this device cannot hold goes to all GPUs of this process.
        dtype: Computed in; the checkpoint keeps the model's own.
        aim: Widths and the number of attentions are chosen for a target.
        seed: Recorded and set; only EvoPress draws at random.
    """

    sparsity: float
    calibration: Sequence[TextSource]
    num_samples: int
    seq_len: int
    align: int
    attention_removals: int | None
    device: str
    dtype: torch.dtype
    seed: int
    method: str = MethodName.two_ssp.value
    widths: str = "uniform"
    protected: Protected = field(default_factory=Protected)
    search: str = "exact"
    metric: str = "perplexity"
    chat_template: bool = False
    limit: LimitSettings = field(default_factory=LimitSettings)
    limit_metric: str | None = None
    tensor_parallel: int = 1
    compensate: bool = False
    evopress_budget: str = "paper"
    as_served: bool = True
    aim: Aim | None = None
    offload: bool = False
    spread: bool = False

    @property
    def of_method(self) -> PruningMethod:
        """The method's line in the table."""
        return METHODS[self.method]

    @property
    def input_files(self) -> list[Path]:
        """Files and directories that texts, questions and costs are read from."""
        asked = [question_file(name) for name in (self.metric, self.limit_metric) if name]
        asked += [self.aim.costs.file] if self.aim else []
        return [*local_paths(source.text for source in self.calibration), *(file for file in asked if file)]
