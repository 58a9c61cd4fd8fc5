"""Racing: the same choice as the exact search, for less work."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.command_line import PLAIN, sentei
from tests.conftest import make_pico
from toolchain.architecture.parts import SubBlock
from toolchain.checkpoint.directory import copy_companions, open_checkpoint
from toolchain.metrics.token_metrics import KLDivergence, PerplexityMetric
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.plan.plan import load_plan
from toolchain.prune.search import racing
from toolchain.prune.search.attention import removals
from toolchain.prune.search.candidates import embedded_states, without_each
from toolchain.ranks.ranks import ALONE
from toolchain.text.windows import load_windows


@pytest.fixture(scope="module")
def ids(demo_model: Path) -> torch.Tensor:
    return load_windows(None, load_tokenizer(demo_model), num_samples=1, seq_len=128).ids


def walk_over(directory: Path) -> LayerWalk:
    checkpoint = open_checkpoint(directory)
    return LayerWalk(load_model(checkpoint, dtype=torch.float32), checkpoint.family)


def test_the_start_of_a_window_is_an_exact_part_of_it(demo_model: Path, ids: torch.Tensor):
    """What a race relies on: a candidate's losses on the first tokens do not depend on those that follow."""
    walk, metric = walk_over(demo_model), PerplexityMetric(ids)
    states, candidates = embedded_states(walk, ids), [3, 20]
    attentions = [SubBlock(layer, "attention") for layer in candidates]
    whole = without_each(walk, attentions, states, lambda hidden: metric.of_tokens(walk, hidden).flatten())
    short = racing._values(walk, metric, candidates, states, 32, ALONE)
    for layer in candidates:
        assert len(short[layer]) == 31
        torch.testing.assert_close(short[layer].float(), whole[SubBlock(layer, "attention")][:31], rtol=1e-4, atol=1e-4)


def test_it_runs_fewer_tokens_and_every_candidate_is_accounted_for(demo_model: Path, ids: torch.Tensor):
    metric = PerplexityMetric(ids)
    raced = list(itertools.islice(removals(walk_over(demo_model), metric, race=True), 2))
    remaining = set(range(30))
    for tried in raced:
        assert set(tried.candidates) | set(tried.dropped) == remaining
        assert not set(tried.candidates) & set(tried.dropped)
        assert 1 <= len(tried.candidates) <= len(remaining) / 4 + 1
        assert tried.candidates[tried.removed] == min(tried.candidates.values())
        for lost in tried.dropped.values():
            assert lost.num_tokens < ids.shape[1]
            assert lost.metric >= lost.best
        remaining.remove(tried.removed)
    # Of the first step both see the same model: whoever went the whole way has the exact score.
    exact = next(removals(walk_over(demo_model), metric))
    for layer, score in raced[0].candidates.items():
        assert score == pytest.approx(exact.candidates[layer], rel=1e-6)


def test_a_clear_winner_wins(demo_model: Path, tmp_path: Path, ids: torch.Tensor):
    """An attention whose output is zero already cannot be beaten by one that hurts on every token."""
    walk = walk_over(demo_model)
    with torch.no_grad():
        walk.model.model.layers[17].self_attn.o_proj.weight.zero_()
    metric = KLDivergence(ids)
    metric.prepare(walk)
    tried = next(removals(walk, metric, race=True))
    assert tried.removed == 17
    assert tried.candidates[17] == pytest.approx(0, abs=1e-6)


def test_the_plan_says_who_was_dropped_and_when(demo_model: Path, tmp_path: Path):
    make_pico(tmp_path / "model", num_hidden_layers=8)
    copy_companions(demo_model, tmp_path / "model")
    settings = ("--sparsity", 0.3, "--samples", 1, "--seq-len", 128, "--align", 8, "--attention-removals", 1, *PLAIN)
    done = sentei("prune", tmp_path / "model", "-o", tmp_path / "out", *settings, "--search", "racing")
    assert done.returncode == 0, done.stderr
    step = load_plan(tmp_path / "out").document.trace[0]
    assert step.dropped
    loser = next(iter(step.dropped))
    told = json.loads(sentei("plan", "why", tmp_path / "out", loser, "--json").stdout)["attention"]
    assert told["decision"] == "keep"
    assert told["steps"][0]["num_tokens"] == step.dropped[loser].num_tokens
    assert told["steps"][0]["num_candidates"] == 8
    shown = sentei("plan", "why", tmp_path / "out", loser).stdout
    assert f"out after {step.dropped[loser].num_tokens} tokens" in shown
