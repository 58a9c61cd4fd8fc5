"""The search: exact whatever the memory, limited, resumed, and from disk."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.command_line import PLAIN, refused, sentei
from tests.conftest import make_pico
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import copy_companions, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.metrics.token_metrics import PerplexityMetric
from toolchain.model import layer_walk
from toolchain.model.disk_layers import open_offloaded
from toolchain.model.layer_walk import LayerWalk, attention_removed
from toolchain.model.loading import load_model
from toolchain.plan.plan import load_plan
from toolchain.prune.search import candidates as stepping
from toolchain.prune.search.attention import removals

LLAMA = FAMILIES["llama"]
SETTINGS = ("--samples", 2, "--seq-len", 64, "--align", 8, "--attention-removals", 2, *PLAIN)


@pytest.fixture(scope="module")
def deep_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "deep"
    make_pico(directory, num_hidden_layers=12)
    copy_companions(demo_model, directory)
    return directory


def plain_search(directory: Path, ids: torch.Tensor, num_removals: int) -> list[tuple[int, dict[int, float]]]:
    """Masks one attention, runs Transformers' own model, unmasks: nothing shared with the search under test."""
    model = load_model(directory, dtype=torch.float32)
    layers, removed, steps = model.model.layers, [], []
    for _ in range(num_removals):
        found = {}
        for index in sorted(set(range(len(layers))) - set(removed)):
            weight = layers[index].self_attn.o_proj.weight
            saved = weight.detach().clone()
            with torch.no_grad():
                weight.zero_()
                logits = model(ids).logits[0, :-1]
                weight.copy_(saved)
            found[index] = float(cross_entropy(logits, ids[0, 1:]).double().exp())
        best = min(found, key=lambda index: (found[index], index))
        with torch.no_grad():
            layers[best].self_attn.o_proj.weight.zero_()
        removed.append(best)
        steps.append((best, found))
    return steps


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 49000, (1, 48), generator=torch.Generator().manual_seed(1))


def search(directory: Path, ids: torch.Tensor, num_removals: int, walk: LayerWalk | None = None):
    walk = walk or LayerWalk(load_model(directory, dtype=torch.float32), LLAMA)
    return [
        (tried.removed, tried.candidates)
        for tried in itertools.islice(removals(walk, PerplexityMetric(ids)), num_removals)
    ]


def test_agrees_with_the_plain_way_until_no_attention_is_left(deep_model: Path, ids: torch.Tensor):
    found, expected = search(deep_model, ids, 12), plain_search(deep_model, ids, 12)
    assert [removed for removed, _ in found] == [removed for removed, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 40, 60, 400])
def test_memory_changes_nothing(deep_model: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, rows: int):
    expected = search(deep_model, ids, 3)
    row_bytes = 48 * 32 * 4
    monkeypatch.setattr(layer_walk, "available_bytes", lambda device: int(rows * row_bytes / 0.4) + 1)
    assert search(deep_model, ids, 3) == expected


