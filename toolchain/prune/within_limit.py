"""How far a compensated plan may go: models are written, measured and deleted, until the furthest that holds is known.

The search goes to its target by the model without compensation. What a person's limit is about is the model that is
written: so the target is written first, and if that breaks the limit, steps before it, by bisection, and widths between
two steps of stage 1. Each takes a compensation of its own, on the same windows as the final one; the limit is measured
on others. What was measured stays in ``<out>.search`` and is not measured again; only one model is on disk at a time,
and only one in memory.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.documents import Record, read_document
from toolchain.metrics.token_metrics import Metric, measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.slicing import write_pruned
from toolchain.outputs import START_OVER, write_text
from toolchain.plan.document import LimitRecord, Rung
from toolchain.plan.plan import PruningPlan
from toolchain.progress import Progress
from toolchain.prune.apply import Computing, Planned, realise
from toolchain.prune.budget.limits import holds, last_that_holds, why_not
from toolchain.prune.search.two_stage import Search, widths_between

# Between two of the four rungs of stage 1 so many models are tried at most: to a sixteenth of the way between them.
_MOST_INSIDE = 4
_TRIALS_FILE = "trials.json"


class Trial(Record):
    """A model that was written and measured; ``rung`` where its widths lie between two steps of the search."""

    intermediate_size: list[int]
    removed_attention: list[int]
    rung: Rung | None
    measured: float


class _Trials(Record):
    trials: list[Trial]


@dataclass(kw_only=True)
class WithinLimit:
    """Finds the furthest plan whose model, as it is written, holds the limit.

    Attributes:
        checkpoint: The unpruned model.
        computing: What compensation and measurement take.
        metric: The search's.
        limit_metric: What the limit looks at; it has looked at the unpruned model.
        search: Makes a search over a model, which measures widths between two steps.
        directory: ``<out>.search``.
        progress: Told of every model and layer.
    """

    checkpoint: Checkpoint
    computing: Computing
    metric: Metric
    limit_metric: Metric
    search: Callable[[LayerWalk], Search]
    directory: Path
    progress: Progress
    _trials: list[Trial] = field(default_factory=list)
    # The furthest model that holds, so far: its compensation is gone on with, where others' is deleted.
    _best: PruningPlan | None = None
    _num_tried: int = 0
    _about: int = 1

    def __post_init__(self) -> None:
        """Reads what an interrupted command measured."""
        if (file := self._limit_directory / _TRIALS_FILE).exists():
            self._trials = list(read_document(file, _Trials, hint=START_OVER).trials)

    def breaks(self, plan: PruningPlan) -> bool:
        """Whether it is known already that the model of ``plan`` breaks the limit."""
        found = self._found(plan)
        return found is not None and not holds(_limit_of(plan), found.measured)

    def compensation_of(self, plan: PruningPlan) -> Path:
        """Where the re-fitted weights of a plan's model are kept while it is the furthest that holds."""
        widths, removed = sum(layer.intermediate_size for layer in plan.layout), len(plan.removed_attention)
        return self._limit_directory / f"compensation-{widths}-{removed}"

    def furthest(self, plan: PruningPlan, planned: Planned | None = None) -> Planned:
        """The furthest plan that holds, with its weights.

        Args:
            plan: What the search ended with.
            planned: The same with its weights, if they are known.

        Returns:
            ``planned``, or a plan with fewer steps that says why it stopped; in the worst case it removes nothing.

        Raises:
            SenteiError: Memory ran out, or the limit's metric is NaN or Inf.
        """
        last = len(plan.steps) - 1
        if self._holds(plan, lambda: planned or self._realised(plan)) or not last:
            return self._measured(planned or self._realised(plan))
        self._about = 1 + math.ceil(math.log2(last)) + _MOST_INSIDE
        steps = last_that_holds(last, lambda step: self._holds(plan.cut(step), lambda: self._realised(plan.cut(step))))
        stopped, broken = plan.cut(steps), plan.cut(steps + 1)
        if trace := broken.document.trace:
            how = f"without the attention of layer {trace[-1].removed}"
        else:
            how = "with narrower FFNs"
            stopped, broken = self._inside(plan, steps)
        found = self._found(broken)
        assert found is not None
        stopped = stopped.changed({"stopped_because": why_not(_limit_of(plan), found.measured, f"{how}, compensated,")})
        return self._measured(self._realised(stopped)) if len(stopped.steps) > 1 else Planned(stopped)

    def _inside(self, plan: PruningPlan, steps: int) -> tuple[PruningPlan, PruningPlan]:
        """The furthest plan behind ``steps`` of stage 1 that holds, and the one that does not, before the next step."""
        rungs = plan.document.stage_1
        widths = widths_between(plan.document, rungs[steps - 1].intermediate_size if steps else None, rungs[steps])
        # From the next step, which is known, backwards; not one by one where there are many.
        size = math.ceil(len(widths) / 2**_MOST_INSIDE)
        places = list(range(len(widths) - 1, -1, -size))[::-1]
        plans = {0: plan.cut(steps), len(places): plan.cut(steps + 1)}
        self._about = self._num_tried + math.ceil(math.log2(len(places)))

        def holds_at(place: int) -> bool:
            plans[place], rung, planned = self._between(plan, steps, widths[places[place - 1]])
            return self._holds(plans[place], lambda: planned or self._realised(plans[place]), rung)

        last = last_that_holds(len(places), holds_at)
        return plans[last], plans[last + 1]

    def _between(
        self, plan: PruningPlan, steps: int, widths: tuple[int, ...]
    ) -> tuple[PruningPlan, Rung, Planned | None]:
        """A plan with other widths after ``steps``, its last rung, and its weights unless it was measured before."""
        before = plan.document.stage_1[:steps]
        known = (each.rung for each in self._trials if each.intermediate_size == list(widths) and each.rung)
        if (rung := next(known, None)) is not None:
            return plan.at([*before, rung], []), rung, None
        walk = self.computing.open(self.checkpoint)
        rung = self.search(walk).try_widths(plan, widths)
        between = plan.at([*before, rung], [])
        return between, rung, self._realised(between, walk)

    def _holds(self, plan: PruningPlan, realised: Callable[[], Planned], rung: Rung | None = None) -> bool:
        """Whether the model of a plan holds the limit. Where it does, it is the furthest so far.

        Args:
            plan: Removes more than the furthest so far.
            realised: Finds its weights.
            rung: The plan's last, if the search did not take it.
        """
        self._num_tried += 1
        if (found := self._found(plan)) is None:
            found = self._tried(realised(), rung)
        held = holds(_limit_of(plan), found.measured)
        gone = self._best if held else plan
        if gone is not None:
            shutil.rmtree(self.compensation_of(gone), ignore_errors=True)
        if held:
            self._best = plan
        return held

    def _tried(self, planned: Planned, rung: Rung | None) -> Trial:
        """Writes a model, measures it, keeps what it was and deletes it."""
        plan, place = planned.plan, self._limit_directory / "model"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            with self.progress(f"Limit: model {self._num_tried} of about {self._about}", 1) as advance:
                write_pruned(self.checkpoint, plan.layout, plan.kept_neurons, place, refitted=planned.refitted)
                measured = measure(self.computing.open(open_checkpoint(place)), self.limit_metric)
                advance()
        finally:
            shutil.rmtree(place, ignore_errors=True)
        trial = Trial(
            intermediate_size=[layer.intermediate_size for layer in plan.layout],
            removed_attention=sorted(plan.removed_attention),
            rung=rung,
            measured=measured,
        )
        self._trials.append(trial)
        content = _Trials(trials=self._trials).model_dump(mode="json")
        write_text(self._limit_directory / _TRIALS_FILE, json.dumps(content) + "\n")
        return trial

    def _realised(self, plan: PruningPlan, walk: LayerWalk | None = None) -> Planned:
        """The plan with its weights. A model that it opens is gone from memory when it returns."""
        walk = walk or self.computing.open(self.checkpoint)
        return realise(
            walk,
            self.checkpoint,
            plan,
            self.computing,
            self.compensation_of(plan),
            metric=self.metric,
            progress=self.progress,
        )

    def _measured(self, planned: Planned) -> Planned:
        """With what the limit's metric was of the written model."""
        found, plan = self._found(planned.plan), planned.plan
        assert found is not None
        limit = _limit_of(plan).model_copy(update={"measured": found.measured})
        return Planned(plan.changed({"limit": limit}), planned.refitted, planned.proof)

    def _found(self, plan: PruningPlan) -> Trial | None:
        widths, removed = [layer.intermediate_size for layer in plan.layout], sorted(plan.removed_attention)
        return next(
            (
                each
                for each in self._trials
                if (each.intermediate_size, sorted(each.removed_attention)) == (widths, removed)
            ),
            None,
        )

    @property
    def _limit_directory(self) -> Path:
        return self.directory / "limit"


def _limit_of(plan: PruningPlan) -> LimitRecord:
    limit = plan.document.limit
    assert limit is not None
    return limit
