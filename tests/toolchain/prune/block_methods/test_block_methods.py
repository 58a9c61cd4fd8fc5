"""The field's methods that remove whole attentions and FFNs, against their papers' equations and brute force."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from tests.command_line import refused, sentei
from toolchain.architecture.families import FAMILIES
from toolchain.architecture.parts import PARTS, SubBlock, layers_of
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.metrics.token_metrics import PerplexityMetric
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model
from toolchain.plan.plan import load_plan
from toolchain.prune.block_methods import blockpruner, evopress, shortgpt, sliding_window
from toolchain.prune.block_methods.run import num_blocks_to_remove
from toolchain.prune.methods import METHODS
from toolchain.prune.search.two_stage import Search

NUM_LAYERS = 4
EVERY_SUB_BLOCK = [SubBlock(layer, part) for layer in range(NUM_LAYERS) for part in PARTS]
IDS = torch.randint(0, 49000, (3, 40), generator=torch.Generator().manual_seed(1))


def walk_over(directory: Path) -> LayerWalk:
    return LayerWalk(load_model(directory, dtype=torch.float32), FAMILIES["llama"])


def plain_logits(directory: Path, removed: frozenset[SubBlock]) -> torch.Tensor:
    """Transformers' own model with output projections zeroed: nothing shared with what is under test."""
    model = load_model(directory, dtype=torch.float32)
    for layer, part in removed:
        module = model.model.layers[layer]
        (module.self_attn.o_proj if part == "attention" else module.mlp.down_proj).weight.data.zero_()
    with torch.inference_mode():
        return model(IDS).logits


def plain_perplexity(directory: Path, removed: frozenset[SubBlock]) -> float:
    return math.exp(float(cross_entropy(plain_logits(directory, removed)[0, :-1], IDS[0, 1:])))


def plain_states(directory: Path) -> np.ndarray:
    """What enters each layer, and what leaves the last: ``[num_layers + 1, num_sequences, seq_len, hidden_size]``."""
    model, states = load_model(directory, dtype=torch.float32), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: states.append((inputs[0], output)))
    with torch.inference_mode():
        model(IDS)
    return torch.stack([*(before for before, _ in states), states[-1][1]]).double().numpy()


def test_block_influence_is_equation_1(demo_pico: Path):
    states = plain_states(demo_pico)
    expected = []
    for before, after in itertools.pairwise(states):
        cosines = [
            float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))
            for x, y in zip(before.reshape(-1, 32), after.reshape(-1, 32), strict=True)
        ]
        expected.append(1 - sum(cosines) / len(cosines))
    assert shortgpt.block_influence(walk_over(demo_pico), IDS) == pytest.approx(expected, rel=1e-5)


