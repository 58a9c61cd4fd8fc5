"""Start-up and KV cache: what a buyer would compare must be comparable, or say that it is not."""

from types import SimpleNamespace

import pytest

from serving.benchmark import results as bench_results
from serving.benchmark.journal import Journal
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.workload import make_workloads
from serving.forecast.model_facts import checkpoint_facts
from tests.conftest import make_pico
from tests.families import make_family_pico


@pytest.fixture(scope="module")
def model_facts(tmp_path_factory):
    """A model's without a sliding window, and one's with it in half of its layers."""
    full, sliding = (tmp_path_factory.mktemp("models") / name for name in ("full", "sliding"))
    make_pico(full, vocab_size=64)
    make_family_pico(sliding, "gemma3_text", "alternating", vocab_size=64)
    return {model.name: checkpoint_facts(model, None) for model in (full, sliding)}


def sizes_of(directory, facts, *, device, options=()):
    """Sizes of a benchmark whose first starts took 60 s and whose later ones took 10 and 8."""
    journal = Journal(directory)
    for repeat in range(4):
        for side, warm_s in (("original", 10.0), ("pruned", 8.0)):
            report = {"startup_s": warm_s + (repeat == 0) * (60.0 - warm_s), "kv_cache_tokens": 1000, "device": device}
            for load in range(2):
                journal.record((repeat, load, side), {}, report)
    sides = {
        side: SimpleNamespace(facts=facts, engine_report=journal.engine_report(side)) for side in ("original", "pruned")
    }
    settings = BenchmarkSettings(engine="vllm", workloads=make_workloads(engine="vllm"), engine_options=options)
    return bench_results._sizes(settings, sides, journal)


def test_the_first_start_and_the_later_ones_are_apart_and_only_these_are_compared(tmp_path, model_facts):
    sizes = sizes_of(tmp_path, model_facts["full"], device="cuda")
    assert (sizes["startup_cold_s"]["original"], sizes["startup_cold_s"]["pruned"]) == (60.0, 60.0)
    # The original started first and read what the pruned model's start then found in memory.
    assert sizes["startup_cold_s"]["ratio"] is None
    assert (sizes["startup_warm_s"]["original"], sizes["startup_warm_s"]["pruned"]) == (10.0, 8.0)
    assert sizes["startup_warm_s"]["ratio"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "device, options, says, says_not",
    [
        ("cuda", [], "what the weights leave", "same memory"),
        ("cuda", ["--kv-cache-memory-bytes=1G"], "given the same memory", "weights leave"),
        ("cpu", [], "given the same memory", "weights leave"),
        (None, [], "is not known", "same memory"),
        ("cpu", ["--gpu_memory_utilization=0.5"], "is not known", "same memory"),
        (
            "cpu",
            ["--gpu-memory-utilization=0.5", "--kv-cache-memory-bytes=1G"],
            "given the same memory",
            "weights leave",
        ),
    ],
)
def test_a_larger_cache_is_not_called_the_same_memory_where_it_is_not(
    tmp_path, model_facts, device, options, says, says_not
):
    sizes = sizes_of(tmp_path, model_facts["full"], device=device, options=options)
    formula = sizes["kv_cache_tokens"]["formula"]
    assert says in formula
    assert says_not not in formula


@pytest.mark.parametrize(
    "model, options, tokens",
    [("full", [], 1000), ("sliding", [], None), ("sliding", ["--disable-hybrid-kv-cache-manager"], 1000)],
)
def test_tokens_of_a_cache_are_not_told_where_they_depend_on_how_long_conversations_are(
    tmp_path, model_facts, model, options, tokens
):
    """The server counts requests as long as can be, of which layers with a window hold little."""
    sizes = sizes_of(tmp_path, model_facts[model], device="cuda", options=options)
    assert (sizes["kv_cache_tokens"]["original"], sizes["kv_cache_tokens"]["pruned"]) == (tokens, tokens)
