"""An option that makes another server than the one the expectation is about is modelled or refused."""

import pytest

from serving.benchmark.engine_options import read_vllm_options
from serving.benchmark.settings import BenchmarkSettings, check_settings
from serving.benchmark.side import open_sides
from serving.benchmark.workload import make_workloads
from serving.forecast.device_probe import DevicePeaks
from serving.forecast.roofline import roofline
from tests.conftest import make_pico
from toolchain.errors import SenteiError

PEAKS = DevicePeaks(device="cpu", dtype="float32", flops_per_s=1e9, bytes_per_s=1e8)


def settings(*options, engine="vllm"):
    workloads = make_workloads(engine=engine, input_len=16, output_len=8)
    return BenchmarkSettings(engine=engine, workloads=workloads, dtype="bfloat16", engine_options=options)


@pytest.mark.parametrize(
    "options",
    [
        ["--quantization=fp8"],
        ["-q", "fp8"],
        ["--quantization", "bitsandbytes"],
        ["--quant=fp8"],  # vLLM's parser takes shortened names
        ["--kv_cache_dtype", "nvfp4"],
        ["--kv-cache-dtype=int8_per_token_head"],
        ["--speculative-config", '{"method": "ngram"}'],
        ["--speculative_config.method=ngram"],
        ["-tp", "2"],
        ["--tensor-parallel-size=two"],
        ["--pipeline-parallel-size", "2"],
        ["--data-parallel-size=2"],
        ["--cpu-offload-gb=4"],
        ["--hf-overrides", "{}"],
        ["--config", "file.yaml"],
        ["--enforce-eager", "--enable-lora"],
        ["--an-option-of-a-later-version"],
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "vllm-offline"])
def test_what_would_make_the_expectation_about_another_server_is_refused(options, engine):
    with pytest.raises(SenteiError, match=r"expectation knows|not a number of GPUs") as told:
        check_settings(settings(*options, engine=engine), num_models=2)
    assert told.value.hint


def test_code_of_the_checkpoint_is_refused_as_such():
    with pytest.raises(SenteiError, match="would run code from the checkpoint"):
        read_vllm_options(["--trust_remote_code"])


def test_what_changes_nothing_of_the_expectation_passes():
    options = ["--enforce-eager", "--max_model_len", "256", "--kv-cache-memory-bytes=1G", "--no-enable-chunked-prefill"]
    shape = read_vllm_options(options)
    assert (shape.num_gpus, shape.kv_itemsize) == (1, None)


def test_an_8_bit_cache_is_half_of_a_16_bit_one_and_everything_else_stays(tmp_path):
    for name in ("original", "pruned"):
        make_pico(tmp_path / name, vocab_size=64)
    plain, small = (
        open_sides(tmp_path / "original", tmp_path / "pruned", settings(*options))["original"]
        for options in ([], ["--kv-cache-dtype", "fp8"])
    )
    # 2 x 2 key-value heads x 8 wide x 4 layers, a byte each.
    assert small.facts.kv_bytes_per_token == 2 * 2 * 8 * 4
    assert plain.facts.kv_bytes_per_token == 2 * small.facts.kv_bytes_per_token
    assert small.facts.decode_weight_bytes == plain.facts.decode_weight_bytes
    load = {"input_len": 100, "output_len": 20, "concurrency": 4}
    saved = plain.facts.decode_bytes(**load) - small.facts.decode_bytes(**load)
    assert saved == 4 * 110 * small.facts.kv_bytes_per_token
    assert small.tiled_facts.kv_bytes_per_token == small.facts.kv_bytes_per_token


def test_two_gpus_read_twice_as_fast_and_promise_the_same_gain(tmp_path):
    make_pico(tmp_path / "model", vocab_size=64)
    sides = open_sides(tmp_path / "model", tmp_path / "model", settings("--tensor-parallel-size=2"))
    facts = {name: side.facts for name, side in sides.items()}
    load = {"input_len": 100, "output_len": 20, "concurrency": 4}
    one, two = (
        roofline(facts, PEAKS, **load, num_gpus=gpus)
        for gpus in (1, read_vllm_options(["--tensor-parallel-size=2"]).num_gpus)
    )
    for phase in ("prefill", "decode"):
        assert two[phase]["original"]["at_least_ms"] == pytest.approx(one[phase]["original"]["at_least_ms"] / 2)
        assert two[phase]["gain"] == one[phase]["gain"]