def test_running_out_of_memory_tries_fewer_at_a_time(
    deep_model: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    expected, real, sizes = search(deep_model, ids, 2), stepping._without_group, []

    def limited(walk, group, states, look, **keywords):
        sizes.append(len(group))
        if len(group) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(walk, group, states, look, **keywords)

    monkeypatch.setattr(stepping, "_without_group", limited)
    assert search(deep_model, ids, 2) == expected
    assert sizes[:3] == [12, 6, 3]

    def never(*arguments, **keywords):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(stepping, "_without_group", never)
    with pytest.raises(SenteiError, match="not enough memory"):
        search(deep_model, ids, 1)


def test_a_layer_is_visited_once_a_step(deep_model: Path, ids: torch.Tensor):
    walk = LayerWalk(load_model(deep_model, dtype=torch.float32), LLAMA)
    visits = []
    lend = walk.layers.layer
    walk.layers.layer = lambda index: (visits.append(index), lend(index))[1]  # type: ignore[method-assign]
    next(removals(walk, PerplexityMetric(ids)))
    assert visits == list(range(12))
    # Every candidate from its layer on, and the model itself once.
    assert walk.num_layer_forwards == sum(12 - layer for layer in range(12)) + 11


def test_the_next_step_resumes_where_the_removed_attention_was(deep_model: Path, ids: torch.Tensor):
    walk = LayerWalk(load_model(deep_model, dtype=torch.float32), LLAMA)
    found = removals(walk, PerplexityMetric(ids))
    removed = next(found).removed
    before = walk.num_layer_forwards
    next(found)
    below, above = (
        sum(12 - max(layer, removed) for layer in layers) for layers in (range(removed), range(removed + 1, 12))
    )
    # The model itself changed from the removed attention on, up to the last candidate.
    assert walk.num_layer_forwards - before == below + above + (11 - removed)


def test_from_disk_it_is_the_same(deep_model: Path, ids: torch.Tensor):
    walk = open_offloaded(open_checkpoint(deep_model), dtype=torch.float32, device="cpu")
    assert search(deep_model, ids, 3, walk) == search(deep_model, ids, 3)
    assert all(parameter.is_meta for parameter in walk.model.model.layers.parameters())


def test_a_metric_that_cannot_tell_is_refused(deep_model: Path, ids: torch.Tensor):
    class Constant(PerplexityMetric):
        def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
            return 1.0

    walk = LayerWalk(load_model(deep_model, dtype=torch.float32), LLAMA)
    with pytest.raises(SenteiError, match="cannot tell them apart"):
        next(removals(walk, Constant(ids)))


def test_attention_comes_back(deep_model: Path):
    layer = load_model(deep_model).model.layers[0]
    before = dict(layer.named_modules())
    with attention_removed(layer, LLAMA):
        assert "self_attn.q_proj" not in dict(layer.named_modules())
    assert dict(layer.named_modules()) == before


def prune(model: Path, text: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return sentei("prune", model, "-o", out, "--calibration", text, "--sparsity", 0.3, *SETTINGS, *more)


def test_offload_writes_the_same_files(deep_model: Path, text: Path, tmp_path: Path):
    assert prune(deep_model, text, tmp_path / "memory").returncode == 0
    done = prune(deep_model, text, tmp_path / "disk", "--offload")
    assert done.returncode == 0, done.stderr
    for file in ("plan.json", "plan.safetensors", "model.safetensors", "config.json"):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes(), file


def test_killed_and_resumed_it_gives_the_identical_plan(deep_model: Path, text: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    assert prune(deep_model, text, whole).returncode == 0
    out, state = tmp_path / "out", tmp_path / "out.search" / "plan.json"
    command = ["prune", deep_model, "-o", out, "--calibration", text, "--sparsity", 0.3, *SETTINGS]
    # A step here takes milliseconds; slowed down, the kill falls between the first removal and the second.
    slow = (
        "import sys, time; from toolchain.prune.search import two_stage as search; real = search.Search._removal\n"
        "def removal(self, plan, tried):\n"
        "    time.sleep(60 * bool(plan.document.trace)); return real(self, plan, tried)\n"
        "search.Search._removal = removal; from toolchain.cli.app import main; sys.argv[0] = 'sentei'; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, command)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (state.exists() and json.loads(state.read_text())["trace"]):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(load_plan(state.parent).document.trace) == 1
    assert not out.exists()

    refused(prune(deep_model, text, out), "interrupted search", "--resume")
    refused(prune(deep_model, text, out, "--resume", "--sparsity", 0.2), "target_sparsity: 0.3 then, 0.2 now")
    refused(prune(deep_model, text, out, "--resume", "--seq-len", 32), "calibration")
    done = prune(deep_model, text, out, "--resume")
    assert done.returncode == 0, done.stderr
    for file in ("plan.json", "plan.safetensors", "model.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert not state.parent.exists()


def test_a_limit_ends_the_search_before_it_is_broken(demo_model: Path, tmp_path: Path):
    settings = ["--sparsity", 0.25, "--samples", 2, "--seq-len", 128, *PLAIN, "--max-degradation"]
    done = sentei("prune", demo_model, "-o", tmp_path / "out", *settings, 1.05)
    assert done.returncode == 0, done.stderr
    plan = load_plan(tmp_path / "out")
    limit = plan.document.limit
    assert limit is not None
    assert plan.document.stopped_because is not None
    assert limit.value == pytest.approx(limit.original * 1.05)
    assert [each.num_windows for each in limit.windows] == [1]
    steps = (*plan.document.stage_1, *plan.document.trace)
    assert all(step.limit_metric is not None and step.limit_metric <= limit.value for step in steps)
    assert limit.measured is not None
    assert limit.measured == steps[-1].limit_metric
    assert plan.layout[0].intermediate_size < 1536
    # One unit more would have broken it: the search had gone on to the limit, not stopped at a rung before it.
    assert limit.original < limit.measured <= limit.value
    assert json.loads((tmp_path / "out" / "pruning_summary.json").read_text())["stopped_because"]


def test_a_limit_that_nothing_can_meet_removes_nothing(deep_model: Path, text: Path, tmp_path: Path):
    done = prune(deep_model, text, tmp_path / "out", "--max-metric", 1.0)
    assert done.returncode == 1
    assert "Nothing was removed" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "plan.safetensors"}
    refused(prune(deep_model, text, tmp_path / "other", "--max-degradation", 0.9), "below 1")


def test_protected_layers_stay(deep_model: Path, text: Path, tmp_path: Path):
    done = prune(deep_model, text, tmp_path / "out", "--protect", "attention:0,1,2", "--protect", "ffn:3,11")
    assert done.returncode == 0, done.stderr
    plan = load_plan(tmp_path / "out")
    assert not {0, 1, 2} & {layer for step in plan.document.trace for layer in step.candidates}
    assert plan.layout[3].intermediate_size == plan.layout[11].intermediate_size == 48
    everything = "attention:" + ",".join(map(str, range(11)))
    refused(prune(deep_model, text, tmp_path / "no", "--protect", everything), "leaves 1")
    refused(prune(deep_model, text, tmp_path / "no", "--protect", "heads:1"), "not understood")
    refused(prune(deep_model, text, tmp_path / "no", "--protect", "ffn:12"), "no such layer")


def test_a_plan_can_be_cut_at_every_step(deep_model: Path, text: Path, tmp_path: Path):
    assert prune(deep_model, text, tmp_path / "out").returncode == 0
    plan = load_plan(tmp_path / "out")
    assert plan.cut(len(plan.steps) - 1).document == plan.document
    sizes = [step.num_block_parameters for step in plan.steps]
    assert sizes == sorted(sizes, reverse=True)
    for step in plan.steps:
        done = sentei("plan", "cut", tmp_path / "out", "--step", step.number, "-o", tmp_path / f"cut-{step.number}")
        assert done.returncode == 0, done.stderr
        applied = tmp_path / f"applied-{step.number}"
        assert sentei("apply", tmp_path / f"cut-{step.number}", deep_model, "-o", applied).returncode == 0
        assert open_checkpoint(applied).num_block_parameters == step.num_block_parameters
    refused(sentei("plan", "cut", tmp_path / "out", "--step", 99, "-o", tmp_path / "x"), "no step 99")
    shown = json.loads(sentei("plan", "curve", tmp_path / "out", "--json").stdout)
    assert [point["num_block_parameters"] for point in shown["steps"]] == sizes
