"""The search: from a model and calibration text to a plan, in steps that can be limited, interrupted and resumed."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.metrics.token_metrics import Metric, PerplexityMetric, measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.slicing import KeptNeurons
from toolchain.plan.document import PlanDocument, Removal, Rung
from toolchain.plan.plan import PruningPlan, top_neurons
from toolchain.progress import Progress, no_progress
from toolchain.prune.budget.allocation import Allocation, BlockParameters, ladder
from toolchain.prune.budget.limits import holds, last_that_holds, resolve_limit, why_not, why_nothing
from toolchain.prune.budget.ranked_widths import ranked_widths
from toolchain.prune.search.attention import Tried, num_candidates, removals
from toolchain.prune.search.importance import neuron_importance
from toolchain.prune.search.sensitivity import Sensitivity, neuron_sensitivity
from toolchain.prune.window_sums import UNSHARED, Shared
from toolchain.ranks.ranks import ALONE, Ranks

# On the way to the target widths the metric is taken this often: the part of the curve that stage 1 walks.
_NUM_RUNGS = 4
# A window's gradients take three times its forward pass.
_NUM_SENSITIVITY_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class Search:
    """Everything a search needs besides its state, which is a plan.

    Attributes:
        walk: Over the unpruned model; pruned on the way.
        sizes: Of the unpruned model's blocks.
        windows: Calibration, int64 ``[num_samples, seq_len]``.
        metric: Decides what is removed.
        allocation: The split of the sparsity between attentions and FFNs; ``None`` where a target chose the shape.
        limit_metric: What the plan's limit looks at, if that is not ``metric``.
        tie_breaker: Decides among attentions whose removal leaves the same metric.
        ranks: Who shares the work; all of them come to the same plan.
        share: How the sums of a stage are divided among the ranks, and where they are kept; by the stage's name.
        save: Told of the plan after each step.
        progress: Told of windows, widths and candidates.
    """

    walk: LayerWalk
    sizes: BlockParameters
    windows: torch.Tensor
    metric: Metric
    allocation: Allocation | None = None
    limit_metric: Metric | None = None
    tie_breaker: PerplexityMetric | None = None
    ranks: Ranks = ALONE
    share: Callable[[str], Shared] = lambda stage: UNSHARED
    save: Callable[[PruningPlan], None] = lambda plan: None
    progress: Progress = no_progress

    def begin(self, blank: PlanDocument) -> PruningPlan:
        """Looks at the unpruned model: importance of its neurons, and its metric.

        Args:
            blank: Everything but what is measured here.

        Returns:
            A plan that removes nothing yet.
        """
        self._prepare()
        importance = self._ranked_importance() if blank.widths == "ranked" else self._importance(self.windows)
        original, limit = self._measured(self.metric), blank.limit
        if limit is not None:
            limit = resolve_limit(limit, self._limited(original))
        document = blank.model_copy(update={"metric_original": original, "limit": limit})
        plan = PruningPlan(document, importance).at([], [])
        self.save(plan)
        return plan

    def _importance(self, windows: torch.Tensor) -> tuple[NDArray[np.float32], ...]:
        with self.progress("Importance of neurons", len(windows)) as advance:
            return neuron_importance(self.walk, windows, shared=self.share("importance"), on_window=advance)

    def _ranked_importance(self) -> tuple[NDArray[np.float32], ...]:
        """Importance on all windows, those that gradients are taken on seen there, weighed by the gradients."""
        others = self.windows[_NUM_SENSITIVITY_WINDOWS:]
        importance = self.sensitivity.importance
        if len(others):
            share = len(others) / len(self.windows)
            pairs = zip(importance, self._importance(others), strict=True)
            importance = tuple(seen * np.float32(1 - share) + other * np.float32(share) for seen, other in pairs)
        return self.sensitivity.weigh(importance)

    def finish(self, plan: PruningPlan) -> PruningPlan:
        """Goes on from any plan the search has saved, to the target or to the limit.

        A plan that compensates goes to the target: the model without compensation would stop far too early. How far
        the limit lets the compensated one go is for :mod:`toolchain.prune.within_limit`.

        Raises:
            SenteiError: A metric is NaN or Inf, or cannot tell candidates apart.
        """
        self._prepare()
        limit = plan.document.limit
        if limit is not None and not holds(limit, limit.original):
            return plan.changed({"stopped_because": why_nothing(limit)})
        if not plan.document.target_intermediate_size:
            plan = self._aim(plan)
        if plan.document.stopped_because is None and not plan.document.trace:
            plan = self._narrow_ffns(plan)
        if plan.document.stopped_because is None:
            plan = self._remove_attentions(plan)
        if limit is None or plan.document.compensation is not None:
            return plan
        steps: list[Rung | Removal] = [*plan.document.stage_1, *plan.document.trace]
        measured = _limited(steps[-1]) if steps else limit.original
        return plan.changed({"limit": limit.model_copy(update={"measured": measured})})

    def _prepare(self) -> None:
        self.metric.prepare(self.walk)
        if self.limit_metric is not None:
            self.limit_metric.prepare(self.walk)

    def _measured(self, metric: Metric, *, without_attention: Sequence[int] = ()) -> float:
        """A metric, now. The first rank's word counts: another kind of processor may round in another way."""
        value = measure(self.walk, metric, without_attention=without_attention)
        return float(self.ranks.from_first(value)[0])

    def _limited(self, metric: float) -> float:
        """What the limit looks at, now; ``metric`` is the search's own."""
        return metric if self.limit_metric is None else self._measured(self.limit_metric)

    def _aim(self, plan: PruningPlan) -> PruningPlan:
        """Says how wide each FFN is to be and how many attentions go, as the plan's ``widths`` ask."""
        document, split = plan.document, self.allocation
        assert split is not None, "a plan without widths is of a sparsity"
        widths = split.widths
        if document.widths == "ranked":
            # Before any neuron is left out below: sensitivity is the unpruned model's.
            slope, protected = self.sensitivity.slope, frozenset(document.protected.ffn)
            widths = ranked_widths(slope, widths, document.align, protected)
        changes = {
            "target_intermediate_size": list(widths),
            "target_attention_removals": split.num_attention_removals,
        }
        plan = plan.changed(changes)
        self.save(plan)
        return plan

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Of the unpruned model's neurons; asked for before any is left out."""
        windows = self.windows[:_NUM_SENSITIVITY_WINDOWS]
        with self.progress("Sensitivity of neurons", len(windows)) as advance:
            return neuron_sensitivity(self.walk, windows, shared=self.share("gradients"), on_window=advance)

    def _narrow_ffns(self, plan: PruningPlan) -> PruningPlan:
        document = plan.document
        full, target = document.base_model.intermediate_size, tuple(document.target_intermediate_size)
        rung = ladder(full, target, document.align)
        last = document.stage_1[-1].intermediate_size if document.stage_1 else [full] * len(target)
        rungs = [rung(step, _NUM_RUNGS) for step in range(1, _NUM_RUNGS + 1)]
        todo = [widths for widths in rungs if sum(widths) < sum(last)]
        with self.progress("Widths of FFNs", _NUM_RUNGS) as advance:
            for _ in range(len(rungs) - len(todo)):
                advance()
            # What a limit may never reach is not measured ahead: it could be NaN.
            ahead = self.ranks.size if _never_stops(plan) else 1
            for start in range(0, len(todo), ahead):
                for taken in self._try_each(plan, todo[start : start + ahead]):
                    advance()
                    if not _allowed(plan, taken):
                        return self._stop_inside(plan, taken)
                    plan = plan.at([*plan.document.stage_1, taken], [])
                    self.save(plan)
        return plan

    def _stop_inside(self, plan: PruningPlan, broken: Rung) -> PruningPlan:
        """The limit lies before the widths of ``broken``: finds the narrowest widths that still hold, by bisection."""
        before = plan.document.stage_1
        widths = widths_between(plan.document, before[-1].intermediate_size if before else None, broken)
        tried = {len(widths): broken}

        def allowed_at(place: int) -> bool:
            tried[place] = self.try_widths(plan, widths[place - 1])
            return _allowed(plan, tried[place])

        last = last_that_holds(len(widths), allowed_at)
        kept = [*before, *([tried[last]] if last else [])]
        plan = _stopped(plan.at(kept, []), tried[last + 1], "with narrower FFNs")
        self.save(plan)
        return plan

    def try_widths(self, plan: PruningPlan, widths: Sequence[int]) -> Rung:
        """Measures the model with other FFN widths, and as it is otherwise."""
        [taken] = self._try_each(plan, [widths])
        return taken

    def _try_each(self, plan: PruningPlan, several: Sequence[Sequence[int]]) -> list[Rung]:
        """Measures several widths, no more than there are ranks: each rank its own."""
        values, rank = torch.zeros(2, dtype=torch.float64), self.ranks.rank
        if rank < len(several):
            with self.walk.only_neurons(_kept(plan, several[rank])):
                values[0] = measure(self.walk, self.metric)
                if (limit_metric := self._looked_at_too(plan)) is not None:
                    values[1] = measure(self.walk, limit_metric)
        rungs = []
        # Ranks that had nothing to measure come last.
        for widths, (metric, limited) in zip(several, torch.stack(self.ranks.gather(values)).tolist(), strict=False):
            removed = sum(self.sizes.intermediate_size - width for width in widths) * self.sizes.neuron
            rung = Rung(
                intermediate_size=list(widths),
                num_block_parameters=self.sizes.total - removed,
                metric=metric,
                limit_metric=None if self._looked_at_too(plan) is None else limited,
            )
            rungs.append(rung)
        return rungs

    def _looked_at_too(self, plan: PruningPlan) -> Metric | None:
        """The metric of a limit that looks at the model after each step, and at something else than ``metric``."""
        return self.limit_metric if plan.document.compensation is None else None

    def _remove_attentions(self, plan: PruningPlan) -> PruningPlan:
        document = plan.document
        if document.stage_1:
            self.walk.layers.narrow(_kept(plan, document.stage_1[-1].intermediate_size))
        done = [step.removed for step in document.trace]
        for layer in done:
            self.walk.layers.remove_attention(layer)
        todo, protected = document.target_attention_removals - len(done), document.protected.attention
        candidates = num_candidates(len(self.walk.layers) - len(done) - len(protected), todo)
        with self.progress("Search for attentions", candidates) as advance:
            found = removals(
                self.walk,
                self.metric,
                removed=done,
                protected=protected,
                race=document.search == "racing",
                tie_breaker=self.tie_breaker,
                ranks=self.ranks,
                on_candidate=advance,
            )
            for tried in itertools.islice(found, todo):
                removal = self._removal(plan, tried)
                if not _allowed(plan, removal):
                    plan = _stopped(plan, removal, f"without the attention of layer {tried.removed}")
                    self.save(plan)
                    break
                plan = plan.at(plan.document.stage_1, [*plan.document.trace, removal])
                self.save(plan)
        return plan

    def _removal(self, plan: PruningPlan, tried: Tried) -> Removal:
        metric = tried.candidates[tried.removed]
        limit_metric = self._looked_at_too(plan)
        return Removal(
            removed=tried.removed,
            metric=metric,
            candidates=tried.candidates,
            dropped=tried.dropped or None,
            ties=tried.ties or None,
            num_block_parameters=plan.steps[-1].num_block_parameters - self.sizes.attention - self.sizes.attention_norm,
            limit_metric=None if limit_metric is None else self._measured(limit_metric),
        )


