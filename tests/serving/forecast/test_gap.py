"""A gap between measured and expected gain: what the user is told of it must be what the figures say."""

import pytest

from serving.forecast.device_probe import DevicePeaks
from serving.forecast.explain import Observations
from serving.forecast.gap import Compared, explain_gap
from serving.forecast.model_facts import ModelFacts, expected_gains
from serving.forecast.roofline import roofline
from toolchain.architecture.layout import LayerLayout

# docs/gpu.md: random weights of Llama-3-8B's shape on an H200, whose data sheet says 4.8 TB/s.
H200 = DevicePeaks(device="NVIDIA H200", dtype="bfloat16", flops_per_s=8e14, bytes_per_s=4.8e12)
SHAPE = {"input_len": 512, "output_len": 128, "concurrency": 1}


def facts(decode_bytes, *, kv_bytes_per_token=2 * 8 * 128 * 2 * 32):
    parameters = decode_bytes // 2
    return ModelFacts(
        precision="bfloat16", num_parameters=parameters, weight_bytes=decode_bytes, size_on_disk_bytes=decode_bytes,
        kv_bytes_per_token=kv_bytes_per_token, vocab_size=128256, max_len=8192, decode_weight_bytes=decode_bytes,
        block_matrix_parameters=parameters - 525_000_000, head_parameters=525_000_000, head_every_position=False,
        attention_width=32 * 4096,
    )  # fmt: skip


MODELS = {"original": facts(15_000_000_000), "pruned": facts(11_500_000_000)}


def compared(gain, *, tpot_ms, ttft_ms=20.0, metric="mean_tpot_ms", models=MODELS, peaks=H200, seen=None, **more):
    """As ``sentei benchmark`` asks: what parameters promise, the roofline, and the original's medians."""
    low, value, high = gain
    medians = {"mean_tpot_ms": tpot_ms, "mean_ttft_ms": ttft_ms, "mean_e2el_ms": ttft_ms + 127 * tpot_ms}
    expected = expected_gains(models["original"], models["pruned"], **SHAPE, original_medians=medians)
    return Compared(
        metric=metric,
        gain={"value": value, "low": low, "high": high},
        expected={name: each["gain"] for name, each in expected.items()},
        medians=medians,
        roofline=roofline(models, peaks, **SHAPE),
        context=576,
        concurrency=1,
        seen=seen or Observations(),
        **more,
    )


def test_the_gap_that_was_measured_on_a_gpu_is_explained_by_what_pruning_does_not_touch():
    # 4.76 and 4.04 ms a token: 41 % of the pruned model's is not the roofline's.
    gap = explain_gap(compared((1.16, 4.76 / 4.04, 1.20), tpot_ms=4.76))
    assert gap["direction"] == "below"
    assert gap["expected"] == pytest.approx(1.30, abs=0.01)
    (cause,) = gap["causes"]
    assert cause["cause"] == "overhead"
    assert cause["share"] > 0.9
    assert gap["unexplained"] == pytest.approx(1 - cause["share"])
    assert "1.17x" in cause["text"] or "1.18x" in cause["text"]
    assert "4.76 ms a token" in cause["text"]


def test_a_pruned_model_that_is_slow_for_no_reason_known_here_is_said_to_be_unexplained():
    # The original runs at the roofline: nothing is left over that pruning could not touch.
    least = roofline(MODELS, H200, **SHAPE)["decode"]["original"]["at_least_ms"]
    gap = explain_gap(compared((1.09, 1.10, 1.11), tpot_ms=least))
    assert gap["causes"] == []
    assert gap["unexplained"] == 1.0


def test_half_of_a_gap_is_explained_where_half_of_it_is_overhead():
    """The pruned model's time is made here: the original's rest once more, and then as much again in logarithms."""
    least = {side: each["at_least_ms"] for side, each in roofline(MODELS, H200, **SHAPE)["decode"].items()
             if side in MODELS}  # fmt: skip
    rest = 1.5
    original, pruned = least["original"] + rest, least["pruned"] + rest
    promised = least["original"] / least["pruned"]
    further = promised / (original / pruned)
    gain = original / pruned / further
    gap = explain_gap(compared((gain - 0.01, gain, gain + 0.01), tpot_ms=original))
    assert [(each["cause"], round(each["share"], 2)) for each in gap["causes"]] == [("overhead", 0.5)]
    assert gap["unexplained"] == pytest.approx(0.5, abs=0.01)


