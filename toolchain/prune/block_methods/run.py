"""The field's methods that remove whole attentions and FFNs, each from a model and a budget to a plan's steps."""

import math
from collections.abc import Callable, Collection, Mapping

import torch

from toolchain.architecture.parts import SubBlock, layers_of, whole_blocks
from toolchain.errors import SenteiError
from toolchain.metrics.token_metrics import PerplexityMetric, finite
from toolchain.plan.document import BlockStep
from toolchain.plan.plan import PruningPlan
from toolchain.prune.block_methods import blockpruner, evopress, shortgpt, sliding_window
from toolchain.prune.budget.allocation import BlockParameters
from toolchain.prune.methods import MethodName
from toolchain.prune.search.candidates import last_states
from toolchain.prune.search.two_stage import Search

# Far below one block, far above the rounding of a product.
_SLACK = 1e-9


def num_blocks_to_remove(num_layers: int, sparsity: float) -> int:
    """The fewest whole blocks that are at least ``sparsity`` of all of them.

    Raises:
        SenteiError: Out of range, or no block would be left.
    """
    if not 0 < sparsity < 1:
        raise SenteiError(f"--sparsity {sparsity:g} is outside (0, 1).")
    count = math.ceil(sparsity * num_layers - _SLACK)
    if count >= num_layers:
        raise SenteiError(
            f"--sparsity {sparsity:g} of {num_layers} whole blocks leaves none.",
            f"The highest is {math.floor(1e4 * (num_layers - 1) / num_layers) / 1e4:g}.",
        )
    return count


def parameters_left(sizes: BlockParameters, removed: Collection[SubBlock]) -> int:
    """Parameters of all decoder blocks without these attentions and FFNs and their norms."""
    attention = sizes.attention + sizes.attention_norm
    size = {"attention": attention, "ffn": sizes.block - attention}
    return sizes.total - sum(size[each.part] for each in removed)


def remove_blocks(search: Search, plan: PruningPlan) -> PruningPlan:
    """Goes on from any plan that was saved, to the plan's target.

    Args:
        search: What it runs on, whom it tells, and the metric that is taken after each step.
        plan: Begun, see :meth:`toolchain.prune.search.two_stage.Search.begin`.

    Raises:
        SenteiError: A score is NaN or Inf.
    """
    return _SEARCHES[plan.document.method](search, plan)


def _shortgpt(search: Search, plan: PruningPlan) -> PruningPlan:
    done = len(plan.document.block_steps)
    with search.progress("Block influence", len(search.windows)) as advance:
        influence = shortgpt.block_influence(search.walk, search.windows, on_window=advance)
    order = shortgpt.order_of_removal(influence)
    candidates = {f"block {layer}": value for layer, value in enumerate(influence)}
    count = _num_blocks(search, plan)
    with search.progress("Removing blocks", count) as advance:
        for number, layer in enumerate(order[:count], 1):
            if number > done:
                removed = whole_blocks(order[:number])
                first = candidates if number == 1 else None
                plan = _add(search, plan, removed, score=influence[layer], candidates=first)
            advance()
    return plan


def _sliding_window(search: Search, plan: PruningPlan) -> PruningPlan:
    if plan.document.block_steps:
        return plan
    count = _num_blocks(search, plan)
    with search.progress("Angular distances", len(search.windows)) as advance:
        states = sliding_window.last_token_states(search.walk, search.windows, on_window=advance)
    distances = sliding_window.angular_distances(states, count, search.walk)
    start = sliding_window.most_similar(distances)
    candidates = {f"blocks {first}-{first + count - 1}": each for first, each in enumerate(distances)}
    removed = whole_blocks(range(start, start + count))
    return _add(search, plan, removed, score=distances[start], candidates=candidates)