def test_the_least_influence_goes_first_and_ties_go_to_the_lower_layer():
    assert shortgpt.order_of_removal([0.3, 0.1, 0.2, 0.1]) == [1, 3, 2, 0]


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_the_sliding_window_is_the_best_of_all_starts(demo_pico: Path, num_blocks: int):
    last = plain_states(demo_pico)[:, :, -1]
    by_start = {}
    for start in range(NUM_LAYERS - num_blocks + 1):
        angles = [
            math.acos(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
            for x, y in zip(last[start], last[start + num_blocks], strict=True)
        ]
        by_start[start] = sum(angles) / len(angles) / math.pi
    walk = walk_over(demo_pico)
    found = sliding_window.angular_distances(sliding_window.last_token_states(walk, IDS), num_blocks, walk)
    assert found == pytest.approx(list(by_start.values()), rel=1e-4)
    assert sliding_window.most_similar(found) == min(by_start, key=by_start.__getitem__)


def test_blockpruner_is_the_plain_greedy_search_until_nothing_is_left(demo_pico: Path):
    gone: frozenset[SubBlock] = frozenset()
    for best, scores in blockpruner.removals(walk_over(demo_pico), PerplexityMetric(IDS[:1])):
        expected = {each: plain_perplexity(demo_pico, gone | {each}) for each in EVERY_SUB_BLOCK if each not in gone}
        assert scores == pytest.approx(expected, rel=1e-5)
        assert best == min(expected, key=expected.__getitem__)
        gone |= {best}
    assert gone == set(EVERY_SUB_BLOCK)


def test_blockpruner_goes_on_from_what_is_gone(demo_pico: Path):
    whole = list(blockpruner.removals(walk_over(demo_pico), PerplexityMetric(IDS[:1])))
    walk, gone = walk_over(demo_pico), {best for best, _ in whole[:3]}
    walk.remove(gone)
    rest = list(blockpruner.removals(walk, PerplexityMetric(IDS[:1]), removed=gone))
    assert [best for best, _ in rest] == [best for best, _ in whole[3:]]
    assert rest[0][1] == pytest.approx(whole[3][1], rel=1e-5)


def every_removal(num_layers: int, num_blocks: int) -> Iterator[evopress.Removed]:
    some = list(itertools.combinations(range(num_layers), num_blocks))
    for attention, ffn in itertools.product(some, some):
        yield frozenset(
            [SubBlock(layer, "attention") for layer in attention] + [SubBlock(layer, "ffn") for layer in ffn]
        )


def test_evopress_finds_what_brute_force_finds(demo_pico: Path):
    original = plain_logits(demo_pico, frozenset()).log_softmax(-1)

    def divergence(removed: evopress.Removed) -> float:
        logits = plain_logits(demo_pico, removed).log_softmax(-1)
        return float((original.exp() * (original - logits)).sum(-1).mean())

    expected = {removed: divergence(removed) for removed in every_removal(NUM_LAYERS, 2)}
    models = list(expected)
    fitness = evopress.KLFitness(walk_over(demo_pico), IDS)
    assert fitness(models, range(3)) == pytest.approx(list(expected.values()), rel=1e-4)
    budget = evopress.Budget(generations_divisor=0.4, initially_generated=4, offspring=6, survivors=2, tokens=(40, 120))
    *_, best = evopress.evolve(
        fitness, budget, num_layers=NUM_LAYERS, num_blocks=2, window_tokens=40, num_windows=3, seed=0
    )
    assert best.generation == 10
    assert best.removed == min(expected, key=expected.__getitem__)
    assert best.fitness == pytest.approx(min(expected.values()), rel=1e-4)


SMALL = evopress.BUDGETS["small"]


def evolve(num_layers: int, num_blocks: int, seed: int, after=None) -> list[evopress.Best]:
    """Against a fitness that is quick, and the same on every window: how far the removed layers are from a few."""

    def fitness(models, windows):
        assert 1 <= len(windows) == len(set(windows)) <= 5
        return [sum((each.layer * 7 + len(each.part)) % num_layers for each in model) for model in models]

    return list(
        evopress.evolve(
            fitness, SMALL, num_layers=num_layers, num_blocks=num_blocks, window_tokens=1024, num_windows=5, seed=seed,
            after=after,
        )
    )  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), st.integers(0, 99))
def test_evolution_keeps_to_the_budget_never_gets_worse_and_goes_on_from_any_generation(sizes: tuple, seed: int):
    num_layers, num_blocks = sizes
    found = evolve(num_layers, num_blocks, seed)
    assert [each.generation for each in found] == list(range(SMALL.generations(num_layers, num_blocks) + 1))
    for best in found:
        for part in PARTS:
            layers = layers_of(part, best.removed)
            assert len(layers) == len(set(layers)) == num_blocks
            assert set(layers) <= set(range(num_layers))
    assert all(after.fitness <= before.fitness for before, after in itertools.pairwise(found))
    middle = found[len(found) // 2]
    assert evolve(num_layers, num_blocks, seed, (middle.generation, middle.removed)) == found[middle.generation + 1 :]


@given(st.integers(2, 200), st.floats(0.001, 0.999))
def test_as_few_blocks_go_as_meet_the_target(num_layers: int, sparsity: float):
    if sparsity > (num_layers - 1) / num_layers:
        with pytest.raises(SenteiError, match="leaves none"):
            num_blocks_to_remove(num_layers, sparsity)
        return
    count = num_blocks_to_remove(num_layers, sparsity)
    assert (count - 1) / num_layers < sparsity <= count / num_layers + 1e-9


def prune(model: Path, text: Path, out: Path, method: str, *more: object):
    budget = ("--evopress-budget", "small") if method == "evopress" else ()
    return sentei(
        "prune", model, "-o", out, "--calibration", text, "--samples", 3, "--seq-len", 48, "--sparsity", 0.4,
        "--method", method, *budget, *more,
    )  # fmt: skip


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.removes_blocks])
def test_the_plan_is_like_any_other(demo_pico: Path, text: Path, tmp_path: Path, method: str):
    """Written and measured against what was planned, shown, cut and applied again; from disk, it is the same."""
    out = tmp_path / "out"
    done = prune(demo_pico, text, out, method)
    assert done.returncode == 0, done.stderr
    plan = load_plan(out)
    original, pruned = open_checkpoint(demo_pico), open_checkpoint(out)
    assert pruned.layout == plan.layout
    steps = plan.document.block_steps
    assert [step.num_block_parameters for step in plan.steps[1:]] == [step.num_block_parameters for step in steps]
    assert pruned.num_block_parameters == steps[-1].num_block_parameters <= 0.6 * original.num_block_parameters
    if method == "blockpruner":
        assert steps[-2].num_block_parameters > 0.6 * original.num_block_parameters
    else:
        assert len(steps[-1].attention) == len(steps[-1].ffn) == 2
    if method in ("shortgpt", "sliding-window"):
        assert steps[-1].attention == steps[-1].ffn
    if method == "sliding-window":
        assert steps[-1].attention[1] == steps[-1].attention[0] + 1

    assert sentei("apply", out, demo_pico, "-o", tmp_path / "applied").returncode == 0
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert sentei("plan", "cut", out, "--step", 1, "-o", tmp_path / "cut").returncode == 0
    assert load_plan(tmp_path / "cut").document.block_steps == steps[:1]
    shown = sentei("plan", "show", out).stdout
    assert shown.count("remove") >= len(steps[-1].attention)
    assert "by hand" not in shown
    assert f"{plan.document.metric_at_end:.4g}" in shown
    assert json.loads(sentei("plan", "curve", out, "--json").stdout)["steps"][-1]["metric"] == steps[-1].metric

    done = prune(demo_pico, text, tmp_path / "disk", method, "--offload")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "disk" / "plan.json").read_bytes() == (out / "plan.json").read_bytes()