def test_what_lies_inside_the_interval_is_no_gap():
    assert explain_gap(compared((1.2, 1.28, 1.35), tpot_ms=4.76)) is None


def test_a_measurement_above_the_expectation_lists_no_reason_for_a_shortfall():
    seen = Observations(kv_cache_tokens={"original": 10_000, "pruned": 100}, not_compiled="Enforce eager set")
    gap = explain_gap(
        compared((1.4, 1.5, 1.6), tpot_ms=4.76, seen=seen,
                 layout=[LayerLayout(attention=True, intermediate_size=9990)],
                 tiled=roofline({**MODELS, "pruned": facts(11_600_000_000)}, H200, **SHAPE))
    )  # fmt: skip
    assert (gap["direction"], gap["causes"], gap["unexplained"]) == ("above", [], 1.0)


def test_an_original_that_waited_for_its_cache_is_a_reason_to_be_above():
    seen = Observations(kv_cache_tokens={"original": 100, "pruned": 10_000})
    (cause,) = explain_gap(compared((1.4, 1.5, 1.6), tpot_ms=4.76, seen=seen))["causes"]
    assert (cause["cause"], cause["share"]) == ("kv_cache_full", None)
    assert "original model's server" in cause["text"]
    below = explain_gap(compared((1.1, 1.15, 1.2), tpot_ms=3.2, seen=seen))
    assert "kv_cache_full" not in {each["cause"] for each in below["causes"]}


def test_causes_whose_part_one_measurement_cannot_tell_have_no_share():
    seen = Observations(kv_cache_tokens={"original": 10_000, "pruned": 100}, not_compiled="Enforce eager set")
    causes = {
        each["cause"]: each["share"] for each in explain_gap(compared((1, 1.1, 1.2), tpot_ms=3.2, seen=seen))["causes"]
    }
    assert causes["kv_cache_full"] is causes["not_compiled"] is None
    assert causes["overhead"] > 0


def test_widths_that_do_not_tile_have_the_share_of_the_wider_ones():
    least = roofline(MODELS, H200, **SHAPE)["decode"]["original"]["at_least_ms"]
    wider = roofline({**MODELS, "pruned": facts(12_000_000_000)}, H200, **SHAPE)
    gain = wider["decode"]["gain"]
    gap = explain_gap(
        compared((gain - 0.005, gain, gain + 0.005), tpot_ms=least, tiled=wider,
                 layout=[LayerLayout(attention=True, intermediate_size=9990)])
    )  # fmt: skip
    assert [(each["cause"], round(each["share"], 2)) for each in gap["causes"]] == [("untileable_widths", 1.0)]
    assert "9990 → 9984" in gap["causes"][0]["text"]


def test_decode_that_is_bound_by_compute_does_not_gain_by_fewer_bytes():
    # A device that computes slowly, and a plan that halves a large KV cache, which is read and hardly computed with.
    slow = DevicePeaks(device="slow", dtype="bfloat16", flops_per_s=1e12, bytes_per_s=4.8e12)
    models = {
        "original": facts(15_000_000_000, kv_bytes_per_token=2**23),
        "pruned": facts(11_500_000_000, kv_bytes_per_token=2**22),
    }
    phases = roofline(models, slow, **SHAPE)
    assert phases["decode"]["original"]["bound"] == "compute"
    gain = phases["decode"]["gain"]
    least = phases["decode"]["original"]["at_least_ms"]
    gap = explain_gap(compared((gain - 0.002, gain, gain + 0.002), tpot_ms=least, peaks=slow, models=models))
    assert [(each["cause"], round(each["share"], 2)) for each in gap["causes"]] == [("bound", 1.0)]


@pytest.mark.parametrize("metric", ["output_throughput", "mean_e2el_ms", "mean_ttft_ms"])
def test_whole_requests_are_divided_too(metric):
    gap = explain_gap(compared((1.0, 1.05, 1.1), tpot_ms=4.76, metric=metric))
    shares = [each["share"] for each in gap["causes"]]
    assert sum(shares) + gap["unexplained"] == pytest.approx(1.0)
    assert 0 <= gap["unexplained"] < 1


def test_nothing_is_said_of_a_metric_of_which_nothing_is_expected():
    assert explain_gap(compared((1.0, 1.05, 1.1), tpot_ms=4.76, metric="request_throughput")) is None
