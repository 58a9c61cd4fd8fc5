"""The search: from a model and calibration text to a plan, in steps that can be limited, interrupted and resumed."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from toolchain.allocation import BlockParameters, ladder
from toolchain.attention_search import Tried, num_candidates, removals
from toolchain.importance import neuron_importance
from toolchain.layer_walk import LayerWalk
from toolchain.limits import LimitSettings, holds, resolve_limit
from toolchain.metrics import Metric, measure
from toolchain.plan import PlanDocument, PruningPlan, Removal, Rung, top_neurons
from toolchain.progress import Progress, no_progress
from toolchain.surgery import KeptNeurons

# On the way to the target widths the metric is taken this often: the part of the curve that stage 1 walks.
_NUM_RUNGS = 4


@dataclass(frozen=True, kw_only=True)
class Search:
    """Everything a search needs besides its state, which is a plan.

    Attributes:
        walk: Over the unpruned model; pruned on the way.
        sizes: Of the unpruned model's blocks.
        windows: Calibration, int64 ``[num_samples, seq_len]``.
        metric: Decides what is removed.
        limit: How much damage is accepted.
        save: Told of the plan after each step.
        progress: Told of windows, widths and candidates.
    """

    walk: LayerWalk
    sizes: BlockParameters
    windows: torch.Tensor
    metric: Metric
    limit: LimitSettings
    save: Callable[[PruningPlan], None] = lambda plan: None
    progress: Progress = no_progress

    def begin(self, blank: PlanDocument) -> PruningPlan:
        """Looks at the unpruned model: importance of its neurons, and its metric.

        Args:
            blank: Everything but what is measured here.

        Returns:
            A plan that removes nothing yet.
        """
        with self.progress("Importance of neurons", len(self.windows)) as advance:
            importance = neuron_importance(self.walk, self.windows, on_window=advance)
        original = measure(self.walk, self.metric)
        limit = resolve_limit(self.limit, self.metric, original)
        document = blank.model_copy(update={"metric_original": original, "limit": limit})
        plan = PruningPlan(document, importance).at([], [])
        self.save(plan)
        return plan

    def finish(self, plan: PruningPlan) -> PruningPlan:
        """Goes on from any plan the search has saved, to the target or to the limit.

        Raises:
            SenteiError: A metric is NaN or Inf, or cannot tell candidates apart.
        """
        if plan.document.stopped_because is None and not plan.document.trace:
            plan = self._narrow_ffns(plan)
        if plan.document.stopped_because is None:
            plan = self._remove_attentions(plan)
        return plan

    def _narrow_ffns(self, plan: PruningPlan) -> PruningPlan:
        document = plan.document
        full, target = document.base_model.intermediate_size, tuple(document.target_intermediate_size)
        rung = ladder(full, target, document.align)
        last = document.stage_1[-1].intermediate_size if document.stage_1 else [full] * len(target)
        with self.progress("Widths of FFNs", _NUM_RUNGS) as advance:
            for step in range(1, _NUM_RUNGS + 1):
                widths = rung(step, _NUM_RUNGS)
                advance()
                if sum(widths) >= sum(last):
                    continue
                taken = self._try_widths(plan, widths)
                if not holds(document.limit, taken.metric):
                    return self._stop_inside(plan, step, taken)
                plan = plan.at([*plan.document.stage_1, taken], [])
                self.save(plan)
        return plan

    def _stop_inside(self, plan: PruningPlan, step: int, broken: Rung) -> PruningPlan:
        """The limit lies before rung ``step``: finds the narrowest widths that still hold, by bisection."""
        document = plan.document
        full, target = document.base_model.intermediate_size, tuple(document.target_intermediate_size)
        rung = ladder(full, target, document.align)
        # One alignment unit of the layer that loses most is the finest step there is.
        finest = max(max(full - width for width in target) // document.align, 1) * _NUM_RUNGS
        good, bad = (step - 1) * finest // _NUM_RUNGS, step * finest // _NUM_RUNGS
        best: Rung | None = None
        while bad - good > _NUM_RUNGS:
            middle = (good + bad) // 2
            taken = self._try_widths(plan, rung(middle, finest))
            if holds(document.limit, taken.metric):
                good, best = middle, taken
            else:
                bad, broken = middle, taken
        kept = [*document.stage_1, *([best] if best else [])]
        plan = _stopped(plan.at(kept, []), broken, "with narrower FFNs")
        self.save(plan)
        return plan

    def _try_widths(self, plan: PruningPlan, widths: Sequence[int]) -> Rung:
        with self.walk.only_neurons(_kept(plan, widths)):
            metric = measure(self.walk, self.metric)
        removed = sum(self.sizes.intermediate_size - width for width in widths) * self.sizes.neuron
        return Rung(
            intermediate_size=list(widths),
            num_block_parameters=self.sizes.total - removed,
            metric=metric,
        )

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
            found = removals(self.walk, self.metric, removed=done, protected=protected, on_candidate=advance)
            for tried in itertools.islice(found, todo):
                removal = self._removal(plan, tried)
                if not holds(document.limit, removal.metric):
                    plan = _stopped(plan, removal, f"without the attention of layer {tried.removed}")
                    self.save(plan)
                    break
                plan = plan.at(plan.document.stage_1, [*plan.document.trace, removal])
                self.save(plan)
        return plan

    def _removal(self, plan: PruningPlan, tried: Tried) -> Removal:
        return Removal(
            removed=tried.removed,
            metric=tried.candidates[tried.removed],
            candidates=tried.candidates,
            num_block_parameters=plan.steps[-1].num_block_parameters - self.sizes.attention - self.sizes.attention_norm,
        )


def _stopped(plan: PruningPlan, broken: Rung | Removal, how: str) -> PruningPlan:
    limit = plan.document.limit
    assert limit is not None
    reason = f"{limit.metric} would be {broken.metric:.5g} {how}; the limit is {limit.value:.5g}"
    return PruningPlan(plan.document.model_copy(update={"stopped_because": reason}), plan.importance)


def _kept(plan: PruningPlan, widths: Sequence[int]) -> KeptNeurons:
    return [top_neurons(scores, width) for scores, width in zip(plan.importance, widths, strict=True)]
