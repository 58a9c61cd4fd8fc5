"""What a person loses without these: a profile that says a part costs what it does not."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from serving.profile.measure import bench_as_profiled, measure_models
from serving.profile.profile import profile
from serving.profile.random_model import write_random_model
from serving.profile.shapes import num_layers_measured, shapes_to_measure, widths_measured
from tests.conftest import prune_by_hand
from tests.families import VARIANTS, make_family_pico
from tests.serving.profile.fake_engine import FakeEngine, bench_of
from tests.toolchain.prune.test_aim import damages_of
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.costs.document import read_costs
from toolchain.costs.parts import PartCosts
from toolchain.errors import SenteiError
from toolchain.model.loading import load_model
from toolchain.progress import no_progress
from toolchain.prune.aim import find_shape
from toolchain.prune.budget.target import parse_targets
from toolchain.prune.settings import Aim

FULL = 48
# Convex and flat pieces: piecewise linear between the measured widths, and nowhere else.
PREFILL = PartCosts(outside=5.0, attention=2.0, widths=(12, 24, 48), ffn=(1.0, 3.0, 3.0))
DECODE = PartCosts(outside=1.0, attention=0.25, widths=(12, 24, 48), ffn=(0.5, 1.0, 2.5))


def layout_of(*layers):
    return tuple(LayerLayout(attention=bool(attention), intermediate_size=width) for attention, width in layers)


def test_costs_are_those_of_the_engine(pico_model, tmp_path):
    engine = FakeEngine(PREFILL, DECODE, drift=(1.0, 1.5, 0.8))
    found = profile(bench_of(pico_model, engine), tmp_path / "costs.json")
    assert read_costs(tmp_path / "costs.json").document == found
    assert widths_measured(FULL) == DECODE.widths
    for quantity, costs in (("ttft_ms", PREFILL), ("tpot_ms", DECODE)):
        fitted = found.costs[quantity].parts
        assert fitted.outside == pytest.approx(1.1 * costs.outside)
        assert fitted.attention == pytest.approx(1.1 * costs.attention)
        assert fitted.ffn == pytest.approx([1.1 * each for each in costs.ffn])
    unseen = layout_of((1, 17), (0, 48), (1, 30), (1, 40))
    per_token = (PREFILL.of(unseen) + 8 * DECODE.of(unseen)) / 18
    assert found.predicted("ms_per_output_token", unseen).value == pytest.approx(1.1 * per_token)
    one = found.predicted("tpot_ms", unseen)
    assert one.low < 0.9 * one.value < 1.1 * one.value < one.high
    # Drift from one repeat to the next moves both models alike.
    gain = found.predicted_gain("ttft_ms", unseen)
    assert gain.low == pytest.approx(gain.high) == pytest.approx(PREFILL.of(found.whole) / PREFILL.of(unseen))
    assert max(abs(each.error) for each in found.check) < 1e-9
    assert len(found.models) == 7
    assert {each.model for each in found.check} == {each.name for each in found.models}
    assert not any(each in json.dumps(found.content()) for each in (str(pico_model), str(tmp_path)))


def test_bytes_are_those_of_a_pruned_checkpoint(pico_model, tmp_path):
    found = profile(bench_of(pico_model, FakeEngine(PREFILL, DECODE)), tmp_path / "costs.json")
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune_by_hand(pico_model, pruned, removed_attention={0, 2}, width=(48, 17, 30, 12).__getitem__)
    checkpoint = open_checkpoint(pruned)
    assert found.predicted("weight_bytes", checkpoint.layout).value == pytest.approx(checkpoint.weight_bytes)
    # Two key-value heads of eight numbers in float32, keys and values, in two layers.
    assert found.predicted("kv_bytes_per_token", checkpoint.layout).value == 2 * 2 * 8 * 4 * 2


def test_a_shape_is_measured_as_its_costs_were(pico_model, tmp_path):
    """From a profile to a target that is met, through everything but the engine and the pruning."""
    bench = bench_of(pico_model, FakeEngine(PREFILL, DECODE), repeats=1)
    profile(bench, tmp_path / "costs.json")
    costs = read_costs(tmp_path / "costs.json")
    # Often enough for an interval, whatever the profile did with.
    assert bench_as_profiled(costs.document, bench.checkpoint).settings == replace(bench.settings, repeats=3)
    slower = replace(
        bench_as_profiled(costs.document, bench.checkpoint),
        open_session=FakeEngine(PREFILL, replace(DECODE, outside=1.5)),
    )
    aim = Aim(
        targets=parse_targets(["tpot=6ms"]),
        costs=costs,
        measure=partial(measure_models, slower),
    )
    record = find_shape(aim, damages_of(), tmp_path / "target", no_progress)
    taken = record.rounds[record.taken]
    layout = layout_of(*[(layer not in taken.removed_attention, width)
                         for layer, width in enumerate(taken.intermediate_size)])  # fmt: skip
    assert record.followed.values[0].measured == pytest.approx(DECODE.of(layout) + 0.5)
    assert record.met
    assert len(record.rounds) == 2
    assert not list((tmp_path / "target").glob("*/models"))


def test_what_is_too_rough_is_measured_as_often_again_by_the_same_models(pico_model, tmp_path):
    told: list[str] = []
    bench = replace(bench_of(pico_model, FakeEngine(PREFILL, DECODE)), on_progress=told.append)
    layouts = {"shape": layout_of(*[(1, 24)] * 4), "whole": layout_of(*[(1, 48)] * 4)}
    seen: list[int] = []

    def is_too_rough(found):
        seen.extend(len(each["tpot_ms"]) for each in found.values())
        return True

    found = measure_models(bench, layouts, tmp_path / "work", is_too_rough)
    assert seen == [bench.settings.repeats] * 2
    assert [len(each["tpot_ms"]) for each in found.values()] == [2 * bench.settings.repeats] * 2
    assert [message for message in told if message.startswith("writing")] == ["writing shape", "writing whole"]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("machine", {"cpu": "another"}, r"another machine\.cpu: 'another' then"),
        ("versions", {"torch": "1.0"}, r"another versions\.[a-z]+: "),
    ],
)
def test_costs_of_elsewhere_are_refused(pico_model, tmp_path, field, value, says):
    bench = bench_of(pico_model, FakeEngine(PREFILL, DECODE))
    document = profile(bench, tmp_path / "costs.json")
    changed = document.model_copy(update={"served": document.served.model_copy(update={field: value})})
    with pytest.raises(SenteiError, match=says):
        bench_as_profiled(changed, bench.checkpoint)


def test_costs_of_other_cores_are_refused(pico_model, tmp_path, monkeypatch):
    """One core computes half as fast as two."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    bench = bench_of(pico_model, FakeEngine(PREFILL, DECODE))
    costs = profile(bench, tmp_path / "costs.json")
    assert bench_as_profiled(costs, bench.checkpoint).served == costs.served
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    with pytest.raises(SenteiError, match=r"another machine\.vllm_cpu_omp_threads_bind: '0' then, '0-1' here"):
        bench_as_profiled(costs, bench.checkpoint)