def _limited(step: Rung | Removal) -> float:
    return step.metric if step.limit_metric is None else step.limit_metric


def _never_stops(plan: PruningPlan) -> bool:
    """Whether the search goes to the target, whatever it measures."""
    return plan.document.limit is None or plan.document.compensation is not None


def _allowed(plan: PruningPlan, step: Rung | Removal) -> bool:
    """Whether the limit lets the search go as far as ``step``."""
    return _never_stops(plan) or holds(plan.document.limit, _limited(step))


def _stopped(plan: PruningPlan, broken: Rung | Removal, how: str) -> PruningPlan:
    limit = plan.document.limit
    assert limit is not None
    return plan.changed({"stopped_because": why_not(limit, _limited(broken), how)})


def widths_between(document: PlanDocument, before: Sequence[int] | None, after: Rung) -> list[tuple[int, ...]]:
    """The finest steps of stage 1 there are behind the widths ``before``, up to those of ``after``.

    Args:
        document: Has the widths that stage 1 aims at.
        before: Widths of an earlier rung; ``None`` for the full ones.
        after: A later rung.

    Returns:
        From one to the next, the layer that loses most loses one alignment unit; the last are those of ``after``.
    """
    full, target = document.base_model.intermediate_size, document.target_intermediate_size
    rung = ladder(full, target, document.align)
    finest = max(max(full - width for width in target) // document.align, 1)
    wide, narrow = sum(before or [full] * len(target)), sum(after.intermediate_size)
    between = dict.fromkeys(rung(step, finest) for step in range(1, finest))
    return [*(each for each in between if narrow < sum(each) < wide), tuple(after.intermediate_size)]


def _kept(plan: PruningPlan, widths: Sequence[int]) -> KeptNeurons:
    return [top_neurons(scores, width) for scores, width in zip(plan.importance, widths, strict=True)]
