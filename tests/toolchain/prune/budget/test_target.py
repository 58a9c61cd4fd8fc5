"""A target is read as it was meant, or refused with what is missing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.forecast.model_facts import facts_of
from tests.families import make_family_pico
from tests.toolchain.costs.made import KV, TPOT, TTFT, WEIGHTS, counted, make_costs
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.cli.commands.prune import _aim
from toolchain.errors import SenteiError
from toolchain.model.sliding_window import sliding_window
from toolchain.prune.budget.least_damage import Choice
from toolchain.prune.budget.target import as_served, budget_of, check_targets, parse_targets, predicted, unreachable

NARROW = tuple(LayerLayout(attention=layer != 1, intermediate_size=24) for layer in range(4))


def test_each_quantity_has_its_units():
    found = parse_targets(["speedup=1.3,tpot=20ms", "ttft=.5s", "throughput=400tok/s", "memory=24GiB@64x8192"])
    assert [(each.name, each.value) for each in found] == [
        ("speedup", 1.3), ("tpot", 20.0), ("ttft", 500.0), ("throughput", 400.0), ("memory", 24.0),
    ]  # fmt: skip
    assert found[-1].cached_tokens == 64 * 8192
    assert parse_targets(["memory=1000MB@1x1"])[0].value == pytest.approx(10**9 / 2**30)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tpot=20", "20 of what"),
        ("throughput=400", "400 of what"),
        ("memory=24@1x1", "24 of what"),
        ("tpot=20GiB", "GiB is not a unit of tpot"),
        ("speedup=1.3ms", "ms is not a unit of speedup"),
        ("speedup=0.9", "above 1"),
        ("speedup=1", "above 1"),
        ("speedup", "not understood"),
        ("faster=2", "not understood"),
        ("tpot=-1ms", "not understood"),
        ("tpot=0ms", "not understood"),
        ("tpot=nanms", "not understood"),
        ("", "not understood"),
        ("memory=24GiB", "for a number of conversations"),
        ("tpot=20ms@1x1", "for a number of conversations"),
        ("memory=24GiB@64", "not a number of conversations"),
        ("memory=24GiB@0x8192", "not a number of conversations"),
        ("tpot=20ms,tpot=30ms", "asks for tpot twice"),
    ],
)
def test_what_is_missing_is_said(text, says):
    with pytest.raises(SenteiError, match=says):
        parse_targets([text])


@given(
    st.text(max_size=30) | st.from_regex(r"(speedup|tpot|ttft|throughput|memory)=[0-9.a-zA-Z/@x]{0,20}", fullmatch=True)
)
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_targets([text])
    except SenteiError:
        return
    assert all(0 < each.value < float("inf") for each in found)


def test_a_prediction_is_in_the_targets_unit():
    costs = make_costs({}, spread=(0.9, 1.0, 1.1)).document
    speedup, tpot, ttft, throughput, memory = parse_targets(
        ["speedup=1.3", "tpot=3ms", "ttft=9ms", "throughput=400tok/s", "memory=1GiB@2x100"]
    )
    assert predicted(tpot, costs, NARROW).predicted == pytest.approx(TPOT.of(NARROW))
    assert predicted(ttft, costs, NARROW).predicted == pytest.approx(TTFT.of(NARROW))
    times = [(TTFT.of(layout) + 8 * TPOT.of(layout)) / 18 for layout in (costs.whole, NARROW)]
    gain = predicted(speedup, costs, NARROW)
    # What slows both models down alike is no reason to doubt the gain.
    assert gain.predicted == pytest.approx(gain.predicted_low) == pytest.approx(times[0] / times[1])
    rate = predicted(throughput, costs, NARROW)
    assert rate.predicted_low < 1000 / times[1] < rate.predicted_high
    bytes_ = WEIGHTS.of(NARROW) + 200 * KV.of(NARROW)
    assert predicted(memory, costs, NARROW).predicted == pytest.approx(bytes_ / 2**30)
    for target, used in ((speedup, 1.3 * times[1] / times[0]), (memory, bytes_ / 2**30), (throughput, 0.4 * times[1])):
        budget = budget_of(target, costs)
        assert budget.costs.of(NARROW) / budget.most == pytest.approx(used)
        assert target.share(predicted(target, costs, NARROW).predicted) == pytest.approx(used)


def test_what_needs_no_pruning_or_cannot_be_is_refused():
    costs = make_costs({}).document
    with pytest.raises(SenteiError, match=r"predicted to meet tpot=100ms \(7 ms\)"):
        check_targets(parse_targets(["tpot=100ms"]), costs, 256)
    with pytest.raises(SenteiError, match="reads at most 256 tokens"):
        check_targets(parse_targets(["memory=1MB@2x257"]), costs, 256)
    check_targets(parse_targets(["tpot=100ms,speedup=1.1"]), costs, 256)
    with pytest.raises(SenteiError, match="no time between two"):
        one = make_costs({}).document
        check_targets(
            parse_targets(["tpot=1ms"]), one.model_copy(update={"costs": {"ttft_ms": one.costs["ttft_ms"]}}), 1
        )
    error = unreachable(parse_targets(["speedup=1.1,tpot=2ms"]), costs, NARROW)
    assert "tpot=2ms cannot be reached" in error.message
    assert f"{TPOT.of(NARROW):.4g} ms" in error.message
    assert unreachable(parse_targets(["speedup=1.1"]), costs, NARROW) is None


def test_a_sliding_window_holds_no_more_than_itself_in_vllm(tmp_path):
    """Of a model whose layers 0 and 2 slide over 6 tokens: it fits where counting all tokens says that it does not."""
    make_family_pico(tmp_path / "model", "gemma3_text", "alternating", max_position_embeddings=8192)
    checkpoint = open_checkpoint(tmp_path / "model")
    facts = facts_of(checkpoint, None, size_on_disk_bytes=0)
    kv = replace(KV, attention=facts.kv_bytes_per_token / 4)
    costs = make_costs(dict(checkpoint.config)).document
    costs = costs.model_copy(update={"costs": {**costs.costs, "kv_bytes_per_token": counted(kv)}})

    def asked(text, engine="vllm", *options):
        served = costs.served.model_copy(update={"engine": engine, "engine_options": list(options)})
        found = costs.model_copy(update={"served": served})
        return as_served(parse_targets([text]), found, checkpoint.config), found

    weights, all_tokens = WEIGHTS.of(costs.whole), 3 * 4000 * facts.kv_bytes_per_token
    [target], _ = asked("memory=3GiB@3x4000")
    whole = weights + 3 * facts.kv_bytes(4000)
    assert predicted(target, costs, costs.whole).predicted * 2**30 == pytest.approx(whole)
    assert whole < weights + 0.51 * all_tokens
    for options in (("onnx",), ("vllm", "--disable_hybrid_kv_cache_manager")):
        [other], _ = asked("memory=3GiB@3x4000", *options)
        assert predicted(other, costs, costs.whole).predicted * 2**30 == pytest.approx(weights + all_tokens)
    with pytest.raises(SenteiError, match="predicted to meet memory=9MB@3x4000"):
        check_targets(*asked("memory=9MB@3x4000"), 8192)
    check_targets(*asked("memory=6MB@3x4000"), 8192)
    # Whichever attentions go in the end: not more than those that slide are counted as saved.
    slid = 3 * 6 * kv.attention
    for gone in (0, 1):
        one = [replace(layer, attention=number != gone) for number, layer in enumerate(costs.whole)]
        saved = predicted(target, costs, costs.whole).predicted - predicted(target, costs, one).predicted
        assert saved * 2**30 == pytest.approx(slid + WEIGHTS.attention, rel=1e-3)
    budget = budget_of(target, costs)
    assert budget.used(Choice(widths=(48,) * 4, num_removals=1)) * budget.most == pytest.approx(
        whole - slid - WEIGHTS.attention
    )


def test_the_command_counts_what_vllm_holds(tmp_path, monkeypatch):
    make_family_pico(tmp_path / "model", "gemma3_text", "alternating")
    checkpoint = open_checkpoint(tmp_path / "model")
    document = make_costs(dict(checkpoint.config)).document
    document = document.model_copy(
        update={"served": document.served.model_copy(update={"engine": "vllm", "precision": None})}
    )
    (tmp_path / "costs.json").write_text(document.to_json())
    monkeypatch.setattr("serving.profile.measure.bench_as_profiled", lambda *given, **more: None)
    aim = _aim(["memory=1GiB@1x200"], tmp_path / "costs.json", checkpoint, SimpleNamespace(note=print))
    assert aim.targets[0].window == sliding_window(checkpoint.config) is not None


def test_a_rate_whose_costs_may_be_nothing_has_no_highest_value():
    costs = make_costs({}, spread=(0.2, 1.0, 1.8)).document
    [target] = parse_targets(["throughput=400tok/s"])
    assert costs.predicted("ms_per_output_token", costs.whole).low == 0
    found = predicted(target, costs, costs.whole)
    assert found.predicted > 0
    assert (found.predicted_low, found.predicted_high) == (None, None)