@pytest.mark.parametrize("repeats", [1, 3])
def test_noise_shows_in_the_interval_and_in_the_check(pico_model, tmp_path, repeats):
    noise = {("mixed", repeat): 1.3 for repeat in range(repeats)}
    engine = FakeEngine(PREFILL, DECODE, noise=noise)
    found = profile(bench_of(pico_model, engine, repeats=repeats), tmp_path / "costs.json")
    assert len(engine.asked) == 7 * repeats
    predicted = found.predicted("tpot_ms", layout_of(*[(1, 24)] * 4))
    assert predicted.low < DECODE.of(layout_of(*[(1, 24)] * 4)) < predicted.value < predicted.high
    wrong = {(each.model, each.quantity): each.error for each in found.check}
    assert wrong["mixed", "ttft_ms"] == pytest.approx(1 / 1.3 - 1)


def test_an_interrupted_profile_goes_on(pico_model, tmp_path):
    engine = FakeEngine(PREFILL, DECODE, fails_after=7)
    with pytest.raises(KeyboardInterrupt):
        profile(bench_of(pico_model, engine), tmp_path / "costs.json")
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json.profile"]
    with pytest.raises(SenteiError, match="holds an interrupted profile"):
        profile(bench_of(pico_model, FakeEngine(PREFILL, DECODE)), tmp_path / "costs.json")
    with pytest.raises(SenteiError, match=r"load\.concurrency: 2 then, 3 now"):
        profile(bench_of(pico_model, engine, concurrency=3), tmp_path / "costs.json", resume=True)
    rest = FakeEngine(PREFILL, DECODE)
    found = profile(bench_of(pico_model, rest), tmp_path / "costs.json", resume=True)
    assert len(rest.asked) == 3 * len(found.models) - 7
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_one_token_has_no_time_between_two(pico_model, tmp_path):
    found = profile(bench_of(pico_model, FakeEngine(PREFILL, DECODE), output_len=1), tmp_path / "costs.json")
    assert set(found.costs) == {"ttft_ms", "ms_per_output_token", "weight_bytes", "kv_bytes_per_token"}