@pytest.mark.parametrize("method", ["shortgpt", "blockpruner", "evopress"])
def test_interrupted_and_resumed_it_gives_the_identical_plan(
    demo_pico: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    assert prune(demo_pico, text, tmp_path / "whole", method).returncode == 0
    real, saved = Search.__init__, []

    def interrupting(self: Search, **fields: object) -> None:
        def save(plan) -> None:
            fields["save"](plan)  # type: ignore[operator]
            saved.append(plan)
            # The first is saved before anything is removed, the second after the first step.
            if len(saved) == 2:
                raise KeyboardInterrupt

        real(self, **{**fields, "save": save})

    monkeypatch.setattr(Search, "__init__", interrupting)
    done = prune(demo_pico, text, tmp_path / "out", method)
    assert done.returncode == 130
    assert "--resume" in done.stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Search, "__init__", real)
    refused(prune(demo_pico, text, tmp_path / "out", method), "interrupted search")
    refused(prune(demo_pico, text, tmp_path / "out", method, "--resume", "--seed", 1), "seed: 0 then, 1 now")
    done = prune(demo_pico, text, tmp_path / "out", method, "--resume")
    assert done.returncode == 0, done.stderr
    for file in ("plan.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("method", "options", "parts"),
    [
        ("shortgpt", ("--compensate",), ("shortgpt", "knows no --compensate")),
        ("blockpruner", ("--align", 64), ("knows no --align",)),
        ("evopress", ("--max-degradation", 1.1), ("knows no --max-degradation",)),
        ("sliding-window", ("--sparsity", 0.9), ("leaves none", "highest is 0.75")),
        ("shortgpt", ("--evopress-budget", "small"), ("--evopress-budget is for --method evopress",)),
    ],
)
def test_what_a_method_does_not_know_is_refused(
    demo_pico: Path, text: Path, tmp_path: Path, method: str, options: tuple, parts: tuple[str, ...]
):
    refused(prune(demo_pico, text, tmp_path / "out", method, *options), *parts)
    assert list(tmp_path.iterdir()) == []


def test_why_tells_what_the_method_gave_a_layer(demo_pico: Path, text: Path, tmp_path: Path):
    assert prune(demo_pico, text, tmp_path / "out", "blockpruner").returncode == 0
    first = load_plan(tmp_path / "out").document.block_steps[0].candidates
    assert first is not None
    found = json.loads(sentei("plan", "why", tmp_path / "out", 2, "--json").stdout)
    assert found["blocks"] == {"attention 2": first["attention 2"], "ffn 2": first["ffn 2"]}
    shown = sentei("plan", "why", tmp_path / "out", 2).stdout
    assert f"attention 2: {first['attention 2']:.4g}" in shown
    assert "removed no attention" not in shown