def _blockpruner(search: Search, plan: PruningPlan) -> PruningPlan:
    removed = set(_removed(plan))
    sizes, walk = search.sizes, search.walk
    target = (1 - plan.document.target_sparsity + _SLACK) * sizes.total
    walk.remove(removed)
    found = blockpruner.removals(
        walk, _perplexity(search), removed=removed, ranks=search.ranks, on_candidate=lambda: advance()
    )
    # How many steps there will be is not known: an attention is smaller than an FFN.
    while (left := parameters_left(sizes, removed)) > target:
        title = f"Search at {1 - left / sizes.total:.1%}"
        with search.progress(title, 2 * sizes.num_hidden_layers - len(removed)) as advance:
            best, scores = next(found)
        removed.add(best)
        candidates = {str(each): value for each, value in scores.items()}
        plan = _save(search, plan, removed, scores[best], candidates=candidates)
    return plan


def _evopress(search: Search, plan: PruningPlan) -> PruningPlan:
    asked = plan.document.evopress_budget
    assert asked is not None
    budget = evopress.BUDGETS[asked]
    num_layers, count = search.sizes.num_hidden_layers, _num_blocks(search, plan)
    steps = plan.document.block_steps
    last = steps[-1].generation if steps else None
    found = evopress.evolve(
        evopress.KLFitness(search.walk, search.windows),
        budget,
        num_layers=num_layers,
        num_blocks=count,
        window_tokens=search.windows.shape[1],
        num_windows=len(search.windows),
        seed=plan.document.seed,
        after=None if last is None else (last, _removed(plan)),
    )
    total = budget.generations(num_layers, count) + 1
    with search.progress("Generations", total) as advance:
        for _ in range(0 if last is None else last + 1):
            advance()
        for best in found:
            plan = _survived(search, plan, best)
            advance()
    return plan


def _survived(search: Search, plan: PruningPlan, best: evopress.Best) -> PruningPlan:
    """A step for a new best; where it is the one before, that has survived another generation."""
    steps = plan.document.block_steps
    if not steps or _removed(plan) != best.removed:
        return _add(search, plan, best.removed, score=best.fitness, generation=best.generation)
    again = steps[-1].model_copy(update={"score": best.fitness, "generation": best.generation})
    plan = plan.at([], [], [*steps[:-1], again])
    search.save(plan)
    return plan


@torch.inference_mode()
def _add(
    search: Search,
    plan: PruningPlan,
    removed: Collection[SubBlock],
    *,
    score: float,
    candidates: Mapping[str, float] | None = None,
    generation: int | None = None,
) -> PruningPlan:
    """Measures the model without ``removed``, which is still in the walk, and adds a step."""
    metric = _perplexity(search)
    [state] = last_states(search.walk, metric.ids, [frozenset(removed)])
    measured = finite(metric(search.walk, state), metric.name, search.walk)
    return _save(search, plan, removed, measured, score=score, candidates=candidates, generation=generation)


def _save(
    search: Search,
    plan: PruningPlan,
    removed: Collection[SubBlock],
    metric: float,
    *,
    score: float | None = None,
    candidates: Mapping[str, float] | None = None,
    generation: int | None = None,
) -> PruningPlan:
    step = BlockStep(
        attention=layers_of("attention", removed),
        ffn=layers_of("ffn", removed),
        metric=metric,
        num_block_parameters=parameters_left(search.sizes, removed),
        score=score,
        generation=generation,
        candidates=None if candidates is None else dict(candidates),
    )
    plan = plan.at([], [], [*plan.document.block_steps, step])
    search.save(plan)
    return plan


def _num_blocks(search: Search, plan: PruningPlan) -> int:
    return num_blocks_to_remove(search.sizes.num_hidden_layers, plan.document.target_sparsity)


def _removed(plan: PruningPlan) -> frozenset[SubBlock]:
    """What is gone after the last step."""
    steps = plan.document.block_steps
    if not steps:
        return frozenset()
    return frozenset(
        [SubBlock(layer, "attention") for layer in steps[-1].attention]
        + [SubBlock(layer, "ffn") for layer in steps[-1].ffn]
    )


def _perplexity(search: Search) -> PerplexityMetric:
    assert isinstance(search.metric, PerplexityMetric)
    return search.metric


_SEARCHES: Mapping[str, Callable[[Search, PruningPlan], PruningPlan]] = {
    MethodName.shortgpt: _shortgpt,
    MethodName.sliding_window: _sliding_window,
    MethodName.blockpruner: _blockpruner,
    MethodName.evopress: _evopress,
}