def test_a_load_longer_than_the_context_is_refused(pico_model, tmp_path):
    bench = bench_of(pico_model, FakeEngine(PREFILL, DECODE), output_len=300)
    with pytest.raises(SenteiError, match=r"16 tokens in and 300 out: .* reads at most 256"):
        profile(bench, tmp_path / "costs.json")
    assert not list(tmp_path.iterdir())


def test_a_pruned_model_is_refused(pruned_wide, tmp_path):
    with pytest.raises(SenteiError, match="is pruned already"):
        profile(bench_of(pruned_wide, FakeEngine(PREFILL, DECODE)), tmp_path / "costs.json")


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text", "granite"])
def test_random_models_of_every_family_run(family, tmp_path):
    make_family_pico(tmp_path / "model", family, next(iter(VARIANTS[family])))
    checkpoint = open_checkpoint(tmp_path / "model")
    width = checkpoint.layout[0].intermediate_size
    shapes = shapes_to_measure(width, min(2, num_layers_measured(checkpoint)))
    for name, layout in shapes.items():
        (tmp_path / name).mkdir()
        write_random_model(checkpoint, layout, tmp_path / name, dtype=torch.float32)
        assert open_checkpoint(tmp_path / name).layout == layout
    logits = load_model(tmp_path / "one-attention", dtype=torch.float32)(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_no_two_matrices_of_a_random_model_are_alike(pico_model, tmp_path):
    """Engines keep equal weights once, and a cache then holds what a trained model reads from memory."""
    checkpoint = open_checkpoint(pico_model)
    write_random_model(checkpoint, checkpoint.layout, tmp_path, dtype=torch.bfloat16)
    written = open_checkpoint(tmp_path)
    matrices = [written.read(name) for name, info in written.tensors.items() if len(info.shape) == 2]
    assert len({each.view(torch.uint8).numpy().tobytes() for each in matrices}) == len(matrices) == 4 * 7 + 2
    assert all(0.01 < each.float().std() < 0.03 for each in matrices)


def test_small_layers_are_measured_at_full_depth_and_large_ones_are_not(pico_model):
    small = open_checkpoint(pico_model)
    assert num_layers_measured(small) == 4
    tensors = {
        name.replace("layers.0.", f"layers.{layer}."): replace(info, shape=tuple(16 * each for each in info.shape))
        for layer in range(80)
        for name, info in small.tensors.items()
        if "layers.0." in name
    }
    deep = replace(small, layout=small.layout[:1] * 80, tensors=tensors)
    assert 8 <= num_layers_measured(deep) < 80
